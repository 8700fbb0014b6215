"""Small matrices on the host: brought there together, decomposed together, each as if it were alone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fixed_signs", "svd_of_cores", "to_host"]


def fixed_signs(left: Tensor) -> Tensor:
    """(..., m, k) -> (..., 1, k): what makes each column's largest entry positive, so that ranks and reruns agree."""
    low, high = torch.aminmax(left, dim=-2, keepdim=True)
    return torch.ones_like(low).copysign_(low + high)  # the larger of both in size gives the sum its sign


def to_host(tensors: list[Tensor]) -> list[Tensor]:
    """Small tensors on the CPU, by one copy per device."""
    result = list(tensors)
    for device in {t.device for t in tensors if t.device.type != "cpu"}:
        chosen = [i for i, t in enumerate(tensors) if t.device == device]
        flat = torch.cat([tensors[i].reshape(-1) for i in chosen]).cpu()
        pieces = flat.split([tensors[i].numel() for i in chosen])
        for i, piece in zip(chosen, pieces, strict=True):
            result[i] = piece.clone().reshape(tensors[i].shape)
    return result


def svd_of_cores(cores: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """left, values, right of square float64 cores, by one batched SVD per padded size.

    Sizes are rounded up to a multiple of 8, whatever else is in the call: every matrix of a batch then
    starts on a cache line, and LAPACK adds in the same order wherever it stands. The padding is a
    diagonal larger than the core's norm, so that its triplets come first and mix with nothing.
    """
    groups: dict[int, list[int]] = {}
    for i, core in enumerate(cores):
        groups.setdefault(-(-core.shape[0] // 8) * 8, []).append(i)
    result: list[tuple[Tensor, Tensor, Tensor]] = [(core, core, core) for core in cores]
    for size, members in groups.items():
        batch = torch.zeros(len(members), size, size, dtype=torch.float64)
        for slot, i in zip(batch, members, strict=True):
            core = cores[i]
            true = core.shape[0]
            slot[:true, :true] = core
            slot.diagonal()[true:] = 2 * torch.linalg.vector_norm(core) + 1e-300
        u, s, vh = torch.linalg.svd(batch)
        for slot_u, slot_s, slot_vh, i in zip(u, s, vh, members, strict=True):
            true = cores[i].shape[0]
            extra = size - true
            result[i] = slot_u[:true, extra:], slot_s[extra:], slot_vh.mT[:true, extra:]
    return result
