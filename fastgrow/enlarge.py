"""One tensor into a larger one: where the old values go, what the new ones are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .errors import GrowthError

__all__ = ["Enlargement"]

Fill = Tensor | complex
"""Values for the positions where no old value lands: a tensor of the new shape, or one number."""


@dataclass(frozen=True, eq=False)
class Enlargement:
    """old shape -> new shape, with the new position of every old index of the dimensions in `axes`."""

    old: tuple[int, ...]
    new: tuple[int, ...]
    axes: Mapping[int, Tensor]  # dimension -> (old length,) int64, on the CPU

    @classmethod
    def checked(cls, what: str, old: Iterable[int], new: Iterable[int], axes: Mapping[int, Tensor]) -> Enlargement:
        """The same, or a `GrowthError` that names `what` and the dimension at fault."""
        old, new = tuple(old), tuple(new)
        if len(old) != len(new):
            raise GrowthError(f"{what} has shape {old}; the new shape {new} must have as many dimensions")
        maps: dict[int, Tensor] = {}
        for dim, index in axes.items():
            if not 0 <= dim < len(old):
                raise GrowthError(f"{what} of shape {old} has no dimension {dim}; count from 0")
            if index.dtype != torch.int64 or tuple(index.shape) != (old[dim],):
                raise GrowthError(
                    f"{what}: the index map of dimension {dim} is {index.dtype} of shape "
                    f"{tuple(index.shape)}, wanted int64 of shape ({old[dim]},): where each old index goes"
                )
            maps[dim] = index.detach().cpu()
            if not _is_injection(maps[dim], new[dim]):
                raise GrowthError(
                    f"{what}: the index map of dimension {dim} must send its {old[dim]} old indices to "
                    f"different positions below {new[dim]}"
                )
        for dim, (before, after) in enumerate(zip(old, new, strict=True)):
            if dim not in maps and before != after:
                raise GrowthError(
                    f"{what}: dimension {dim} goes from {before} to {after} without an index map; give axes[{dim}]"
                )
        return cls(old, new, maps)

    @cached_property
    def starts(self) -> dict[int, int | None]:
        """Where each map begins that moves all indices by the same amount; None for any other map."""
        return {dim: _run_start(index) for dim, index in self.axes.items()}

    def reduced(self, dims: Iterable[int]) -> Enlargement:
        """For a tensor that has length 1 in these dimensions (a mean with ``keepdim=True``)."""
        gone = {dim % len(self.old) for dim in dims}
        return Enlargement(
            tuple(1 if dim in gone else size for dim, size in enumerate(self.old)),
            tuple(1 if dim in gone else size for dim, size in enumerate(self.new)),
            {dim: index for dim, index in self.axes.items() if dim not in gone},
        )

    def without(self, dim: int) -> Enlargement:
        """For a tensor that lacks this dimension (a mean over it)."""
        dim %= len(self.old)
        return Enlargement(
            self.old[:dim] + self.old[dim + 1 :],
            self.new[:dim] + self.new[dim + 1 :],
            {at - (at > dim): index for at, index in self.axes.items() if at != dim},
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
        result = tensor.new_empty_strided(self.new, _strides_like(tensor, self.new))
        if isinstance(tensor, FakeTensor):
            return result
        for margin in self._margins():
            if isinstance(fresh, Tensor):
                result[margin].copy_(fresh[margin])
            else:
                result[margin].fill_(0 if fresh is None else fresh)
        if isinstance(scale, Tensor):
            tensor = tensor * scale.to(tensor.device)
        elif scale != 1.0:
            tensor = tensor * scale
        if shift is not None:
            tensor = tensor + shift.to(tensor.device)
        self._copy(result, tensor.to(result.dtype))
        return result

    def _margins(self) -> list[tuple[slice, ...]]:
        """Slices that together cover every new position; where old ones are scattered, the whole tensor."""
        margins = []
        for dim, index in self.axes.items():
            start, whole = self.starts[dim], (slice(None),) * dim
            if start is None:
                return [()]
            margins += [(*whole, slice(0, start))] if start else []
            end = start + len(index)
            margins += [(*whole, slice(end, None))] if end < self.new[dim] else []
        return margins

    def _copy(self, result: Tensor, source: Tensor) -> None:
        scattered = []
        for dim, index in self.axes.items():
            start = self.starts[dim]
            if start is None:
                scattered.append(dim)
            else:
                result = result.narrow(dim, start, len(index))
        if not scattered:
            result.copy_(source)
            return
        order = scattered + [dim for dim in range(result.dim()) if dim not in scattered]
        where = tuple(
            self.axes[dim].to(result.device).view(-1, *[1] * (len(scattered) - 1 - at))
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
        )
        return torch.sparse_coo_tensor(torch.stack(rows), dense.place(values), self.new, check_invariants=True)


def _is_injection(index: Tensor, length: int) -> bool:
    """Whether the indices are sent to different positions below `length`."""
    start = _run_start(index)
    if start is not None:
        return 0 <= start <= length - len(index)
    unique = torch.unique(index)
    return len(unique) == len(index) and 0 <= int(unique[0]) <= int(unique[-1]) < length


def _run_start(index: Tensor) -> int | None:
    start = int(index[0]) if len(index) else 0
    return start if torch.equal(index, torch.arange(start, start + len(index), device="cpu")) else None


def _strides_like(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Dense strides of `shape` in the tensor's memory format: channels last stays channels last."""
    dims = range(tensor.dim())
    last = [*dims[:1], *dims[2:], *dims[1:2]]
    for order in (list(dims), last):
        if _strides(tuple(tensor.shape), order) == tensor.stride():
            return _strides(shape, order)
    return _strides(shape, sorted(dims, key=tensor.stride, reverse=True))


def _strides(shape: tuple[int, ...], order: list[int]) -> tuple[int, ...]:
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)
