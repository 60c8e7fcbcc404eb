"""Does rlpost take the same DPO step as TRL? Loss and gradient on the same preference pairs, in float32.

    python -m benchmarks.trl_dpo_parity                    # a tiny random Llama
    python -m benchmarks.trl_dpo_parity --model FOLDER     # a real model in Hugging Face layout

Exits with 1 unless loss and gradient norm agree to --tolerance (relative) for every loss, and the tokens are the same. Both
sides read the pairs with their own data code. The policy is the reference plus noise, so that the pairs differ; the
gradient is read before it is clipped. TRL sees the whole batch as one micro-batch (its `sft` is a mean over a micro-batch),
rlpost cuts it into several. `chat messages` needs the tiny model, whose words its template is made of.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.measure import machine, table, write_result

TOLERANCE = 1e-5
BETA = 0.3


@dataclass(frozen=True, slots=True)
class Setting:
    """A loss of TRL and the slots of rlpost's `method.pairs` that mean the same."""

    trl: dict[str, Any]
    rlpost: dict[str, Any]
    chat: bool = False  # chat messages under the template below, not plain texts
    one_by_one: bool = False  # TRL takes its micro-batches of one pair each


SETTINGS = {
    "sigmoid": Setting({"loss_type": ["sigmoid"]}, {}),
    "hinge": Setting({"loss_type": ["hinge"]}, {"loss": "hinge"}),
    "ipo": Setting({"loss_type": ["ipo"]}, {"loss": "ipo"}),
    "sigmoid_norm": Setting({"loss_type": ["sigmoid_norm"]}, {"length_normalised": True}),
    "sigmoid + sft": Setting(
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}, {"sft": {"type": "token_mean", "weight": 0.7}}
    ),
    # TRL's rendering of the RPO paper (its paper index); not the paper's loss, see docs/methods/rpo.md.
    "TRL's RPO": Setting(
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.005]},
        {"sft": {"type": "token_mean", "weight": 0.005}},
    ),
    # TRL 1.16's `sigmoid` takes no notice of label_smoothing. Its `aot` does; that sorts log-ratios within a micro-batch,
    # which of one pair changes nothing: what is left is conservative DPO.
    "smoothed": Setting({"loss_type": ["aot"], "label_smoothing": 0.1}, {"label_smoothing": 0.1}, one_by_one=True),
    "chat messages": Setting({"loss_type": ["sigmoid"]}, {}, chat=True),
}
# Ends with the end mark, as TRL also learns what a template writes behind it. The tiny tokenizer splits at white space.
TEMPLATE = (
    "{% for m in messages %}{{ 'w3 ' if m.role == 'user' else 'w4 ' }}{{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w4 {% endif %}"
)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the two sides are apart, relative to TRL's."""

    name: str
    loss: float
    loss_error: float
    grad_norm: float
    norm_error: float
    gradient_error: float  # |difference| / |TRL's|, over all parameters
    same_tokens: bool

    def holds(self, tolerance: float) -> bool:
        return self.loss_error <= tolerance and self.norm_error <= tolerance and self.same_tokens


@dataclass(frozen=True, slots=True)
class Side:
    """What one side computed."""

    loss: float
    gradients: dict[str, Any]
    tokens: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # prompt, chosen, rejected; sorted


def write_pairs(path: Path, words: list[str], count: int, seed: int = 0) -> Path:
    """Random pairs of texts of these words, in TRL's standard format with the prompt given."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(low, high)))

    rows = [{"prompt": text(4, 12), "chosen": " " + text(3, 30), "rejected": " " + text(3, 30)} for _ in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def as_chats(pairs: Path, path: Path) -> Path:
    """The same pairs as chat messages."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    chats = [
        {
            key: [{"role": "user" if key == "prompt" else "assistant", "content": text.strip()}]
            for key, text in row.items()
        }
        for row in rows
    ]
    path.write_text("\n".join(map(json.dumps, chats)))
    return path


def make_policy(model: str, folder: Path, noise: float = 0.02, seed: int = 1) -> str:
    """The reference with noise on its weights, in a folder of its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(noise * p.std().nan_to_num(1.0) * torch.randn(p.shape, generator=generator))
    policy.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def run_trl(policy: str, reference: str, pairs: Path, setting: Setting) -> Side:
    """One optimizer step of TRL's DPOTrainer on all pairs, in one micro-batch unless the setting says otherwise."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, TrainerCallback, logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    # vLLM is not used here; without this TRL imports it.
    importlib.import_module("trl.import_utils").is_vllm_available = lambda *_args, **_kwargs: False
    from trl import DPOTrainer

    found: dict[str, Any] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_args: Any, model: Any, **_kwargs: Any) -> None:
            found.update({n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None})

    class Trainer(DPOTrainer):
        values: ClassVar[list[float]] = []

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            result = super()._compute_loss(model, inputs, return_outputs)
            self.values.append(float((result[0] if isinstance(result, tuple) else result).detach()))
            return result

    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
            ref_model=AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
            args=_config(folder, len(rows), setting),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=_tokenizer(policy, setting.chat),
            callbacks=[Keep()],
        )
        trainer.train()
        data = trainer.train_dataset
        tokens = [(tuple(r["prompt_ids"]), tuple(r["chosen_ids"]), tuple(r["rejected_ids"])) for r in data]
    return Side(sum(Trainer.values) / len(Trainer.values), found, sorted(tokens))


def _tokenizer(path: str, chat: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def _config(folder: str, pairs: int, setting: Setting) -> Any:
    import torch
    from trl import DPOConfig

    return DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=1 if setting.one_by_one else pairs,
        gradient_accumulation_steps=pairs if setting.one_by_one else 1,
        max_steps=1,
        beta=BETA,
        learning_rate=1e-6,
        max_grad_norm=1e9,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        max_length=None,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **setting.trl,
    )


def run_rlpost(policy: str, reference: str, pairs: Path, setting: Setting, layout: str = "tree") -> Side:
    """The same step, through rlpost's data code, rows and coefficient loss, in several micro-batches."""
    from rlpost.data.pairs import build_pairs
    from rlpost.gradient.loss import coefficient_loss
    from rlpost.gradient.metrics import merge, values
    from rlpost.learner.learner import token_logprobs
    from rlpost.learner.pair_rows import pair_batches
    from rlpost.learner.process import Processes
    from rlpost.methods import StepContext, compute_coefficients
    from rlpost.policy.model import load_policy
    from rlpost.recipe.sections.data import DataSection
    from rlpost.recipe.sections.method import MethodSection
    from rlpost.recipe.sections.model import ModelSection
    from rlpost.source.pair_buffer import open_pairs, pair_group

    method = MethodSection.model_validate({"preset": "dpo", "pairs": {"beta": BETA, **setting.rlpost}})
    source = {"type": "preference", "path": str(pairs), "plain": not setting.chat}
    section, processes = DataSection.model_validate({"train": source, "held_out": 0}), Processes()
    model = ModelSection(path=policy, dtype="float32", autocast="none")
    tokenizer = _tokenizer(policy, setting.chat)
    sets = build_pairs(section, tokenizer, max_context=None, seed=0, max_completion_tokens=512)
    buffer = open_pairs(
        [pair_group(p) for p in sets.train], [None] * len(sets.train), step=0, minibatches=1, processes=processes
    )
    rows = pair_batches(buffer.row_groups(), layout=layout, micro_batch_tokens=256, pad_id=0)
    learner = load_policy(model, policy, device=processes.device)
    buffer.ref_logp = token_logprobs(load_policy(model, reference, device=processes.device), rows, buffer.tokens)
    arrays, found = buffer.arrays(processes.device), []
    for batch in rows:
        output = learner(batch)
        view, _ = arrays.view(batch, output)
        coefficients = compute_coefficients(method, view, buffer.counts[0], context=StepContext(1e-6, 0))
        coefficient_loss(coefficients, output.logp, output.entropy).backward()
        found.append(coefficients.metrics)
    gradients = {n: p.grad.detach().clone() for n, p in learner.model.named_parameters() if p.grad is not None}
    tokens = [(p.token_ids, p.chosen.token_ids, p.rejected.token_ids) for p in sets.train]
    return Side(values(merge(found))["pairs/loss"], gradients, sorted(tokens))


def compare(name: str, policy: str, reference: str, pairs: Path, layout: str = "tree") -> Agreement:
    """One loss on both sides."""
    setting = SETTINGS[name]
    pairs = as_chats(pairs, pairs.with_name("chats.jsonl")) if setting.chat else pairs
    theirs, ours = run_trl(policy, reference, pairs, setting), run_rlpost(policy, reference, pairs, setting, layout)
    assert ours.gradients.keys() == theirs.gradients.keys()
    norm, their_norm = (
        sum(float(g.double().square().sum()) for g in side.gradients.values()) ** 0.5 for side in (ours, theirs)
    )
    apart = sum(
        float((ours.gradients[n].double() - theirs.gradients[n].double()).square().sum()) for n in theirs.gradients
    )
    return Agreement(
        name,
        ours.loss,
        abs(ours.loss - theirs.loss) / abs(theirs.loss),
        norm,
        abs(norm - their_norm) / their_norm,
        apart**0.5 / their_norm,
        ours.tokens == theirs.tokens,
    )


def report(found: list[Agreement], tolerance: float) -> str:
    """A table."""
    head = ["loss", "value", "apart", "gradient norm", "apart", "gradient apart", "same tokens", "agrees"]
    rows = [
        [
            a.name,
            f"{a.loss:.6f}",
            f"{a.loss_error:.1e}",
            f"{a.grad_norm:.6f}",
            f"{a.norm_error:.1e}",
            f"{a.gradient_error:.1e}",
            "yes" if a.same_tokens else "NO",
            "yes" if a.holds(tolerance) else "NO",
        ]
        for a in found
    ]
    return table(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="the reference, a folder in Hugging Face layout; a tiny random Llama if not given"
    )
    parser.add_argument("--layout", default="tree", choices=["tree", "sorted", "padded"])
    parser.add_argument("--losses", nargs="+", choices=list(SETTINGS), help="all that suit the model if not given")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/trl_dpo_parity.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        from benchmarks.models import make_tiny

        folder = Path(name)
        reference = args.model or str(make_tiny(folder / "reference"))
        policy = make_policy(reference, folder / "policy")
        words = ["red", "blue", "is", "a", "very", "good", "answer"] if args.model else [f"w{i}" for i in range(3, 200)]
        pairs = write_pairs(folder / "pairs.jsonl", words, args.pairs)
        losses = args.losses or [one for one, setting in SETTINGS.items() if not (args.model and setting.chat)]
        found = [compare(one, policy, reference, pairs, args.layout) for one in losses]
    print(report(found, args.tolerance))
    agreed = all(a.holds(args.tolerance) for a in found)
    write_result(
        args.output,
        {
            "what": "rlpost against TRL's DPOTrainer, float32, the same preference pairs",
            "model": "tiny random Llama" if args.model is None else Path(args.model).name,
            "pairs": args.pairs,
            "layout": args.layout,
            "tolerance": args.tolerance,
            "agrees": agreed,
            "losses": [asdict(a) for a in found],
            "machine": machine(),
        },
    )
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
