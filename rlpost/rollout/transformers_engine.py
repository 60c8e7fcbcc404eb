"""The fallback engine: a sampling loop over transformers' forward, with its own copy of the weights."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rlpost.errors import RolloutError
from rlpost.experience import Completion
from rlpost.recipe.sections.rollout import TransformersEngine
from rlpost.rollout.drawing import Row, draw, make_warpers
from rlpost.rollout.engine import SamplingRequest, SamplingSettings, check_lengths

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

_LOGITS_AT_ONCE = 2**26  # elements: 256 MB of float32


class TransformersRolloutEngine:
    """Samples with a plain forward and a KV cache. Slow, exact, and independent of the batch.

    Every sample draws one uniform number a token from its own generator and inverts the cumulative distribution, so it
    does not depend on what else is in the batch (up to rounding: padding changes the last bits of the logits, which
    matters only where a draw falls within 1e-7 of a boundary in float32). `sampler_logprobs` are of the distribution
    sampled from: after temperature, top-k and top-p, as vLLM's `processed_logprobs`. No global random state is used.
    """

    name = "transformers"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 64, max_model_len: int
    ) -> None:
        """Takes `model` over: its weights are changed in place by `load_weights`. Use `from_path` for an own copy."""
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._max_model_len = max_model_len
        self._eos = _end_tokens(model, tokenizer)
        _note_slowness()

    @classmethod
    def from_path(
        cls,
        model_path: str,
        tokenizer: PreTrainedTokenizerBase,
        section: TransformersEngine,
        *,
        max_model_len: int,
        device: str = "cpu",
        attention: str = "sdpa",
        trust_remote_code: bool = False,
    ) -> TransformersRolloutEngine:
        """Loads an own copy of the weights. Raises RolloutError when that fails."""
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(
                model_path,
                dtype=getattr(torch, section.dtype),
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            ).to(device)
        except (OSError, ValueError, RuntimeError) as error:
            raise RolloutError(
                f"The transformers rollout engine cannot load its copy of {model_path!r} on {device}: {error}. Check "
                "`model.path`, or set `rollout.engine.dtype=bfloat16` if memory is short."
            ) from error
        return cls(model, tokenizer, batch_size=section.batch_size, max_model_len=max_model_len)

    @torch.inference_mode()
    def sample(self, requests: Sequence[SamplingRequest], settings: SamplingSettings) -> list[Completion]:
        """One completion a request, in the order of the requests. Raises RolloutError for prompts that are too long."""
        check_lengths([len(request.token_ids) for request in requests], self._max_model_len)
        warpers = make_warpers(settings)
        # By length, so that little is padded; equal prompts side by side, so that they share their prefill.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].token_ids), requests[i].token_ids, i))
        done: dict[int, Completion] = {}
        for start in range(0, len(order), self._batch_size):
            rows = [self._row(i, requests[i], settings) for i in order[start : start + self._batch_size]]
            self._decode(rows, settings, warpers)
            done.update((row.index, row.done) for row in rows if row.done is not None)
        return [done[i] for i in range(len(requests))]

    def _row(self, index: int, request: SamplingRequest, settings: SamplingSettings) -> Row:
        new = min(settings.max_completion_tokens, self._max_model_len - len(request.token_ids))
        generator = torch.Generator().manual_seed(request.seed)
        return Row(index, request.token_ids, torch.rand(new, generator=generator, dtype=torch.float64))

    def _decode(self, rows: list[Row], settings: SamplingSettings, warpers: LogitsProcessorList) -> None:
        logits, cache, mask = self._prefill(rows)
        while True:
            tokens, logprobs = draw(logits, rows, settings, warpers)
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
                cache.batch_select_indices(index)
                mask, tokens = mask[index], tokens[index]
            positions = mask.sum(1, keepdim=True)
            mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
            logits = self._forward(tokens[:, None], mask, positions, cache)

    def _prefill(self, rows: list[Row]) -> tuple[Tensor, Any, Tensor]:
        """Runs each distinct prompt once, left-padded, then spreads logits [B, V], cache, mask [B, T] over the rows."""
        from transformers import DynamicCache

        prompts = list(dict.fromkeys(row.prompt for row in rows))
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self._model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._model.device)
        cache = DynamicCache(config=self._model.config)
        logits = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        place = {prompt: i for i, prompt in enumerate(prompts)}
        index = torch.tensor([place[row.prompt] for row in rows], device=logits.device)
        cache.batch_select_indices(index)
        return logits[index], cache, mask[index]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        return self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

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
        return Completion(tuple(row.tokens), tuple(row.logprobs), text, finish)

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    @torch.inference_mode()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]] | Iterator[tuple[str, Tensor]]) -> None:
        """Copies weights in by Hugging Face name; tied ones may be left out. There is no prefix cache to forget.

        Raises RolloutError for unknown names, wrong shapes, and weights that are missing.
        """
        own = dict(self._model.named_parameters(remove_duplicate=False))
        written: set[int] = set()
        for name, tensor in weights:
            target = own.get(name)
            if target is None or target.shape != tensor.shape:
                have = "it has no such weight" if target is None else f"its weight has shape {tuple(target.shape)}"
                raise RolloutError(
                    f"The rollout engine cannot take weight {name!r} of shape {tuple(tensor.shape)}: {have}. Engine "
                    "and learner must be built from the same `model.path`; with LoRA send merged weights."
                )
            target.copy_(tensor)
            written.add(target.data_ptr())
        missing = [name for name, target in own.items() if target.data_ptr() not in written]
        if missing:
            raise RolloutError(
                f"{len(missing)} weights did not reach the rollout engine, the first is {missing[0]!r}: it now holds a "
                "mixture of old and new. Send all weights at every sync."
            )

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
    logging.getLogger(__name__).warning("Sampling with transformers: fine for tests and tiny models, slow otherwise.")


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends a completion: the tokenizer's and the generation config's end-of-sequence tokens, as in vLLM."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(end for end in (*ends, tokenizer.eos_token_id) if end is not None)
