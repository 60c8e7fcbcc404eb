"""What the tests of the main job share: a tiny model, a small recipe, and child processes that are always cleaned up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("rlpost", deadline=None)  # no test depends on how busy the machine is
hypothesis.settings.load_profile("rlpost")

REPOSITORY = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
REWARD = '''
def reward(completions, **columns):
    """Graded, so that a random model's groups differ: the share of printable ASCII characters."""
    texts = [completion[-1]["content"] for completion in completions]
    return [sum(" " <= c <= "~" for c in text) / max(1, len(text)) for text in texts]
'''


def pytest_collection_modifyitems(items):
    """Files with the most tests that start engines come first: with two workers that take file after file, a long file at
    the end would leave one of them idle."""
    engines = Counter(item.path for item in items if item.get_closest_marker("engine"))
    items.sort(key=lambda item: -engines[item.path])


def save_tiny_model(folder: Path, *, seed: int = 0, spread: float = 0.2, intermediate: int = 96):
    """Saves a random two-layer Llama (tied embeddings, 258 byte tokens) with a chat template; (model, tokenizer).

    `spread` is the standard deviation of its weights: with 0.3 it ends often enough to test endings.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bytes_ = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=spread,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """The folder of the tiny model."""
    folder = tmp_path_factory.mktemp("tiny_model")
    save_tiny_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def classifier(tiny_model, tmp_path_factory) -> str:
    """The folder of a random reward model with one output, and the tiny model's tokenizer and template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward_model")
    config = LlamaConfig.from_pretrained(tiny_model, num_labels=1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def one_thread():
    """On a busy machine two threads that wait for each other cost more than they give; and results are repeatable."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def write_recipe(tiny_model):
    """`write_recipe(folder, {"learner.rollouts": 2, ...})`: the path of a recipe that trains the tiny model in seconds."""

    def write(folder: Path, changes: dict | None = None, reward: str = REWARD) -> Path:
        import yaml

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "graded.py").write_text(reward)
        tree = {
            "name": "run",
            "output_dir": str(folder),
            "model": {"path": tiny_model, "dtype": "float32", "autocast": "none"},
            "data": {"train": {"type": "arithmetic", "size": 40}, "held_out": 4, "max_prompt_tokens": 64},
            "rollout": {
                "engine": {"type": "transformers"},
                "prompts_per_step": 2,
                "completions_per_prompt": 4,
                "max_completion_tokens": 8,
            },
            "rewards": [{"function": str(folder / "graded.py"), "deadline_s": 60.0}],
            "scoring": {"workers": 1},
            "method": {"preset": "grpo"},
            "learner": {"rollouts": 4, "learning_rate": 1e-3},
            "evaluation": {"prompts": 4},
            "tracking": {"wandb": {"mode": "disabled"}, "console": False, "report": False},  # pictures take seconds
        }
        for path, value in (changes or {}).items():
            *above, last = path.split(".")
            place = tree
            for key in above:
                place = place.setdefault(key, {}) if isinstance(place, dict) else place[int(key)]
            place[last] = value
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return folder / "recipe.yaml"

    return write


class Children:
    """Starts rlpost in processes of their own, and leaves none behind."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen] = []

    def start(
        self,
        recipe: Path,
        *overrides: str,
        launch: str | None = None,
        script: bool = False,
        before: str = "",
        host: str = "",
        **environment: str,
    ) -> subprocess.Popen:
        """Not waited for. `launch`: a file in launch/ for accelerate, which launch/run.sh starts with `script`; `before`:
        Python code run first in the process; `host`: the network namespace that it is in."""
        head = [sys.executable, "-m", "rlpost"]
        if launch:
            launcher = Path(sys.executable).with_name("accelerate")
            head = [sys.executable, str(launcher), "launch", "--config_file", f"launch/{launch}", "-m", "rlpost"]
            head = ["bash", "launch/run.sh", f"launch/{launch}"] if script else head
        elif before:
            head = [sys.executable, "-c", before + "\nfrom rlpost.cli import main\nmain()\n"]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        child = subprocess.Popen(
            [*(("ip", "netns", "exec", host) if host else ()), *head, str(recipe), *overrides],
            cwd=REPOSITORY,
            env={
                **env,
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "RLPOST_VENV": str(Path(sys.executable).parents[1]),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(child)
        return child

    def run(self, recipe: Path, *overrides: str, timeout: float = 240, **options: str) -> tuple[int, str]:
        """Waits for the end; returns (exit code, everything printed)."""
        child = self.start(recipe, *overrides, **options)
        printed, _ = child.communicate(timeout=timeout)
        return child.returncode, printed

    def end(self) -> None:
        for child in self._started:
            try:
                os.killpg(child.pid, signal.SIGKILL)  # its own session: nobody else is in the group
            except ProcessLookupError:
                continue
            finally:
                child.communicate()


@pytest.fixture
def children():
    """Runs rlpost as users do, in processes of its own."""
    made = Children()
    yield made
    made.end()


def before_the_table(printed: str) -> str:
    """What a run of several processes said itself: torch's launcher repeats its last words in a table."""
    return printed.split("torch.distributed.elastic", 1)[0].partition("=" * 60)[0]


def rows(run: Path, kind: str | None = None) -> list[dict]:
    """A run's metrics, without the times and what says only how long something took."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.startswith(("time/", "offload/"))}
        for row in found
        if kind is None or row["kind"] == kind
    ]


def weights(checkpoint: Path) -> dict:
    """A checkpoint's weights by name."""
    from safetensors.torch import load_file

    file = next(f for f in (checkpoint / "model.safetensors", checkpoint / "adapter_model.safetensors") if f.is_file())
    return load_file(file)
