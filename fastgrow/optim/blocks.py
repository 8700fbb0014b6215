"""How one parameter falls into stage blocks, and how it is cut into slabs that fit a cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["UNDECIDED", "Blocks", "Part", "Runs", "Slab", "blocks_of", "born_small", "runs_of"]

Runs = list[list[int]]
"""A stage vector, run-length encoded: [[length, stage], ...]; plain numbers, which state_dict keeps."""

_MIN_ROW = 64  # shortest contiguous row worth being one
_MOST_RUNS = 8  # runs of columns that are taken one by one

UNDECIDED = 2.0
"""The flag of a block whose first norm, which says whether it waits, has not been seen yet."""

_SMALL = 1 / 32


def born_small(squares: Any, count: Any, seed_squares: Any, seed_count: Any) -> Any:
    """Whether a block's root mean square is below 1/32 of block 0's; sums of squares and elements, numbers or tensors.

    What begins small so as not to disturb the function is smaller: weights behind a batch norm by sqrt(eps) / 2 (1.6 %
    for the eps of 1e-3 that some nets take, 0.16 % by default), incoming weights of signed pairs and outgoing ones of
    Firefly by 1e-4. Starts of full size, variance transfer's too, are usually above a tenth.
    """
    return squares * seed_count < _SMALL**2 * (seed_squares * count)


def runs_of(stages: Tensor) -> Runs:
    """Run lengths of a stage vector, (size,) int64."""
    values, counts = torch.unique_consecutive(stages.cpu(), return_counts=True)
    return [[int(n), int(value)] for n, value in zip(counts.tolist(), values.tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class Part:
    """The columns of a slab that belong to one block: all of them, a slice, or an index, (n,) int64."""

    block: int
    columns: slice | Tensor | None = None

    def of(self, slab: Tensor) -> Tensor:
        """These columns of (rows, B): a view, or for an index a copy."""
        if self.columns is None:
            return slab
        if isinstance(self.columns, slice):
            return slab[:, self.columns]
        return slab.index_select(1, self.columns)

    def put(self, slab: Tensor, values: Tensor) -> None:
        """Write (rows, n) into these columns."""
        if isinstance(self.columns, Tensor):
            slab.index_copy_(1, self.columns, values)
        else:
            self.of(slab).copy_(values)


@dataclass(frozen=True, slots=True)
class Slab:
    """Rows of a parameter's matrix that fall into blocks alike: contiguous, and small enough for a cache.

    size: rows; of a matrix of one row, columns. parts: its blocks' columns; main: the block of most of them.
    """

    size: int
    main: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Blocks:
    """The stage blocks of one parameter: element (i, j, ..) belongs to stage max(stage(i), stage(j), ..).

    The parameter is read as a matrix (A, B) over its own memory, whose strides are `strides`; element
    (a, b) belongs to block max(rows[a], columns[b]), so that no element needs a division to find its own.
    stages: the stage of each block, ascending; counts: elements of each block.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    stages: tuple[int, ...]
    counts: tuple[int, ...]
    rows: Tensor  # (A,) int64
    columns: Tensor  # (B,) int64
    size: tuple[int, int]  # A, B
    slabs: tuple[Slab, ...]  # one behind the other along dimension `along` of the matrix
    along: int

    def cut(self, tensor: Tensor) -> Sequence[Tensor]:
        """The slabs of a tensor that has these strides: views, each (rows, B)."""
        if not self.slabs:
            return ()
        return self.matrix(tensor.detach()).split([slab.size for slab in self.slabs], self.along)

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape and strides as (A, B), in the same memory."""
        return tensor.as_strided(self.size, (self.size[1], 1))

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy of it that has the parameter's strides."""
        if tensor.stride() == self.strides or tensor.numel() <= 1:
            return tensor
        return tensor.new_empty_strided(self.shape, self.strides).copy_(tensor)


def blocks_of(parameter: Tensor, runs: Mapping[int, Runs], slab_size: int) -> Blocks:
    """The blocks of a parameter whose dimensions have these stages, in slabs of about `slab_size`."""
    shape = tuple(parameter.shape)
    strides = _dense_strides(parameter)
    vectors = {dim: _vector_of(of) for dim, of in runs.items()}
    width, row_dim = _row_width(shape, strides, list(runs))
    total = math.prod(shape)
    rows = torch.zeros(total // width if width else 0, dtype=torch.int64, device="cpu")
    columns = torch.zeros(width, dtype=torch.int64, device="cpu")
    for dim, vector in vectors.items():
        if dim == row_dim or shape[dim] == 1:
            index = torch.arange(len(rows), device="cpu") * width // strides[dim] % shape[dim]
            rows = torch.maximum(rows, vector[index])
        else:
            columns = torch.maximum(columns, vector[torch.arange(width, device="cpu") // strides[dim] % shape[dim]])
    elements = _count(rows, columns)
    stages = tuple(sorted(elements))
    rank = torch.tensor(stages, dtype=torch.int64, device="cpu")
    # the rank of a maximum is the maximum of the ranks
    rows, columns = torch.searchsorted(rank, rows), torch.searchsorted(rank, columns)
    slabs, along = _slabs(rows, columns, slab_size, parameter.device)
    return Blocks(
        shape=shape,
        strides=strides,
        stages=stages,
        counts=tuple(elements[stage] for stage in stages),
        rows=rows,
        columns=columns,
        size=(len(rows), len(columns)),
        slabs=tuple(slabs),
        along=along,
    )


def _vector_of(runs: Runs) -> Tensor:
    lengths = torch.tensor([n for n, _ in runs], dtype=torch.int64, device="cpu")
    return torch.repeat_interleave(torch.tensor([stage for _, stage in runs], dtype=torch.int64, device="cpu"), lengths)


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's strides if it is dense in memory; those of a contiguous one otherwise."""
    expected, strides = 1, list(tensor.stride())
    for dim in sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), -dim)):
        if tensor.shape[dim] == 1:
            continue
        if tensor.stride(dim) != expected:
            return tuple(torch.empty(tensor.shape, device="meta").stride())
        expected *= tensor.shape[dim]
    return tuple(strides)


def _row_width(shape: Sequence[int], strides: Sequence[int], grown: Sequence[int]) -> tuple[int, int | None]:
    """B, and the dimension whose blocks the rows follow."""
    long = sorted((dim for dim, n in enumerate(shape) if n > 1), key=lambda dim: -strides[dim])
    slow = [dim for dim in long if dim in grown]
    total = math.prod(shape)
    if len(slow) > 1 or (slow and strides[slow[0]] >= _MIN_ROW):
        return strides[slow[0]], slow[0]
    if slow:
        return strides[slow[0]] * shape[slow[0]], None
    return (strides[long[0]], None) if len(long) > 1 else (total, None)


def _count(rows: Tensor, columns: Tensor) -> dict[int, int]:
    """{stage: elements (a, b) with max(rows[a], columns[b]) == stage}, for the stages that have any."""
    stages = torch.unique(torch.cat([rows, columns]))
    below = [int((rows <= stage).sum()) * int((columns <= stage).sum()) for stage in stages]
    counts = {int(stage): n - m for stage, n, m in zip(stages, below, [0, *below], strict=False)}
    return {stage: n for stage, n in counts.items() if n}


def _slabs(rows: Tensor, columns: Tensor, size: int, device: torch.device) -> tuple[list[Slab], int]:
    """The slabs, and the dimension of the matrix along which they lie."""
    if not len(rows) or not len(columns):
        return [], 0
    if len(rows) == 1:
        runs = runs_of(columns.clamp(min=int(rows[0])))
        if len(runs) <= _MOST_RUNS:
            # parts of one row are contiguous: slabs of their own, nothing to gather
            return [Slab(n, block, (Part(block),)) for run, block in runs for n in _chunks(run, size)], 1
    met: dict[int, tuple[Part, ...]] = {}
    slabs: list[Slab] = []
    for run, row in runs_of(rows):
        if row not in met:
            met[row] = tuple(_parts(columns.clamp(min=row), device))
        main = int(columns.clamp(min=row).bincount().argmax())
        slabs += [Slab(n, main, met[row]) for n in _chunks(run, max(1, size // len(columns)))]
    return slabs, 0


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - at) for at in range(0, total, size)]


def _parts(blocks: Tensor, device: torch.device) -> list[Part]:
    """The columns of each block, run by run, or block by block where the runs are many."""
    runs = runs_of(blocks)
    if len(runs) == 1:
        return [Part(runs[0][1])]
    if len(runs) > _MOST_RUNS:
        return [Part(int(one), (blocks == one).nonzero().view(-1).to(device)) for one in blocks.unique()]
    stops = torch.tensor([n for n, _ in runs], device="cpu").cumsum(0).tolist()
    return [Part(block, slice(stop - n, stop)) for (n, block), stop in zip(runs, stops, strict=True)]
