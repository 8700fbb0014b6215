"""Squared norms of the stage blocks of many tensors in one launch: two-stage, without atomics.

A grown tensor falls into L-shaped blocks. It is read as a matrix (A, B) over its own memory, B contiguous,
and element (a, b) belongs to block max(rows[a], columns[b]): no element pays a division to find its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["BLOCK_A", "BLOCK_B", "FIELDS", "block_norms_kernel", "finish_kernel", "locate_tile", "store_block_sums"]

BLOCK_A = 8
BLOCK_B = 128
FIELDS = 7  # columns of the geometry table


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
def block_norms_kernel(
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
def finish_kernel(
    partial_ptr,  # (P, MAX_BLOCKS)
    geometry_ptr,
    sums_ptr,  # (total blocks,)
    counts_ptr,  # (total blocks,) elements
    waiting_ptr,  # (total blocks,) 0: the rule holds, 1: it waits, 2: it does if it is zero
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
