"""Random directions beyond those that a growth matrix has."""

from __future__ import annotations

import torch
from torch import Tensor

from ..newborns import Newborns

__all__ = ["completed"]


def completed(newborns: Newborns, vectors: Tensor, count: int, role: str) -> Tensor:
    """Unit columns (m, k) and `count` random ones, of the units' outgoing ("consumer") or incoming vectors.

    The new ones are orthogonal to the others and each other as long as there is room; where units have separate
    channels, in each of them.
    """
    if not count:
        return vectors
    if not newborns.site.separate:
        return torch.cat([vectors, _orthogonal_complement(vectors, count)], 1)
    side = newborns.side(role)
    return torch.cat([vectors, side.whole(_orthogonal_complement(side.parts(vectors), count))], 1)


def _orthogonal_complement(basis: Tensor, count: int) -> Tensor:
    """`count` random unit columns, orthogonal to the basis (..., m, k) and each other as long as there is room."""
    columns = torch.randn(*basis.shape[:-1], count, dtype=basis.dtype).to(basis.device)
    room = min(count, basis.shape[-2] - basis.shape[-1])
    if room:
        span, free = torch.linalg.qr(basis).Q, columns[..., :room]  # those of signed pairs are not orthogonal
        for _ in range(2):
            free = free - span @ (span.mT @ free)
        columns = torch.cat([torch.linalg.qr(free).Q, columns[..., room:]], -1)
    return columns / columns.norm(dim=-2, keepdim=True)
