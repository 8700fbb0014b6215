"""Small matrices on the host: brought there together, decomposed together, each as if it were alone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fixed_signs", "svd", "svd_of_cores", "to_host"]


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


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """left (..., m, r), values (..., r), right (..., n, r) with r = min(m, n), of one matrix or a batch.

    Divide and conquer may not converge where many values are nearly equal. Then that of the transpose is tried, and
    last the eigenvectors of the Gram matrix in float64, which always do: values below 1e-8 of the largest are lost.
    The others of a batch are decomposed as ever.
    """
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right.mT
    except torch.linalg.LinAlgError:
        if matrix.dim() > 2:
            parts = [svd(member) for member in matrix.flatten(end_dim=-3)]
            left, values, right = (torch.stack(each) for each in zip(*parts, strict=True))
            batch = matrix.shape[:-2]
            return left.unflatten(0, batch), values.unflatten(0, batch), right.unflatten(0, batch)
    try:
        right, values, left = torch.linalg.svd(matrix.mT, full_matrices=False)
        return left.mT, values, right
    except torch.linalg.LinAlgError:
        pass
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = _svd_by_gram(matrix.mT)
        return left, values, right
    return _svd_by_gram(matrix)


def _svd_by_gram(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`svd` of (m, n), m <= n, by ``M M^T``."""
    wide = matrix.double()
    size = wide.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    wide = wide / size
    left = torch.linalg.eigh(wide @ wide.mT).eigenvectors.flip(-1)
    right, triangle = torch.linalg.qr(wide.mT @ left)  # the images are orthogonal, but for rounding
    values = triangle.diagonal()
    right = right * torch.ones_like(values).copysign(values)
    return left.to(matrix.dtype), (values.abs() * size).to(matrix.dtype), right.to(matrix.dtype)


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
        for left, values, right, i in zip(*svd(batch), members, strict=True):
            true = cores[i].shape[0]
            extra = size - true
            result[i] = left[:true, extra:], values[extra:], right[:true, extra:]
    return result
