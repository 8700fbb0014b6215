"""Linear growth matrix: one GEMM of the library, in the precision asked for, accumulated in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import products_in

__all__ = ["linear_growth_matrix"]


def linear_growth_matrix(dz: Tensor, h: Tensor, out: Tensor | None, precision: str) -> Tensor:
    """M = dz^T h for (n, O) and (n, I), float32 (float64 for float64); out: added to."""
    dtype = torch.promote_types(dz.dtype, h.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    with products_in(precision, dz.device):
        if dz.is_cuda and dtype != wide:
            product = torch.mm(dz.to(dtype).T, h.to(dtype), out_dtype=wide)
            return product if out is None else out.add_(product)
        # the CPU's half GEMM would round M itself to half
        left, right = dz.to(wide).T, h.to(wide)
        return torch.mm(left, right) if out is None else out.addmm_(left, right)
