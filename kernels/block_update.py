"""Optimizer steps whose scalars differ from stage block to stage block, many tensors in one launch.

The new values' block norms are taken while the values are in registers, tile for tile and in the same
order as `block_norms` takes them, so that the next step's learning rates cost no pass of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import block_table
from .block_norms import (
    BLOCK_A,
    BLOCK_B,
    FIELDS,
    block_norms_kernel,
    finish_kernel,
    locate_tile,
    store_block_sums,
)
from .block_table import POINTERS, SCALARS

__all__ = ["BlockTable", "runs_on"]

_WARPS = 4
_FINISH_ROWS = 128
_TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def _root(x, ACC: tl.constexpr):
    if ACC == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def _divide(x, y, ACC: tl.constexpr):
    if ACC == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def _scalars(scalars_ptr, ratio_ptr, base, block, low, high, ACC: tl.constexpr, SCALARS: tl.constexpr):
    """The scalars of each element's block, the first one times the block's ratio."""
    zero = tl.zeros(block.shape, dtype=ACC)
    rate, decay, third, fourth, fifth = zero, zero, zero, zero, zero
    for k in range(low, high + 1):
        here = block == k
        at = scalars_ptr + (base + k) * SCALARS
        rate = tl.where(here, tl.load(at) * tl.load(ratio_ptr + base + k), rate)
        decay = tl.where(here, tl.load(at + 1), decay)
        third = tl.where(here, tl.load(at + 2), third)
        fourth = tl.where(here, tl.load(at + 3), fourth)
        fifth = tl.where(here, tl.load(at + 4), fifth)
    return rate, decay, third, fourth, fifth


@triton.jit
def _address(
    pointers_ptr,
    tensor,
    COLUMN: tl.constexpr,
    DTYPE: tl.constexpr,
    POINTERS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pointer = tl.load(pointers_ptr + tensor * POINTERS + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _sgd_kernel(
    pointers_ptr,  # (T, 5): parameter, gradient, momentum buffer
    geometry_ptr,
    blocks_ptr,
    tiles_ptr,
    scalars_ptr,  # (total, 5): rate, weight decay, 1 - dampening; then momentum
    ratio_ptr,  # (total,)
    partial_ptr,  # (P, MAX_BLOCKS)
    total,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NORMS: tl.constexpr,
    SCALARS: tl.constexpr,
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
    tensor, base, offset, mask, block, low, high = locate_tile(
        geometry_ptr, blocks_ptr, tiles_ptr, pid, FIELDS, BLOCK_A, BLOCK_B, ALIGNED
    )
    rate, decay, gain, _, _ = _scalars(scalars_ptr, ratio_ptr, base, block, low, high, ACC, SCALARS)
    p_ptr = _address(pointers_ptr, tensor, 0, DTYPE, POINTERS, ALIGNED) + offset
    g_ptr = _address(pointers_ptr, tensor, 1, DTYPE, POINTERS, ALIGNED) + offset
    p = tl.load(p_ptr, mask=mask, other=0.0).to(ACC)
    g = tl.load(g_ptr, mask=mask, other=0.0).to(ACC)
    if MAXIMIZE:
        g = -g
    g += decay * p
    if MOMENTUM:
        momentum = tl.load(scalars_ptr + total * SCALARS)
        m_ptr = _address(pointers_ptr, tensor, 2, DTYPE, POINTERS, ALIGNED) + offset
        m = tl.load(m_ptr, mask=mask, other=0.0).to(ACC) * momentum + gain * g
        tl.store(m_ptr, m.to(DTYPE), mask=mask)
        g = g + momentum * m if NESTEROV else m
    new = (p - rate * g).to(DTYPE)
    tl.store(p_ptr, new, mask=mask)
    if NORMS:
        seen = tl.where(mask, new.to(ACC), 0.0)
        store_block_sums(seen * seen, block, low, high, partial_ptr + pid * MAX_BLOCKS)


@triton.jit
def _adam_kernel(
    pointers_ptr,  # (T, 5): parameter, gradient, first moment, second moment, its maximum
    geometry_ptr,
    blocks_ptr,
    tiles_ptr,
    scalars_ptr,  # (total, 5) and four more: see `adam`
    ratio_ptr,
    partial_ptr,
    total,
    AMSGRAD: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NORMS: tl.constexpr,
    SCALARS: tl.constexpr,
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
    tensor, base, offset, mask, block, low, high = locate_tile(
        geometry_ptr, blocks_ptr, tiles_ptr, pid, FIELDS, BLOCK_A, BLOCK_B, ALIGNED
    )
    rate, decay, correction, root, _ = _scalars(scalars_ptr, ratio_ptr, base, block, low, high, ACC, SCALARS)
    hyper = scalars_ptr + total * SCALARS
    rise1, beta2, rise2, eps = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
    p_ptr = _address(pointers_ptr, tensor, 0, DTYPE, POINTERS, ALIGNED) + offset
    g_ptr = _address(pointers_ptr, tensor, 1, DTYPE, POINTERS, ALIGNED) + offset
    m_ptr = _address(pointers_ptr, tensor, 2, DTYPE, POINTERS, ALIGNED) + offset
    v_ptr = _address(pointers_ptr, tensor, 3, DTYPE, POINTERS, ALIGNED) + offset
    p = tl.load(p_ptr, mask=mask, other=0.0).to(ACC)
    g = tl.load(g_ptr, mask=mask, other=0.0).to(ACC)
    m = tl.load(m_ptr, mask=mask, other=0.0).to(ACC)
    v = tl.load(v_ptr, mask=mask, other=0.0).to(ACC)
    if MAXIMIZE:
        g = -g
    if DECOUPLED:
        p -= rate * decay * p
    else:
        g += decay * p
    m += rise1 * (g - m)
    v = v * beta2 + rise2 * g * g
    tl.store(m_ptr, m.to(DTYPE), mask=mask)
    tl.store(v_ptr, v.to(DTYPE), mask=mask)
    if AMSGRAD:
        w_ptr = _address(pointers_ptr, tensor, 4, DTYPE, POINTERS, ALIGNED) + offset
        v = tl.maximum(tl.load(w_ptr, mask=mask, other=0.0).to(ACC), v)
        tl.store(w_ptr, v.to(DTYPE), mask=mask)
    denominator = _divide(_root(v, ACC), tl.where(mask, root, 1.0), ACC) + eps
    step = _divide(rate, tl.where(mask, correction, 1.0), ACC)
    new = (p - step * _divide(m, tl.where(mask, denominator, 1.0), ACC)).to(DTYPE)
    tl.store(p_ptr, new, mask=mask)
    if NORMS:
        seen = tl.where(mask, new.to(ACC), 0.0)
        store_block_sums(seen * seen, block, low, high, partial_ptr + pid * MAX_BLOCKS)


@triton.jit
def _avagrad_kernel(
    pointers_ptr,  # (T, 5): parameter, gradient, first moment, second moment
    geometry_ptr,
    blocks_ptr,
    tiles_ptr,
    scalars_ptr,  # (total, 5) and four more: see `avagrad`
    ratio_ptr,  # (total,) the ratio times the stage's normaliser
    partial_ptr,
    eta_ptr,  # (P, MAX_BLOCKS) sums of the next step's eta^2
    total,
    MAXIMIZE: tl.constexpr,
    NORMS: tl.constexpr,
    SCALARS: tl.constexpr,
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
    tensor, base, offset, mask, block, low, high = locate_tile(
        geometry_ptr, blocks_ptr, tiles_ptr, pid, FIELDS, BLOCK_A, BLOCK_B, ALIGNED
    )
    rate, decay, correction, root, root_next = _scalars(scalars_ptr, ratio_ptr, base, block, low, high, ACC, SCALARS)
    hyper = scalars_ptr + total * SCALARS
    rise1, beta2, rise2, eps = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
    p_ptr = _address(pointers_ptr, tensor, 0, DTYPE, POINTERS, ALIGNED) + offset
    g_ptr = _address(pointers_ptr, tensor, 1, DTYPE, POINTERS, ALIGNED) + offset
    m_ptr = _address(pointers_ptr, tensor, 2, DTYPE, POINTERS, ALIGNED) + offset
    v_ptr = _address(pointers_ptr, tensor, 3, DTYPE, POINTERS, ALIGNED) + offset
    p = tl.load(p_ptr, mask=mask, other=0.0).to(ACC)
    g = tl.load(g_ptr, mask=mask, other=0.0).to(ACC)
    m = tl.load(m_ptr, mask=mask, other=0.0).to(ACC)
    v = tl.load(v_ptr, mask=mask, other=0.0).to(ACC)
    if MAXIMIZE:
        g = -g
    g += decay * p
    m += rise1 * (g - m)
    denominator = _divide(_root(v, ACC), tl.where(mask, root, 1.0), ACC) + eps
    step = _divide(rate, tl.where(mask, correction, 1.0), ACC)
    new = (p - step * _divide(m, tl.where(mask, denominator, 1.0), ACC)).to(DTYPE)
    risen = (v * beta2 + rise2 * g * g).to(DTYPE)
    tl.store(p_ptr, new, mask=mask)
    tl.store(m_ptr, m.to(DTYPE), mask=mask)
    tl.store(v_ptr, risen, mask=mask)
    following = _divide(_root(risen.to(ACC), ACC), tl.where(mask, root_next, 1.0), ACC) + eps
    eta = _divide(tl.where(mask, 1.0, 0.0).to(ACC), tl.where(mask, following, 1.0), ACC)
    store_block_sums(eta * eta, block, low, high, eta_ptr + pid * MAX_BLOCKS)
    if NORMS:
        seen = tl.where(mask, new.to(ACC), 0.0)
        store_block_sums(seen * seen, block, low, high, partial_ptr + pid * MAX_BLOCKS)


_KERNELS = {"norms": block_norms_kernel, "sgd": _sgd_kernel, "adam": _adam_kernel, "avagrad": _avagrad_kernel}


def runs_on(device: torch.device) -> bool:
    """Whether kernels run on a device: on a GPU, and anywhere under Triton's interpreter."""
    return device.type == "cuda" or not isinstance(block_norms_kernel, triton.JITFunction)


class BlockTable(block_table.BlockTable):
    """The tables on a GPU; the steps are Triton's kernels, one program a tile."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        blocks: Sequence[tuple[Tensor, Tensor]],
        counts: Sequence[Sequence[int]],
    ) -> None:
        acc = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        super().__init__(tensors, blocks, counts, acc)
        geometry: list[list[int]] = []
        tiles: list[Tensor] = []
        at, first_tile = 0, 0
        for number, (rows, columns) in enumerate(blocks):
            size_a, size_b = rows.numel(), columns.numel()
            grid = (-(-size_a // BLOCK_A), -(-size_b // BLOCK_B))
            total = grid[0] * grid[1]
            geometry.append([size_a, size_b, at, at + size_a, self.bases[number], first_tile, total])
            index = torch.arange(total, dtype=torch.int32, device="cpu")
            tiles.append(torch.stack([torch.full_like(index, number), index // grid[1], index % grid[1]], 1))
            at += size_a + size_b
            first_tile += total
        geometry.append([0] * 4 + [self.total, first_tile, 0])  # the end of the last tensor's blocks
        self._max_blocks = triton.next_power_of_2(max(len(count) for count in counts))
        self._geometry = torch.tensor(geometry, dtype=torch.int64, device="cpu").to(self.device)
        self._tiles = torch.cat(tiles).contiguous().to(self.device)
        self._blocks = torch.cat([vector.cpu() for pair in blocks for vector in pair]).to(torch.int32).to(self.device)
        self.partial = torch.zeros(first_tile, self._max_blocks, dtype=acc, device=self.device)
        self._rows_aligned = all(line[1] % 16 == 0 for line in geometry)
        self._pointers = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._aligned = False

    @staticmethod
    def is_supported(tensor: Tensor) -> bool:
        return tensor.dtype in _TRITON_TYPES and tensor.numel() > 0

    def _take(self, addresses: list[int]) -> None:
        # a blocking copy would wait for all that is queued on the GPU
        self._pointers = torch.tensor(addresses, dtype=torch.int64, device="cpu").to(self.device, non_blocking=True)
        self._aligned = self._rows_aligned and all(address % 16 == 0 for address in addresses)

    def _guard(self) -> AbstractContextManager[object]:
        """The tables' device made current, as a launch needs it."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def launch(
        self,
        name: str,
        options: dict[str, bool] | None = None,
        scalars: Tensor | None = None,
        ratio: Tensor | None = None,
        eta: Tensor | None = None,
    ) -> None:
        more = () if eta is None else (eta,)
        numbers = (self.partial,) if scalars is None else (scalars, ratio, self.partial, *more, self.total)
        constants = {} if options is None else {"SCALARS": SCALARS, **{key.upper(): on for key, on in options.items()}}
        with self._guard():
            _KERNELS[name][(self._tiles.shape[0],)](
                self._pointers,
                self._geometry,
                self._blocks,
                self._tiles,
                *numbers,
                **constants,
                DTYPE=_TRITON_TYPES[self.dtype],
                ACC=_TRITON_TYPES[self.acc],
                POINTERS=POINTERS,
                FIELDS=FIELDS,
                MAX_BLOCKS=self._max_blocks,
                BLOCK_A=BLOCK_A,
                BLOCK_B=BLOCK_B,
                ALIGNED=self._aligned,
                num_warps=_WARPS,
            )

    def finish(
        self,
        partial: Tensor,
        sums: Tensor,
        ratio: Tensor | None = None,
        waiting: Tensor | None = None,
        adapt: Tensor | None = None,
    ) -> None:
        with self._guard():
            finish_kernel[(len(self.strides),)](
                partial,
                self._geometry,
                sums,
                self.counts,
                sums if waiting is None else waiting,
                sums if ratio is None else ratio,
                self._tiles if adapt is None else adapt,
                FIELDS=FIELDS,
                MAX_BLOCKS=self._max_blocks,
                ROWS=_FINISH_ROWS,
                RATIO=ratio is not None,
                num_warps=_WARPS,
            )
