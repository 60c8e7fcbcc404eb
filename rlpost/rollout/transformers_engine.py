"""The fallback engine: a sampling loop over transformers' forward, with its own copy of the weights."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rlpost.data.answers import end_ids
from rlpost.errors import RolloutError
from rlpost.experience import Completion
from rlpost.policy.family import sampler_attention
from rlpost.policy.rotary import fix_frequencies
from rlpost.policy.verify import apart
from rlpost.policy.weights import weight_names
from rlpost.recipe.sections.rollout import TransformersEngine
from rlpost.rollout.decoding import CachedDecoding, WholeDecoding
from rlpost.rollout.drawing import Row, draw, make_truncation
from rlpost.rollout.engine import Finished, SamplingRequest, SamplingSettings, check_lengths
from rlpost.rollout.sync_errors import incomplete, refusal

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_LOGITS_AT_ONCE = 2**26  # elements: 256 MB of float32


class TransformersRolloutEngine:
    """Samples with a plain forward, and a KV cache where the model goes with one. Slow, exact, and independent of the batch.

    Every sample draws one uniform number a token from its own generator and inverts the cumulative distribution, so it
    does not depend on what else is in the batch (up to rounding: padding changes the last bits of the logits, which
    matters only where a draw falls within 1e-7 of a boundary in float32). `sampler_logprobs` are as
    `RolloutEngine` promises: after temperature, before top-k and top-p. No global random state is used.
    """

    name = "transformers"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 64, max_model_len: int
    ) -> None:
        """Takes `model` over: its weights are changed in place by `load_weights`. Use `from_path` for an own copy."""
        self._model = model.eval().requires_grad_(False)
        self._names = weight_names(model)
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._max_model_len = max_model_len
        self._version = 0  # optimizer steps that made its weights; 0: those of its files
        self._eos = _end_tokens(model, tokenizer)
        self._decoding: type[CachedDecoding | WholeDecoding] = self._choose_decoding()
        _note_slowness()

    @classmethod
    def from_path(
        cls,
        model_path: str,
        tokenizer: PreTrainedTokenizerBase,
        engine_settings: TransformersEngine,
        *,
        max_model_len: int,
        device: str = "cpu",
        attention: str = "auto",
        trust_remote_code: bool = False,
    ) -> TransformersRolloutEngine:
        """Loads an own copy of the weights; `attention` is the learner's `model.attention`. Raises RolloutError when that
        fails."""
        from transformers import AutoConfig, AutoModelForCausalLM

        from rlpost.policy.generation import loading_options

        try:
            config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(
                model_path,
                dtype=getattr(torch, engine_settings.dtype),
                attn_implementation=sampler_attention(attention, config),
                trust_remote_code=trust_remote_code,
                **loading_options(model_path)[0],
            )
            fix_frequencies(model, max_model_len)
            model = model.to(device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of all kinds: the code is the model's own
            raise RolloutError(
                f"The transformers rollout engine cannot load its copy of {model_path!r} on {device}: {error}. Check "
                "`model.path`, or set `rollout.engine.dtype=bfloat16` if memory is short."
            ) from error
        return cls(model, tokenizer, batch_size=engine_settings.batch_size, max_model_len=max_model_len)

    @torch.inference_mode()
    def sample(
        self, requests: Sequence[SamplingRequest], settings: SamplingSettings, *, finished: Finished | None = None
    ) -> list[Completion]:
        """One completion a request, in the order of the requests. Raises RolloutError for prompts that are too long."""
        check_lengths([len(request.token_ids) for request in requests], self._max_model_len)
        truncation = make_truncation(settings)
        # By length, so that little is padded; equal prompts side by side, so that they share their prefill.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].token_ids), requests[i].token_ids, i))
        done: dict[int, Completion] = {}
        for start in range(0, len(order), self._batch_size):
            rows = [self._row(i, requests[i], settings) for i in order[start : start + self._batch_size]]
            self._decode(rows, settings, truncation)
            done.update((row.index, row.done) for row in rows if row.done is not None)
        return [done[i] for i in range(len(requests))]

    def _row(self, index: int, request: SamplingRequest, settings: SamplingSettings) -> Row:
        new = min(settings.max_completion_tokens, self._max_model_len - len(request.token_ids))
        generator = torch.Generator().manual_seed(request.seed)
        return Row(index, request.token_ids, torch.rand(new, generator=generator, dtype=torch.float64))

    def _decode(self, rows: list[Row], settings: SamplingSettings, truncation: LogitsProcessorList) -> None:
        decoding = self._decoding(self._model)
        logits = decoding.start([row.prompt for row in rows])
        while True:
            tokens, logprobs = draw(logits, rows, settings, truncation)
            for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                row.tokens.append(token)
                row.logprobs.append(logprob)
                row.done = self._finished(row, settings)
            keep = [i for i, row in enumerate(rows) if row.done is None]
            if not keep:
                return
            if len(keep) < len(rows):
                rows = [rows[i] for i in keep]
                index = torch.tensor(keep, device=logits.device)
                decoding.keep(index)
                tokens = tokens[index]
            logits = decoding.advance(tokens)

    @torch.inference_mode()
    def _choose_decoding(self) -> type[CachedDecoding | WholeDecoding]:
        """With a cache if that gives a few tokens the log-probs of the model's own forward, else without, which always does:
        hybrids keep state that is no key-value cache, and some models count padding."""
        try:
            gap = self._try_cache()
            obstacle = None if gap is None else f"log-probs would be wrong by {gap:.2g} nats"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of all kinds: the code is the model's own
            obstacle = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        if obstacle is None:
            return CachedDecoding
        _log.warning(
            "Model type %s is sampled without a key-value cache, which takes as many times longer as completions have tokens, "
            "since it does not go with one here (%s). rollout.engine.type=vllm may be faster.",
            self._model.config.model_type,
            obstacle,
        )
        return WholeDecoding

    def _try_cache(self) -> float | None:
        """How far log-probs of cached decoding are from the model's own, in nats; None: as close as rounding allows.

        Prompts of two lengths, one of which ends before the other.
        """
        self._decoding = CachedDecoding
        words = self._model.config.get_text_config().vocab_size
        lengths = ((3, 4), (5, 2), (5, 3))  # of a prompt and its completion
        rows = [
            Row(
                i, tuple((7 * i + j) % words for j in range(prompt)), torch.linspace(0.1, 0.9, new, dtype=torch.float64)
            )
            for i, (prompt, new) in enumerate(lengths)
        ]
        settings = SamplingSettings(max_completion_tokens=4, temperature=1.0)
        self._decode(rows, settings, make_truncation(settings))
        theirs = [score for row in rows for score in row.logprobs]
        ours: list[float] = []
        for row in rows:
            ids = torch.tensor([[*row.prompt, *row.tokens]], device=self._model.device)
            scores = self._model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            ours += scores.gather(-1, ids[0, 1:, None])[-len(row.tokens) :, 0].tolist()
        return apart(torch.tensor(theirs), torch.tensor(ours), exact=self._model.dtype == torch.float32)

    def _finished(self, row: Row, settings: SamplingSettings) -> Completion | None:
        """The completion, if the row has just ended: by end of sequence, by a stop string, or by length."""
        stop = None
        ended = row.tokens[-1] in self._eos
        if not ended and settings.stop:
            # A character takes at most four byte tokens: a stop string that has just been completed lies in this tail.
            tail = self._text(row.tokens[-4 * max(map(len, settings.stop)) - 4 :])
            stop = next((s for s in settings.stop if s in tail), None)
        if not ended and stop is None and len(row.tokens) < len(row.uniforms):
            return None
        text = self._text(row.tokens)
        if stop is not None and stop in text:
            text = text[: text.index(stop) + len(stop)]
        finish: Literal["stop", "length"] = "stop" if ended or stop is not None else "length"
        versions = ((self._version, len(row.tokens)),) if row.tokens else ()
        return Completion(tuple(row.tokens), tuple(row.logprobs), text, finish, versions)

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    @torch.inference_mode()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int = 0) -> None:
        """Copies weights in by their names in the checkpoint, or in the module; tied ones may be left out. There is no prefix
        cache to forget.

        Raises RolloutError for unknown names, wrong shapes, and weights that are missing.
        """
        own = dict(self._model.named_parameters(remove_duplicate=False)) | dict(self._model.named_buffers())
        seen: list[str] = []

        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                seen.append(name)
                yield name, tensor

        for name, tensor in self._names.to_module(noted()):
            target = own.get(name)
            if target is None or target.shape != tensor.shape:
                raise RolloutError(refusal(name, seen[-1], tensor.shape, None if target is None else target.shape))
            target.copy_(tensor)
        if missing := self._names.missing(seen):
            raise RolloutError(incomplete(missing, "the rollout engine"))
        self._version = version

    @torch.inference_mode()
    def logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """For each sequence of n tokens the n - 1 log-probs (nats, temperature 1) of its tokens 1..n-1."""
        check_lengths([len(sequence) - 1 for sequence in sequences], self._max_model_len)
        out: list[list[float]] = [[] for _ in sequences]
        order = sorted((i for i, s in enumerate(sequences) if len(s) > 1), key=lambda i: len(sequences[i]))
        width = max((len(s) for s in sequences), default=1)
        size = max(
            1, min(self._batch_size, _LOGITS_AT_ONCE // (width * self._model.config.get_text_config().vocab_size))
        )
        for start in range(0, len(order), size):
            batch = [sequences[i] for i in order[start : start + size]]
            longest = max(map(len, batch))
            ids = torch.tensor([list(s) + [0] * (longest - len(s)) for s in batch], device=self._model.device)
            # Padding on the right needs no mask: causal attention never looks at it.
            logits = self._model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            scores = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            for i, row in zip(order[start : start + size], scores.tolist(), strict=True):
                out[i] = row[: len(sequences[i]) - 1]
        return out

    def close(self) -> None:
        """Frees the engine's memory. The engine cannot be used afterwards."""
        self.__dict__.pop("_model", None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@functools.cache
def _note_slowness() -> None:
    _log.warning("Sampling with transformers: fine for tests and tiny models, slow otherwise.")


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends a completion: the tokenizer's and the generation config's end-of-sequence tokens and the chat template's end of
    an answer, as in vLLM."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(end for end in (*ends, tokenizer.eos_token_id, *end_ids(tokenizer)) if end is not None)
