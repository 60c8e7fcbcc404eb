"""What a vLLM worker holds of the tensors that it was sent: where each went, and the fingerprints of what lies there.

Where a tensor goes is not told by names, which every family fuses and splits in its own way: the first time that weights
are loaded, the copies are watched that the model's own code makes of them, into which place of which of its tensors. What is
made of a sent tensor otherwise than by copying (a number computed of it, say) is not known here and not compared.

Where a layer holds its weights in another layout than it was given (a CPU's matrix products have a packed copy and no other),
they are looked at as they are handed to the packing, and the packed copy is asked for a few of its columns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlpost.rollout.fingerprint import Held, as_matrix

_ASKED = 4  # columns of a packed matrix
Home = tuple[str, str]  # a module and the name of its tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a sent tensor and its place in one that the model was built with."""

    name: str
    box: tuple[int, int, int, int]  # row, column, rows, columns in the sent tensor
    home: Home
    offset: int
    strides: tuple[int, int]
    built: tuple[torch.Size, tuple[int, ...]]  # shape and strides of the model's tensor

    @property
    def span(self) -> tuple[int, int]:
        _, _, rows, columns = self.box
        return self.offset, self.offset + (rows - 1) * self.strides[0] + (columns - 1) * self.strides[1] + 1

    def meets(self, other: Piece) -> bool:
        """Whether they may have an element of the model's tensor in common."""
        (a, b), (c, d) = self.span, other.span
        if self.home != other.home or a >= d or c >= b:
            return False
        width = self.strides[0]
        if self.strides != other.strides or self.strides[1] != 1 or width < max(self.box[3], other.box[3]):
            return True
        (r, x), (s, y) = divmod(self.offset, width), divmod(other.offset, width)
        return r < s + other.box[2] and s < r + self.box[2] and x < y + other.box[3] and y < x + self.box[3]

    def of(self, tensor: Tensor) -> Tensor | None:
        """What lies in the place; None where the tensor is not as it was built."""
        if (tensor.shape, tensor.stride()) != self.built or tensor.is_meta:
            return None
        return tensor.detach().as_strided(self.box[2:], self.strides, tensor.storage_offset() + self.offset)


@dataclass
class Places:
    """Where the sent tensors went."""

    pieces: list[Piece] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)  # tensors of which the model's code did anything
    filled: dict[Home, int] = field(default_factory=dict)  # elements that the code set without a sent tensor

    def note(self, piece: Piece) -> None:
        self.forget(piece)
        self.pieces.append(piece)

    def forget(self, where: Piece) -> None:
        """What lay there has been written over."""
        self.pieces = [piece for piece in self.pieces if not piece.meets(where)]


class Watch(TorchDispatchMode):
    """Notes every copy of a sent tensor into one of the model's, for as long as it is entered."""

    def __init__(self, places: Places, homes: dict[int, tuple[Home, Tensor]], sent: dict[str, Tensor]) -> None:
        super().__init__()
        self._places, self._homes = places, homes
        self._sent = sorted((t.data_ptr(), name, t) for name, t in sent.items() if t.numel())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sources = [source for source in map(self._source, args) if source is not None]
        self._places.touched |= {name for name, _ in sources}
        first = func._schema.arguments[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and first.alias_info is not None and first.alias_info.is_write:
            self._note(func, args, sources)
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, args: Any, sources: list[tuple[str, Tensor]]) -> None:
        found = self._homes.get(args[0].untyped_storage()._cdata)
        if found is None:
            return
        home, built = found
        if len(args) > 1 and isinstance(args[1], Tensor) and _same_place(args[0], args[1]):
            return  # vLLM copies what it did not move (biases) onto itself
        piece = None
        if func is torch.ops.aten.copy_.default and len(sources) == 1:
            piece = _piece(*sources[0], args[1], home, built, args[0])
        if piece is not None:
            self._places.note(piece)
            return
        shape = built.shape, built.stride()
        size = 1 + sum((n - 1) * stride for n, stride in zip(args[0].shape, args[0].stride(), strict=True))
        if args[0].numel():
            offset = args[0].storage_offset() - built.storage_offset()
            self._places.forget(Piece("", (0, 0, 1, size), home, offset, (size, 1), shape))
            self._places.filled[home] = self._places.filled.get(home, 0) + args[0].numel()

    def _source(self, value: Any) -> tuple[str, Tensor] | None:
        """The sent tensor that a value is a view of."""
        if not isinstance(value, Tensor) or value.is_meta or not value.numel():
            return None
        at = value.data_ptr()
        low, high = 0, len(self._sent)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._sent[middle][0] <= at else (low, middle)
        if not low:
            return None
        start, name, tensor = self._sent[low - 1]
        inside = at < start + tensor.numel() * tensor.element_size() and value.dtype == tensor.dtype
        return (name, tensor) if inside else None


def _same_place(into: Tensor, of: Tensor) -> bool:
    return not into.is_meta and into.data_ptr() == of.data_ptr() and into.stride() == of.stride()


def _piece(name: str, whole: Tensor, view: Tensor, home: Home, built: Tensor, into: Tensor) -> Piece | None:
    """A copy of `view`, a view of the sent tensor `whole`, to `into`, a view of the model's tensor `built`."""
    if view.shape != into.shape:
        return None
    matrix = as_matrix(whole)
    width = matrix.shape[1]
    start = (view.data_ptr() - whole.data_ptr()) // whole.element_size()
    dims = [
        (n, s, d) for n, s, d in zip(view.shape, view.stride(), into.stride(), strict=True) if n > 1
    ]  # size, strides there and here
    dims.sort(key=lambda dim: -dim[1])
    merged: list[tuple[int, int, int]] = []
    for n, s, d in dims:
        if merged and merged[-1][1:] == (n * s, n * d):
            merged[-1] = (merged[-1][0] * n, s, d)
        else:
            merged.append((n, s, d))
    row, column = divmod(start, width)
    rows, columns = (1, 0, 0), (1, 1, 1)
    match merged:
        case []:
            pass
        case [(n, 1, _)] if column + n <= width:
            columns = merged[0]
        case [(n, 1, d)] if column == 0 and n % width == 0:
            rows, columns = (n // width, width, width * d), (width, 1, d)
        case [(_, s, _)] if s == width:
            rows = merged[0]
        case [(_, s, _), (n, 1, _)] if s == width and column + n <= width:
            rows, columns = merged
        case _:
            return None
    offset = into.storage_offset() - built.storage_offset()
    strides = (rows[2] or columns[0] * columns[2], columns[2])
    return Piece(name, (row, column, rows[0], columns[0]), home, offset, strides, (built.shape, built.stride()))


class HeldWeights:
    """Follows one model's updates. `begin` when they may be watched, `loading` around each part of them, `end` at last."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: Places | None = None  # known after the first whole update
        self._new: Places | None = None
        self._homes: dict[int, tuple[Home, Tensor]] = {}
        self._repacked: set[str] = set()  # layers that hold what they were given otherwise
        self._loaded: dict[str, list[Held]] = {}  # by layer, as it was handed to the packing
        self._columns: dict[str, tuple[Tensor, Tensor, int]] = {}  # by layer: which, what is in them, of how many
        self._unwrap: list[Callable[[], None]] = []
        self._updates = 0
        self.seconds = 0.0
        """Of the last update: what looking took."""
        self.held: list[Held] = []
        self.stale: list[str] = []
        """Layers whose packed copy is not of the weights that they were given."""
        self.unloaded: list[str] = []
        """Tensors that were sent, and that the model's code left out where it had a place for them."""

    def begin(self) -> None:
        """The model's tensors are those that it was built with: nothing has been loaded into them."""
        self._end_wrapping()
        self._loaded, self._columns = {}, {}
        self._updates += 1
        self.seconds = 0.0
        if self._places is None:
            self._new = Places()
            self._homes = {}
            for name, module in self._model.named_modules():
                for own, tensor in (*module._parameters.items(), *module._buffers.items()):
                    if tensor is not None:
                        self._homes.setdefault(tensor.untyped_storage()._cdata, ((name, own), tensor))
        for name, module in self._model.named_modules():
            self._wrap(name, module)

    @contextmanager
    def loading(self, sent: Iterable[tuple[str, Tensor]]) -> Iterator[Iterable[tuple[str, Tensor]]]:
        """The model's code loads these tensors meanwhile: what is yielded are the same."""
        if self._new is None:
            yield sent
        else:
            tensors = dict(sent)
            with Watch(self._new, self._homes, tensors):
                yield tensors.items()

    @torch.no_grad()
    def end(self, names: list[str]) -> None:
        """All is in place. `names`: of all tensors that were sent."""
        began = time.perf_counter()
        self._end_wrapping()
        first, self._new = self._new, None
        self.unloaded = []
        if first is not None:
            self._places, self._homes = first, {}
            left_out = [name for name in names if name not in first.touched]
            self.unloaded = left_out if left_out and self._with_gaps(first) else []
        assert self._places is not None
        modules = dict(self._model.named_modules())
        by_layer: dict[str, list[Piece]] = {}
        for piece in self._places.pieces:
            by_layer.setdefault(piece.home[0], []).append(piece)
        self.held = []
        for layer, pieces in by_layer.items():
            self.held += self._held_by(layer, modules[layer], pieces, first=first is not None)
        self.stale = [name for name, module in modules.items() if self._is_stale(name, module)]
        self._loaded, self._columns = {}, {}
        self.seconds += time.perf_counter() - began

    def _held_by(self, layer: str, module: nn.Module, pieces: list[Piece], *, first: bool) -> list[Held]:
        loaded = self._loaded.get(layer)
        if layer in self._repacked:
            return loaded or []
        held = _look(module, pieces)
        if first and loaded is not None and held != loaded:
            self._repacked.add(layer)
            return loaded
        return held

    def _wrap(self, name: str, module: nn.Module) -> None:
        """Has a layer looked at when it is complete and about to be packed."""
        method: Any = getattr(module, "quant_method", None)
        process = getattr(method, "process_weights_after_loading", None)
        if process is None or "process_weights_after_loading" in vars(method):
            return

        def looked_at(layer: nn.Module, *arguments: Any, **named: Any) -> Any:
            if layer is module:
                self._before_packing(name, layer)
            return process(layer, *arguments, **named)

        method.process_weights_after_loading = looked_at
        self._unwrap.append(lambda: delattr(method, "process_weights_after_loading"))

    def _end_wrapping(self) -> None:
        for undo in self._unwrap:
            undo()
        self._unwrap = []

    @torch.no_grad()
    def _before_packing(self, name: str, layer: nn.Module) -> None:
        places = self._new or self._places
        if places is None or (self._new is None and name not in self._repacked):
            return
        began = time.perf_counter()
        pieces = [piece for piece in places.pieces if piece.home[0] == name]
        if pieces and (found := _look(layer, pieces)):
            self._loaded[name] = found
        weight = layer._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and not weight.is_meta:
            self._columns[name] = _some_columns(weight, self._updates)
        self.seconds += time.perf_counter() - began

    def _is_stale(self, name: str, module: nn.Module) -> bool:
        """Whether a packed copy, asked for columns of its matrix, gives others than it was made of."""
        multiply = getattr(module, "cpu_linear", None)
        weight = module._parameters.get("weight")
        if multiply is None or weight is None:
            return False
        if weight.numel() and weight.dim() == 2:
            columns, wanted, width = _some_columns(weight, self._updates)
        elif name in self._columns:
            columns, wanted, width = self._columns[name]
        else:
            return False
        asked = torch.zeros(len(columns), width, dtype=wanted.dtype, device=wanted.device)
        asked[torch.arange(len(columns)), columns] = 1
        given = multiply(asked, weight, None).t()
        return bool(((given != wanted) & given.isfinite()).any())  # an infinite weight makes NaN of the zeros beside it

    def _with_gaps(self, places: Places) -> bool:
        """Whether one of the model's tensors was loaded in part, and the rest left as it lay in memory."""
        covered: dict[Home, int] = dict(places.filled)
        whole: dict[Home, int] = {}
        for piece in places.pieces:
            covered[piece.home] = covered.get(piece.home, 0) + piece.box[2] * piece.box[3]
            whole[piece.home] = math.prod(piece.built[0])
        return any(covered[home] < whole[home] for home in whole)


def _look(module: nn.Module, pieces: list[Piece]) -> list[Held]:
    found = []
    for piece in pieces:
        tensor = module._parameters.get(piece.home[1], module._buffers.get(piece.home[1]))
        if tensor is not None and (part := piece.of(tensor)) is not None:
            found.append(Held.of(piece.name, piece.box, part))
    return found


def _some_columns(weight: Tensor, seed: int) -> tuple[Tensor, Tensor, int]:
    """Numbers and contents of a few columns, and how many there are. Others at every update."""
    width = weight.shape[1]
    columns = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:_ASKED]
    return columns, weight.detach()[:, columns.to(weight.device)].clone(), width
