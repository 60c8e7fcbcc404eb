"""vLLM inside the learner's process (colocated): fast sampling, weights replaced in place."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlpost.errors import RolloutError
from rlpost.experience import Completion
from rlpost.policy.precision import sampler_dtype
from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.rollout.engine import Finished, SamplingRequest, SamplingSettings, check_lengths
from rlpost.rollout.process_state import memory_binding_kept, process_group_kept, random_state_kept, threads_kept
from rlpost.rollout.sync_errors import incomplete, not_replaced
from rlpost.rollout.vllm_errors import explain_startup
from rlpost.rollout.vllm_generators import keep_generators
from rlpost.rollout.vllm_logprobs import report_whole_distribution
from rlpost.rollout.vllm_names import checkpoint_names, load_config
from rlpost.rollout.vllm_options import passed_on
from rlpost.rollout.vllm_reload import is_borrowed, replace_weights, transformers_classes_kept

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import LLM

# What vLLM must find before it is imported. A user's own settings win.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in process: weights are handed over by reference, seeds are honoured
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmRolloutEngine:
    """Samples with vLLM. One engine a process; tensor parallelism is not offered.

    Log-probs. vLLM is started with `logprobs_mode="processed_logprobs"`, and its sampler reports them as they are before
    top-k and top-p (`rlpost.rollout.vllm_logprobs`): `sampler_logprobs` are after temperature, over the whole vocabulary,
    as `RolloutEngine` promises. `logprobs()` always gives those of temperature 1.

    Determinism. Every request has its own generator, and prefixes cached by earlier calls are forgotten before each
    `sample`, so the same requests under the same weights give the same completions, in a fresh process too. Rounding
    may depend on which requests share a batch: with another order or another set of requests, a bfloat16 engine can
    sample another token where two are nearly tied. On CUDA set `VLLM_BATCH_INVARIANT=1` where that matters.

    Process-wide effects. vLLM changes this process's random states, thread count, CPU affinity and NUMA binding when it starts;
    all four are restored afterwards. Random states, thread count and affinity are restored after every call, too. Engines in
    several processes are therefore not pinned to cores.
    If torch.distributed is initialised, every process of the group must make its engine at the same time; if it is
    not, vLLM makes a group of one, so initialise it first.
    """

    name = "vllm"

    def __init__(
        self,
        model_path: str,
        engine_settings: VllmEngine,
        *,
        max_model_len: int,
        seed: int,
        device: str,
        trust_remote_code: bool = False,
        ends: Sequence[int] = (),
    ) -> None:
        """Starts vLLM on `model_path` (weights and tokenizer). `max_model_len`: prompt plus completion, in tokens. `ends`:
        tokens that end a completion beside the tokenizer's and the generation configuration's.

        Raises RolloutError, with the recipe key to change, when vLLM cannot start.
        """
        self._max_model_len, self._ends = max_model_len, tuple(ends)
        self._on_cpu = device.split(":")[0] == "cpu"
        self._asleep = False
        self._version = 0  # optimizer steps that made its weights; 0: those of its files
        self._sleeps = engine_settings.sleep and not self._on_cpu
        self._check(engine_settings, model_path)
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        import torch

        self._made_group = not torch.distributed.is_initialized()
        engine_settings = engine_settings.model_copy(update={"dtype": sampler_dtype(engine_settings)})
        # With eager execution on CPU nothing is worth compiling: what vLLM compiles regardless costs 20 s at the start.
        self._eager = self._on_cpu if engine_settings.eager is None else engine_settings.eager
        config = load_config(model_path, trust_remote_code)
        if not self._eager and is_borrowed(config):
            if engine_settings.eager is False:
                raise RolloutError(
                    f"`rollout.engine.eager=false` is not possible with model type {config.model_type}: vLLM has no code of "
                    "its own for it and compiles transformers', the learner's too. Leave the key out, or set it to true."
                )
            self._eager = True
        with self._guarded(), memory_binding_kept(), process_group_kept(), transformers_classes_kept(config):
            options = self._options(engine_settings, seed, trust_remote_code) | _generation_options(model_path)
            self._llm = _start(model_path, engine_settings, options)
            self._whole = all(self._llm.collective_rpc(report_whole_distribution))
            self._llm.collective_rpc(keep_generators)
        self._names = checkpoint_names(config, trust_remote_code)

    @staticmethod
    def _check(engine_settings: VllmEngine, model_path: str) -> None:
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
            raise RolloutError(
                f"vLLM cannot start {model_path!r} inside the learner's process while the environment variable "
                "VLLM_ENABLE_V1_MULTIPROCESSING is not 0: weights could not be handed over. Unset it, or set it to 0."
            )
        if engine_settings.tensor_parallel != 1:
            raise RolloutError(
                f"`rollout.engine.tensor_parallel={engine_settings.tensor_parallel}` is not possible in a colocated engine: "
                "each process drives one GPU. Set it to 1 and start one process per GPU."
            )

    def _options(self, engine_settings: VllmEngine, seed: int, trust_remote_code: bool) -> dict[str, Any]:
        memory: dict[str, Any] = {"gpu_memory_utilization": engine_settings.memory_fraction}
        if self._on_cpu:  # the fraction would be one of the machine's whole memory, taken by every process
            memory["kv_cache_memory_bytes"] = int(engine_settings.kv_cache_gib * 2**30)
            # Whole blocks only are shared by the requests of a group. vLLM's default on CPU is 128 tokens, so that every
            # completion's prompt would be computed anew; 32 is the least its CPU attention takes.
            memory["block_size"] = 32
        if self._sleeps:
            memory["enable_sleep_mode"] = True
        return {
            "dtype": engine_settings.dtype,
            "enforce_eager": self._eager,
            "max_model_len": self._max_model_len,
            "max_num_seqs": engine_settings.max_sequences,
            "seed": seed,
            "trust_remote_code": trust_remote_code,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            **memory,
            **passed_on(engine_settings),
        }

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        import torch

        stance = torch.compiler.set_stance("force_eager") if self._on_cpu and self._eager else contextlib.nullcontext()
        with random_state_kept(), threads_kept(), stance:
            yield

    def sample(
        self, requests: Sequence[SamplingRequest], settings: SamplingSettings, *, finished: Finished | None = None
    ) -> list[Completion]:
        """One completion a request, in the order of the requests. Raises RolloutError for prompts that are too long."""
        check_lengths([len(request.token_ids) for request in requests], self._max_model_len)
        if not requests:
            return []
        if settings.truncates and not self._whole:
            raise RolloutError(
                f"`rollout.top_k={settings.top_k}` and `rollout.top_p={settings.top_p:g}` cannot be used with the installed "
                "vLLM: its sampler is built otherwise than in the versions that rlpost knows, and would report log-probs "
                "renormalised over the tokens kept, which the learner cannot compare with its own. Set top_k to -1 and top_p "
                "to 1, install the vLLM version that rlpost asks for, or use `rollout.engine.type=transformers`."
            )
        with self._guarded():
            self._wake()
            self._llm.reset_prefix_cache()  # so that rounding does not depend on what was sampled before
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(request.token_ids)} for request in requests],
                [_sampling_params(request, settings, self._ends) for request in requests],
                use_tqdm=False,
            )
            completions = [_completion(output.outputs[0], self._version) for output in outputs]
            if self._sleeps:
                self._llm.sleep(level=1)
                self._asleep = True
        return completions

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int = 0) -> None:
        """Replaces all weights in place (Hugging Face names; tied ones may be left out); forgets cached prefixes.

        Raises RolloutError for unknown names, wrong shapes, and weights that are missing.
        """
        seen: dict[str, None] = {}  # in order

        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                seen[name] = None
                yield name, tensor.detach()  # vLLM casts: some of its tensors, such as routers' biases, stay in float32

        with self._guarded():
            self._wake()
            try:
                kwargs = {"weights": noted(), "on_cpu": self._on_cpu}
                [unreached] = self._llm.collective_rpc(replace_weights, kwargs=kwargs)
            except (KeyError, ValueError, RuntimeError, AssertionError, AttributeError, IndexError, TypeError) as error:
                last = next(reversed(seen), None)
                raise RolloutError(
                    f"vLLM refused the learner's weights at {last or 'the first'} ({type(error).__name__}: {error}). Engine "
                    "and learner must be built from the same `model.path`. If they are, vLLM cannot replace this model's "
                    "weights while it runs: use `rollout.engine.type=transformers`."
                ) from error
            self._llm.reset_prefix_cache()
        if missing := self._names.missing(seen):
            raise RolloutError(incomplete(missing, "vLLM"))
        if unreached:
            raise RolloutError(not_replaced(unreached))
        self._version = version

    def logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """For each sequence of n tokens the n - 1 log-probs (nats, temperature 1) of its tokens 1..n-1."""
        from vllm import SamplingParams

        # vLLM scores a prompt only while it samples one more token, which is thrown away: n may be max_model_len - 1.
        check_lengths([len(sequence) for sequence in sequences], self._max_model_len)
        scored = [i for i, sequence in enumerate(sequences) if len(sequence) > 1]
        out: list[list[float]] = [[] for _ in sequences]
        if not scored:
            return out
        with self._guarded():
            self._wake()
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(sequences[i])} for i in scored],
                SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False),
                use_tqdm=False,
            )
        for i, output in zip(scored, outputs, strict=True):
            pairs = zip(sequences[i][1:], output.prompt_logprobs[1:], strict=True)
            out[i] = [entry[token].logprob for token, entry in pairs]
        return out

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Frees the engine's memory. The engine cannot be used afterwards; closing twice does nothing."""
        llm = self.__dict__.pop("_llm", None)
        if llm is None:
            return
        with self._guarded(), contextlib.nullcontext() if self._made_group else process_group_kept():
            llm.llm_engine.engine_core.shutdown()


def _generation_options(model_path: str) -> dict[str, Any]:
    """vLLM reads the model's generation_config.json, too; where that cannot be read, it is told to do without."""
    from rlpost.policy.generation import loading_options

    return {"generation_config": "vllm"} if loading_options(model_path)[0] else {}


def _start(model_path: str, engine_settings: VllmEngine, options: dict[str, Any]) -> LLM:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from vllm import LLM

            return LLM(model=model_path, **options)
    except (ImportError, OSError, ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise explain_startup(error, model_path, engine_settings, options["max_model_len"]) from error


def _sampling_params(request: SamplingRequest, settings: SamplingSettings, ends: Sequence[int] = ()) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        seed=request.seed,
        max_tokens=settings.max_completion_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        stop=list(settings.stop) or None,
        stop_token_ids=list(ends) or None,
        include_stop_str_in_output=True,
        logprobs=0,  # of the sampled token only
    )


def _completion(output: Any, version: int) -> Completion:
    tokens = tuple(output.token_ids)
    logprobs = tuple(entry[token].logprob for token, entry in zip(tokens, output.logprobs, strict=True))
    if output.finish_reason not in ("stop", "length"):
        raise RolloutError(
            f"vLLM ended a completion with {output.finish_reason!r} after {len(tokens)} tokens. Lower "
            "`rollout.engine.max_sequences`, or give the KV cache more memory."
        )
    finish: Literal["stop", "length"] = output.finish_reason
    return Completion(tokens, logprobs, output.text, finish, ((version, len(tokens)),) if tokens else ())
