"""Squared norms of the stage blocks of many tensors in one launch: two-stage, without atomics.

A grown tensor falls into L-shaped blocks. It is read as a matrix (A, B) over its own memory, B contiguous,
and element (a, b) belongs to block max(rows[a], columns[b]): no element pays a division to find its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "BlockTable",
    "block_norms",
    "is_supported",
    "launch_finish",
    "locate_tile",
    "runs_on",
    "store_block_sums",
]

BLOCK_A = 8
BLOCK_B = 128
FIELDS = 7  # columns of the geometry table
_WARPS = 4
_FINISH_ROWS = 128
_POINTERS = 5

_TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def locate_tile(
    geometry_ptr,  # (T + 1, 7): A, B, first row's and column's block, first block, first tile, tiles
    blocks_ptr,  # block of each index of each grown dimension, one after the other
    tiles_ptr,  # (P, 3): tensor, tile along A, tile along B
    pid,
    FIELDS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The tensor of a program, its elements' offsets and mask, their blocks and the range of these."""
    tensor = tl.load(tiles_ptr + pid * 3).to(tl.int64)
    tile_a = tl.load(tiles_ptr + pid * 3 + 1).to(tl.int64)
    tile_b = tl.load(tiles_ptr + pid * 3 + 2).to(tl.int64)
    row = geometry_ptr + tensor * FIELDS
    size_a = tl.load(row)
    size_b = tl.load(row + 1)
    if ALIGNED:
        size_b = tl.multiple_of(size_b, 16)
    a = tile_a * BLOCK_A + tl.arange(0, BLOCK_A).to(tl.int64)
    b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    inside_a = a < size_a
    inside_b = b < size_b
    block_a = tl.load(blocks_ptr + tl.load(row + 2) + a, mask=inside_a, other=0)
    block_b = tl.load(blocks_ptr + tl.load(row + 3) + b, mask=inside_b, other=0)
    high = tl.maximum(tl.max(block_a, axis=0), tl.max(block_b, axis=0))
    # masked lanes must not lower the range's start
    low_a = tl.min(tl.where(inside_a, block_a, high), axis=0)
    low_b = tl.min(tl.where(inside_b, block_b, high), axis=0)
    low = tl.maximum(low_a, low_b)
    block = tl.maximum(block_a[:, None], block_b[None, :])
    offset = a[:, None] * size_b + b[None, :]
    mask = inside_a[:, None] & inside_b[None, :]
    return tensor, tl.load(row + 4), offset, mask, block, low, high


@triton.jit
def store_block_sums(values, block, low, high, out_ptr):
    """The sum of `values` over each block of a tile; blocks that it does not meet stay untouched (zero)."""
    for k in range(low, high + 1):
        here = tl.where(block == k, values, 0.0)
        tl.store(out_ptr + k, tl.sum(tl.sum(here, axis=1), axis=0))


@triton.jit
def _block_norms_kernel(
    pointers_ptr,  # (T, 5) addresses; the tensors are column 0
    geometry_ptr,
    blocks_ptr,
    tiles_ptr,
    partial_ptr,  # (P, MAX_BLOCKS)
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    POINTERS: tl.constexpr,
    FIELDS: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    tensor, _, offset, mask, block, low, high = locate_tile(
        geometry_ptr, blocks_ptr, tiles_ptr, pid, FIELDS, BLOCK_A, BLOCK_B, ALIGNED
    )
    x_ptr = tl.load(pointers_ptr + tensor * POINTERS).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(ACC)
    store_block_sums(x * x, block, low, high, partial_ptr + pid * MAX_BLOCKS)


@triton.jit
def _finish_kernel(
    partial_ptr,  # (P, MAX_BLOCKS)
    geometry_ptr,
    sums_ptr,  # (total blocks,)
    counts_ptr,  # (total blocks,) elements
    waiting_ptr,  # (total blocks,) 0: the rule holds, 1: born zero, 2: not looked at yet
    ratio_ptr,  # (total blocks,)
    adapt_ptr,  # (T,) int32
    FIELDS: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    RATIO: tl.constexpr,
):
    tensor = tl.program_id(0).to(tl.int64)
    row = geometry_ptr + tensor * FIELDS
    base = tl.load(row + 4)
    first = tl.load(row + 5)
    tiles = tl.load(row + 6)
    blocks = tl.load(row + FIELDS + 4) - base
    k = tl.arange(0, MAX_BLOCKS)
    total = tl.zeros([MAX_BLOCKS], dtype=partial_ptr.dtype.element_ty)
    for start in range(0, tiles, ROWS):
        line = start + tl.arange(0, ROWS).to(tl.int64)
        inside = line < tiles
        at = (first + line)[:, None] * MAX_BLOCKS + k[None, :]
        total += tl.sum(tl.load(partial_ptr + at, mask=inside[:, None], other=0.0), axis=0)
    valid = k < blocks
    tl.store(sums_ptr + base + k, total, mask=valid)
    if RATIO:
        count = tl.load(counts_ptr + base + k, mask=valid, other=1.0)
        waiting = tl.load(waiting_ptr + base + k, mask=valid, other=0.0)
        seed = tl.sum(tl.where(k == 0, total, 0.0), axis=0)
        seed_count = tl.sum(tl.where(k == 0, count, 0.0), axis=0)
        waiting = tl.where(waiting == 2.0, tl.where(total == 0.0, 1.0, 0.0), waiting)
        waiting = tl.where(total * seed_count >= seed * count, 0.0, waiting)
        # the base rate where there is no seed to compare with, and where the tensor does not adapt
        known = tl.where(tl.load(adapt_ptr + tensor) != 0, seed, 0.0)
        ratio = tl.sqrt(total / tl.where(known > 0.0, known, 1.0))
        ratio = tl.where(known > 0.0, ratio, 1.0)
        ratio = tl.where(waiting == 0.0, ratio, 1.0)
        ratio = tl.where(k > 0, ratio, 1.0)
        tl.store(waiting_ptr + base + k, waiting, mask=valid)
        tl.store(ratio_ptr + base + k, ratio, mask=valid)


def runs_on(device: torch.device) -> bool:
    """Whether kernels run on a device: on a GPU, and anywhere under Triton's interpreter."""
    return device.type == "cuda" or not isinstance(_block_norms_kernel, triton.JITFunction)


def is_supported(tensor: Tensor) -> bool:
    """Whether the kernels take a tensor's dtype and size; it must be dense in memory besides."""
    return tensor.dtype in _TRITON_TYPES and tensor.numel() > 0


class BlockTable:
    """Where the blocks of many tensors of one dtype and device lie, as tables on that device.

    tensors: dense, any rank, read as matrices (A, B) over their memory; blocks: per tensor, (A,) and (B,)
    int64, element (a, b) belonging to block max(rows[a], columns[b]), counting from 0; counts: per tensor,
    the elements of each block. The addresses are read anew by `bind`, for tensors laid out like these.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        blocks: Sequence[tuple[Tensor, Tensor]],
        counts: Sequence[Sequence[int]],
    ) -> None:
        first = tensors[0]
        self.device, self.dtype = first.device, first.dtype
        self.acc = torch.float64 if first.dtype == torch.float64 else torch.float32
        geometry: list[list[int]] = []
        tiles: list[Tensor] = []
        at, base, first_tile = 0, 0, 0
        for number, (tensor, (rows, columns), count) in enumerate(zip(tensors, blocks, counts, strict=True)):
            size_a, size_b = rows.numel(), columns.numel()
            if size_a * size_b != tensor.numel() or not is_supported(tensor):
                raise ValueError(
                    f"tensor {number} of shape {tuple(tensor.shape)}, {tensor.dtype}, is no matrix of "
                    f"{size_a} x {size_b} elements that the kernels take"
                )
            grid = (-(-size_a // BLOCK_A), -(-size_b // BLOCK_B))
            total = grid[0] * grid[1]
            geometry.append([size_a, size_b, at, at + size_a, base, first_tile, total])
            index = torch.arange(total, dtype=torch.int32)
            tiles.append(torch.stack([torch.full_like(index, number), index // grid[1], index % grid[1]], 1))
            at += size_a + size_b
            base += len(count)
            first_tile += total
        geometry.append([0] * 4 + [base, first_tile, 0])  # the end of the last tensor's blocks
        self.bases = [line[4] for line in geometry]
        self.max_blocks = triton.next_power_of_2(max(len(count) for count in counts))
        self.geometry = torch.tensor(geometry, dtype=torch.int64).to(self.device)
        self.tiles = torch.cat(tiles).contiguous().to(self.device)
        self.blocks = torch.cat([vector.cpu() for pair in blocks for vector in pair]).to(torch.int32).to(self.device)
        self.partial = torch.zeros(first_tile, self.max_blocks, dtype=self.acc, device=self.device)
        self.counts = torch.tensor([n for count in counts for n in count], dtype=self.acc).to(self.device)
        self._rows_aligned = all(line[1] % 16 == 0 for line in geometry)
        self.strides = [tensor.stride() for tensor in tensors]
        self._addresses: list[list[int]] = []
        self.pointers = torch.zeros(0, dtype=torch.int64)
        self.aligned = False

    @property
    def total(self) -> int:
        """Blocks of all tensors together."""
        return self.bases[-1]

    def bind(self, columns: Sequence[Sequence[Tensor]]) -> None:
        """Take the addresses of up to five lists of tensors, each laid out like the table's own."""
        addresses = [
            [tensors[i].data_ptr() for tensors in columns] + [0] * (_POINTERS - len(columns))
            for i in range(len(self.bases) - 1)
        ]
        if addresses != self._addresses:
            self._addresses = addresses
            # a blocking copy would wait for all that is queued on the GPU
            self.pointers = torch.tensor(addresses, dtype=torch.int64).to(self.device, non_blocking=True)
            self.aligned = self._rows_aligned and all(a % 16 == 0 for line in addresses for a in line)

    def guard(self) -> AbstractContextManager[object]:
        """The tables' device made current, as a launch needs it."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def constants(self) -> dict[str, object]:
        """The compile-time arguments that every kernel over this table takes."""
        return {
            "DTYPE": _TRITON_TYPES[self.dtype],
            "ACC": _TRITON_TYPES[self.acc],
            "POINTERS": _POINTERS,
            "FIELDS": FIELDS,
            "MAX_BLOCKS": self.max_blocks,
            "BLOCK_A": BLOCK_A,
            "BLOCK_B": BLOCK_B,
            "ALIGNED": self.aligned,
            "num_warps": _WARPS,
        }


def launch_finish(
    table: BlockTable,
    partial: Tensor,
    sums: Tensor,
    ratio: Tensor | None = None,
    waiting: Tensor | None = None,
    adapt: Tensor | None = None,
) -> None:
    """Add a table's partial sums up, tile after tile; with `ratio`, work out the learning-rate ratios too."""
    with table.guard():
        _finish_kernel[(len(table.bases) - 1,)](
            partial,
            table.geometry,
            sums,
            table.counts,
            sums if waiting is None else waiting,
            sums if ratio is None else ratio,
            table.tiles if adapt is None else adapt,
            FIELDS=FIELDS,
            MAX_BLOCKS=table.max_blocks,
            ROWS=_FINISH_ROWS,
            RATIO=ratio is not None,
            num_warps=_WARPS,
        )


def block_norms(
    table: BlockTable,
    out: Tensor,
    ratio: Tensor | None = None,
    waiting: Tensor | None = None,
    adapt: Tensor | None = None,
) -> None:
    """||W_dk||_F^2 of every block of the table's first column of tensors, into `out`.

    out: (table.total,) float32 (float64 for float64 tensors). With `ratio` (same shape) also
    ||W_dk||_F / ||W_d0||_F, 1 for block 0, for tensors whose `adapt` (T,) int32 is 0 and for blocks that
    `waiting` marks as born zero; a block leaves that mark when its norm per element reaches block 0's.
    The order of additions depends on shapes alone.
    """
    with table.guard():
        _block_norms_kernel[(table.tiles.shape[0],)](
            table.pointers, table.geometry, table.blocks, table.tiles, table.partial, **table.constants()
        )
    launch_finish(table, table.partial, out, ratio, waiting, adapt)
