"""One tensor into a larger one: where the old values go, what the new ones are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .errors import GrowthError
from .layout import run_start
from .stages import live_part

__all__ = ["Block", "Enlargement", "Fill", "allocate", "filled"]

# Entries up to which one call that writes the old positions twice costs less than several calls that do not.
_PADDED = 1 << 16


@dataclass(frozen=True, eq=False)
class Block:
    """New values for a part of a tensor, from these positions on, one for each dimension."""

    offset: tuple[int, ...]
    values: Tensor

    @property
    def place(self) -> tuple[slice, ...]:
        return tuple(slice(at, at + n) for at, n in zip(self.offset, self.values.shape, strict=True))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it lies in a tensor of this shape."""
        if not len(self.offset) == self.values.dim() == len(shape):
            return False
        return all(own.start >= 0 and own.stop <= n for own, n in zip(self.place, shape, strict=True))


def filled(shape: Sequence[int], blocks: Iterable[Block], like: Tensor) -> Tensor:
    """Blocks as one tensor of this shape, zero elsewhere, of the dtype and device of another."""
    values = torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)
    for block in blocks:
        values[block.place] = block.values
    return values


def allocate(like: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Memory without values, of another tensor's dtype and device."""
    return like.new_empty_strided(shape, strides)


Fill = Tensor | complex | tuple[Block, ...]
"""Values for the positions where no old value lands: a tensor of the new shape, one number, or blocks that hold no old
position, with zero elsewhere."""


@dataclass(frozen=True, eq=False)
class Enlargement:
    """old shape -> new shape, with the new position of every old index of the dimensions in `axes`.

    room: dimension -> new positions that hold no unit; of old indices only such ones are dropped.
    """

    old: tuple[int, ...]
    new: tuple[int, ...]
    axes: Mapping[int, Tensor]  # dimension -> (old length,) int64, on the CPU; -1: dropped
    starts: Mapping[int, int | None]  # where each map begins that moves all kept indices by the same amount, else None
    room: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def checked(
        cls,
        what: str,
        old: Iterable[int],
        new: Iterable[int],
        axes: Mapping[int, Tensor],
        room: Mapping[int, Tensor] | None = None,
    ) -> Enlargement:
        """The same, or a `GrowthError` that names `what` and the dimension at fault."""
        old, new = tuple(old), tuple(new)
        if len(old) != len(new):
            raise GrowthError(f"{what} has shape {old}; the new shape {new} must have as many dimensions")
        maps: dict[int, Tensor] = {}
        starts: dict[int, int | None] = {}
        for dim, index in axes.items():
            if not 0 <= dim < len(old):
                raise GrowthError(f"{what} of shape {old} has no dimension {dim}; count from 0")
            if index.dtype != torch.int64 or tuple(index.shape) != (old[dim],):
                raise GrowthError(
                    f"{what}: the index map of dimension {dim} is {index.dtype} of shape "
                    f"{tuple(index.shape)}, wanted int64 of shape ({old[dim]},): where each old index goes"
                )
            maps[dim] = index.cpu()
            kept = maps[dim] if room is None else _kept(maps[dim])
            starts[dim] = run_start(kept)
            if not _is_injection(kept, starts[dim], new[dim]):
                raise GrowthError(
                    f"{what}: the index map of dimension {dim} must send its {old[dim]} old indices to "
                    f"different positions below {new[dim]}"
                )
        for dim, (before, after) in enumerate(zip(old, new, strict=True)):
            if dim not in maps and before != after:
                raise GrowthError(
                    f"{what}: dimension {dim} goes from {before} to {after} without an index map; give axes[{dim}]"
                )
        return cls(old, new, maps, starts, dict(room or {}))

    @cached_property
    def targets(self) -> Mapping[int, Tensor]:
        """dimension -> the new positions of the old indices that are kept, in order."""
        return {dim: _kept(index) for dim, index in self.axes.items()} if self.room else self.axes

    @property
    def stays(self) -> bool:
        """Whether the shape is the same and every old index that is kept stays where it is."""
        own = ((index, torch.arange(len(index), device="cpu")) for index in self.axes.values())
        return self.old == self.new and all(bool(((index < 0) | (index == places)).all()) for index, places in own)

    def reduced(self, dims: Iterable[int]) -> Enlargement:
        """For a tensor that has length 1 in these dimensions (a mean with ``keepdim=True``)."""
        gone = {dim % len(self.old) for dim in dims}
        return Enlargement(
            tuple(1 if dim in gone else size for dim, size in enumerate(self.old)),
            tuple(1 if dim in gone else size for dim, size in enumerate(self.new)),
            {dim: index for dim, index in self.axes.items() if dim not in gone},
            {dim: start for dim, start in self.starts.items() if dim not in gone},
            {dim: index for dim, index in self.room.items() if dim not in gone},
        )

    def without(self, dim: int) -> Enlargement:
        """For a tensor that lacks this dimension (a mean over it)."""
        dim %= len(self.old)
        return Enlargement(
            self.old[:dim] + self.old[dim + 1 :],
            self.new[:dim] + self.new[dim + 1 :],
            {at - (at > dim): index for at, index in self.axes.items() if at != dim},
            {at - (at > dim): start for at, start in self.starts.items() if at != dim},
            {at - (at > dim): index for at, index in self.room.items() if at != dim},
        )

    def place(
        self,
        tensor: Tensor,
        fresh: Fill | None = None,
        scale: Tensor | float = 1.0,
        shift: Tensor | None = None,
    ) -> Tensor:
        """A new tensor of `new` shape: `scale` * old values + `shift` at their new positions, else `fresh`.

        dtype, device, class of storage and memory format are those of `tensor` (of `old` shape); zeros
        where `fresh` is None. With ``scale=1.0`` old values are copied bit for bit.
        """
        if tensor.layout == torch.sparse_coo:
            return self._place_sparse(tensor)
        if isinstance(tensor, FakeTensor):
            return allocate(tensor, self.new, _strides_like(tensor, self.new))
        source = tensor
        if isinstance(scale, Tensor):
            source = source * scale.to(tensor.device)
        elif scale != 1.0:
            source = source * scale
        if shift is not None:
            source = source + shift.to(tensor.device)
        source = self._without_dropped(source.to(tensor.dtype))
        value = 0 if fresh is None or isinstance(fresh, (Tensor, tuple)) else fresh
        if self._pads and not isinstance(fresh, Tensor) and _is_row_major(tensor):
            result = torch.constant_pad_nd(source, self._pads, value)
        else:
            result = allocate(tensor, self.new, _strides_like(tensor, self.new))
            for margin in self._margins():
                if isinstance(fresh, Tensor):
                    result[margin].copy_(fresh[margin])
                else:
                    result[margin].fill_(value)
            self._copy(result, source)
        for block in fresh if isinstance(fresh, tuple) else ():
            result[block.place].copy_(block.values)
        return result

    @cached_property
    def keeps_all(self) -> bool:
        """Whether every old index has a place, and the old order is kept: what `old_block` and `compacted` need."""
        return all(
            len(self.targets[dim]) == self.old[dim]
            and (self.starts[dim] is not None or bool((index[1:] > index[:-1]).all()))
            for dim, index in self.axes.items()
        )

    def old_block(self, tensor: Tensor) -> Tensor:
        """The old values in a tensor of `new` shape: a view where no dimension scatters them, else a copy."""
        for dim, index in self.axes.items():
            start = self.starts[dim]
            if start is None:
                tensor = tensor.index_select(dim, index.to(tensor.device))
            else:
                tensor = tensor.narrow(dim, start, self.old[dim])
        return tensor

    def compacted(self, tensor: Tensor) -> Tensor:
        """The same in the tensor's own memory, always a view; overwrites new values, but takes no memory."""
        for dim, index in self.axes.items():
            start = self.starts[dim]
            if start is None:
                for place, source in enumerate(index.tolist()):
                    if place != source:
                        tensor.select(dim, place).copy_(tensor.select(dim, source))
            tensor = tensor.narrow(dim, start or 0, self.old[dim])
        return tensor

    def births(self, tensor: Tensor, fresh: Fill | None = None) -> Iterator[tuple[Tensor, Any, Tensor]]:
        """What a tensor is written where the enlargement `stays`: (part of it, None, values), or (it, (dimension,
        positions), values) where these are scattered. fresh: as in `place`.
        """
        value = 0 if fresh is None or isinstance(fresh, (Tensor, tuple)) else fresh
        for dim, index in self.targets.items():
            free = torch.ones(self.new[dim], dtype=torch.bool, device="cpu")
            free[index] = False
            if dim in self.room:
                free[self.room[dim]] = False
            born = free.nonzero().squeeze(1)
            if not len(born):
                continue
            start = run_start(born)
            positions = born.to(tensor.device)
            if isinstance(fresh, Tensor):
                values = fresh.to(tensor).index_select(dim, positions)
            else:
                values = tensor.new_full((*self.new[:dim], len(born), *self.new[dim + 1 :]), value)
            if start is None:
                yield tensor, (dim, positions), values
            else:
                yield tensor.narrow(dim, start, len(born)), None, values
        for block in fresh if isinstance(fresh, tuple) else ():
            yield tensor[block.place], None, block.values.to(tensor)

    def _without_dropped(self, tensor: Tensor) -> Tensor:
        if not self.room:
            return tensor
        dropped = [dim for dim, index in self.axes.items() if len(self.targets[dim]) < len(index)]
        return live_part(tensor, {dim: (self.axes[dim] >= 0).nonzero().squeeze(1) for dim in dropped})

    @cached_property
    def _pads(self) -> list[int]:
        """Entries before and after the old ones, last dimension first; none where that is not how the tensor grows."""
        if not self.axes or None in self.starts.values() or math.prod(self.new) > _PADDED:
            return []
        pads = []
        for dim in reversed(range(len(self.old))):
            start = self.starts.get(dim) or 0
            length = self.targets[dim].shape[0] if self.room and dim in self.axes else self.old[dim]
            pads += [start, self.new[dim] - length - start]
        return pads

    def _margins(self) -> list[tuple[slice, ...]]:
        """Slices that together cover every new position; where old ones are scattered, the whole tensor."""
        margins = []
        for dim, index in self.targets.items():
            start, whole = self.starts[dim], (slice(None),) * dim
            if start is None:
                return [()]
            margins += [(*whole, slice(0, start))] if start else []
            end = start + index.shape[0]
            margins += [(*whole, slice(end, None))] if end < self.new[dim] else []
        return margins

    def _copy(self, result: Tensor, source: Tensor) -> None:
        scattered = []
        for dim, index in self.targets.items():
            start = self.starts[dim]
            if start is None:
                scattered.append(dim)
            else:
                result = result.narrow(dim, start, len(index))
        if not scattered:
            result.copy_(source)
            return
        if len(scattered) == 1:  # no copy in between
            result.index_copy_(scattered[0], self.targets[scattered[0]].to(result.device), source)
            return
        order = scattered + [dim for dim in range(result.dim()) if dim not in scattered]
        where = tuple(
            self.targets[dim].to(result.device).view(-1, *[1] * (len(scattered) - 1 - at))
            for at, dim in enumerate(scattered)
        )
        result.permute(order)[where] = source.permute(order)

    def _place_sparse(self, tensor: Tensor) -> Tensor:
        tensor = tensor.coalesce()
        rows = [
            self.axes[dim].to(tensor.device)[index] if dim in self.axes else index
            for dim, index in enumerate(tensor.indices())
        ]
        sparse = tensor.sparse_dim()
        values = tensor.values()
        dense = Enlargement(
            tuple(values.shape),
            (len(values), *self.new[sparse:]),
            {dim - sparse + 1: index for dim, index in self.axes.items() if dim >= sparse},
            {dim - sparse + 1: start for dim, start in self.starts.items() if dim >= sparse},
            {dim - sparse + 1: index for dim, index in self.room.items() if dim >= sparse},
        )
        places, kept = torch.stack(rows), (torch.stack(rows) >= 0).all(0)
        return torch.sparse_coo_tensor(places[:, kept], dense.place(values)[kept], self.new, check_invariants=True)


def _kept(index: Tensor) -> Tensor:
    return index[index >= 0]


def _is_injection(index: Tensor, start: int | None, length: int) -> bool:
    """Whether the indices are sent to different positions below `length`; start: that of a run of them."""
    if start is not None:
        return 0 <= start <= length - index.shape[0]
    unique = torch.unique(index)
    return len(unique) == len(index) and 0 <= int(unique[0]) <= int(unique[-1]) < length


def _is_row_major(tensor: Tensor) -> bool:
    return tensor.stride() == _strides(tuple(tensor.shape), range(tensor.dim()))


def _strides_like(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Dense strides of `shape` in the tensor's memory format: channels last stays channels last."""
    dims = range(tensor.dim())
    last = [*dims[:1], *dims[2:], *dims[1:2]]
    for order in (dims, last):
        if _strides(tuple(tensor.shape), order) == tensor.stride():
            return _strides(shape, order)
    return _strides(shape, sorted(dims, key=tensor.stride, reverse=True))


def _strides(shape: tuple[int, ...], order: Sequence[int]) -> tuple[int, ...]:
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)
