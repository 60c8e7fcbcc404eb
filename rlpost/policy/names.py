"""One mapping between the names of a module's tensors and those of its checkpoint, in both directions.

transformers renames weights when it loads them, and holds some of them otherwise than a checkpoint does: the experts of a
mixture are one tensor in the module and two or three a piece in the checkpoint. Everything that hands weights on (the
sync, saving, what an engine checks) asks this module and nothing else which tensors of one are which of the other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


@dataclass(frozen=True, slots=True)
class Bundle:
    """Tensors of a module that only together are tensors of a checkpoint. Most are one of each; `module` holds several
    where a checkpoint's tensor is cut into pieces on loading, `checkpoint` where several are fused."""

    module: tuple[str, ...]
    checkpoint: tuple[str, ...]
    target: str  # what the reversed rules make of the module's names, before they are spelt out
    sources: Mapping[str, str]  # by module name: which source of `converter` it is
    converter: WeightConverter | None  # from the module's to the checkpoint's; None: the tensor stays as it is


class WeightNames:
    """The mapping of one model. Checkpoint names are those of the folder it was loaded from, or, for a model that was not
    loaded, those that transformers would save."""

    def __init__(self, model: PreTrainedModel, like: dict[str, Tensor]) -> None:
        """`like`: a tensor on `meta`, with its shape, for every name of the module that belongs into a checkpoint."""
        self._model = model
        self._like = like
        self._forward = _Rules(_load_rules(model), reverse=False)
        self.bundles: tuple[Bundle, ...] = tuple(self._bundles(_Rules(_save_rules(model), reverse=True)))
        self._parts = {name: len(bundle.checkpoint) for bundle in self.bundles for name in bundle.module}

    def size(self) -> int:
        """How many numbers the weights are."""
        return sum(tensor.numel() for tensor in self._like.values())

    def to_checkpoint(self, bundle: Bundle, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The bundle's tensors under the names of the checkpoint, made of those under the names of the module."""
        if bundle.converter is None:
            return {bundle.checkpoint[0]: tensors[bundle.module[0]]}
        return self._convert(bundle.converter, bundle.target, bundle.sources, tensors)

    def to_module(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a checkpoint, in any order, under the names of the module. The module's own names pass as they are.

        What is fused waits for its last part. Parts that never become whole are not handed on, see `missing`.
        """
        waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in weights:
            target, source = self._loaded_as(name)
            if source is None:
                yield target, tensor
                continue
            waiting[target][name] = tensor
            if len(waiting[target]) == self._parts.get(target):
                parts = waiting.pop(target)
                sources = {part: self._loaded_as(part)[1] or "" for part in parts}
                yield from self._convert(self._forward.converter(source), target, sources, parts).items()

    def missing(self, seen: Iterable[str]) -> list[str]:
        """The module's tensors that cannot be made of the checkpoint's (or are not the module's own) named in `seen`."""
        whole: set[str] = set()
        parts: Counter[str] = Counter()
        for target, source in map(self._loaded_as, seen):
            if source is None:
                whole.add(target)
            else:
                parts[target] += 1
        return [
            name
            for bundle in self.bundles
            if not any(parts[name] == len(bundle.checkpoint) for name in bundle.module)
            for name in bundle.module
            if name not in whole
        ]

    def _loaded_as(self, name: str) -> tuple[str, str | None]:
        """The name of the module's tensor that a checkpoint's tensor `name` becomes (the first, where it becomes several), and
        the source pattern of the conversion that it goes through (None: of none).

        As in `from_pretrained`, a name that the rules lead to no tensor of the module may be the module's own."""
        target, source = self._forward.rename(name, self._model.base_model_prefix, self._like)
        if target not in self._like and name in self._like:
            return name, None
        return target, source

    def _bundles(self, rules: _Rules) -> Iterator[Bundle]:
        groups: dict[str, dict[str, str | None]] = defaultdict(dict)
        for name in sorted(self._like, key=_natural):
            target, source = rules.rename(name)
            groups[target][name] = source
        for target, members in groups.items():
            names = tuple(members)
            first = members[names[0]]
            if first is None:
                yield Bundle(names, (target,), target, {}, None)
                continue
            converter, sources = rules.converter(first), {name: source or "" for name, source in members.items()}
            made = self._convert(converter, target, sources, self._like)
            yield Bundle(names, tuple(made), target, sources, converter)

    def _convert(
        self, rule: WeightConverter, target: str, sources: Mapping[str, str], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        converter = deepcopy(rule)  # it collects what it converts
        for name in sorted(sources, key=_natural):
            converter.add_tensor(target, name, sources[name], tensors[name])
        made = converter.convert(target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class _Rules:
    """transformers' renamings and conversions in one direction."""

    def __init__(self, rules: list[Any], *, reverse: bool) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._reverse = reverse
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_source = {source: rule for rule in self._converters for source in rule.source_patterns}

    def rename(
        self, name: str, prefix: str | None = None, known: dict[str, Tensor] | None = None
    ) -> tuple[str, str | None]:
        """The new name, and the source pattern of the conversion that the tensor has to go through (None: through none)."""
        from transformers.core_model_loading import rename_source_key

        if not self._renamings and not self._converters and prefix is None:
            return name, None
        return rename_source_key(name, self._renamings, self._converters, prefix, known, self._reverse)

    def converter(self, source: str) -> WeightConverter:
        return self._by_source[source]


def _load_rules(model: PreTrainedModel) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


def _save_rules(model: PreTrainedModel) -> list[Any]:
    """The reverse of the rules by which the model was loaded, as `save_pretrained` takes them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    used = getattr(model, "_weight_conversions", None)
    if used is None:  # nothing was loaded, so nobody knows whether a prefix was there
        rules = get_model_conversion_mapping(model, add_legacy=False)
        used = [rule for rule in rules if not isinstance(rule, PrefixChange)]
    return [rule.reverse_transform() for rule in used[::-1]]


def _natural(name: str) -> list[Any]:
    from transformers.core_model_loading import dot_natural_key

    return dot_natural_key(name)
