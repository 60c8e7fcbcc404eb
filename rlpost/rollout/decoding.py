"""How the transformers engine computes the next token's scores: with a key-value cache, or from the whole text every time."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoding(Protocol):
    """Some sequences in the middle of being decoded."""

    def start(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Scores [B, V] of what follows each prompt."""

    def keep(self, index: Tensor) -> None:
        """Goes on with the sequences `index` [B'] only."""

    def advance(self, tokens: Tensor) -> Tensor:
        """Appends a token [B] to each sequence; scores [B, V] of what follows."""


class CachedDecoding:
    """Each distinct prompt once, left-padded, then a token at a time. For attention of which keys and values are all state."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache: Any = None
        self._mask = torch.empty(0)

    def start(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        from transformers import DynamicCache

        distinct, device = list(dict.fromkeys(prompts)), self._model.device
        width = max(map(len, distinct))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in distinct], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct], device=device)
        self._cache, self._mask = DynamicCache(config=self._model.config), mask
        logits = self._forward(ids, (mask.cumsum(1) - 1).clamp(min=0))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        index = torch.tensor([place[prompt] for prompt in prompts], device=logits.device)
        self.keep(index)
        return logits[index]

    def keep(self, index: Tensor) -> None:
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]

    def advance(self, tokens: Tensor) -> Tensor:
        positions = self._mask.sum(1, keepdim=True)
        self._mask = torch.cat((self._mask, self._mask.new_ones(len(tokens), 1)), dim=1)
        return self._forward(tokens[:, None], positions)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        out = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]


class WholeDecoding:
    """The whole text at every token, texts of equal length together: no cache and no padding, so right for every causal model.

    Takes as many times longer as a completion has tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._texts: list[list[int]] = []
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if last_only else {}

    def start(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        self._texts = [list(prompt) for prompt in prompts]
        return self._scores()

    def keep(self, index: Tensor) -> None:
        self._texts = [self._texts[i] for i in index.tolist()]

    def advance(self, tokens: Tensor) -> Tensor:
        for text, token in zip(self._texts, tokens.tolist(), strict=True):
            text.append(token)
        return self._scores()

    def _scores(self) -> Tensor:
        """Equal texts (a group's at its first token) are computed once."""
        distinct: dict[tuple[int, ...], Tensor] = {}
        by_length: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
        for text in dict.fromkeys(map(tuple, self._texts)):
            by_length[len(text)].append(text)
        for texts in by_length.values():
            ids = torch.tensor(texts, device=self._model.device)
            logits = self._model(input_ids=ids, use_cache=False, **self._options).logits[:, -1]
            distinct.update(zip(texts, logits, strict=True))
        return torch.stack([distinct[tuple(text)] for text in self._texts])
