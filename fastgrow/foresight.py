"""How much the next rounds of block Krylov would still find: when to stop, from the numbers at hand.

A block Krylov basis makes ``A = M M^T`` block tridiagonal: diagonal blocks A_j, couplings R_j. Most gradients'
couplings settle after a round or two, and what the basis has not met yet looks like what it met last. So the
matrix is continued by its last blocks; the k leading values of the longer matrix are what later rounds may reach.
Where blocks still shrink from round to round, as they do while a spectrum decays, this promises too much and the
estimate of what is captured comes out low. It is an estimate, tested against the truth over many spectra.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cores import svd

__all__ = ["FORESEEN_FROM", "blocks_left", "foreseen", "foreseen_cost"]

FORESEEN_FROM = 3  # rounds: what two blocks and one coupling look like hides a shelf of nearly equal values
_BLOCKS = 3  # that the matrix is continued by: with two the estimate was once too kind, by 5e-6; six say the same later


def foreseen_cost(basis: int, width: int, blocks: int = _BLOCKS) -> float:
    """Flops of `foreseen`, in units of those of a product."""
    return 11.0 * (basis + blocks * width) ** 3


def blocks_left(ritz: Tensor, width: int, outside: float) -> int:
    """Blocks like the last one that ``outside``, the trace of ``A`` beyond the basis, has room for; at least one."""
    last = float(ritz[-width:, -width:].diagonal().sum())
    return max(1, math.ceil(outside / last)) if outside < _BLOCKS * last else _BLOCKS


def foreseen(ritz: Tensor, width: int, k: int, room: int, gram: Tensor | None = None, blocks: int = _BLOCKS) -> Tensor:
    """The sum of the k leading values of ``A`` that a longer basis is expected to reach; (...), batched alike.

    ritz: T = Q^T A Q, (..., s, s) float64, of a basis of blocks of ``width`` columns, at least two of them where
    gram is not given; room: columns that the space has left; gram: N^T N, (..., width, width), of the residual
    ``N = (I - Q Q^T) A Q_last`` where it is known already: the next coupling, in place of the last one again;
    blocks: to continue by, fewer than three where the trace that is left has no room for so many (`blocks_left`).
    """
    size = ritz.shape[-1]
    last = ritz[..., -width:, -width:]
    if gram is None:
        # The last block in the basis in which its coupling is symmetric, as the couplings that follow will be.
        left, values, right = svd(ritz[..., -width:, -2 * width : -width])
        turn = left @ right.mT
        coupling = (right * values[..., None, :]) @ right.mT
        last = turn.mT @ last @ turn
        front = turn @ coupling
    else:
        values, vectors = torch.linalg.eigh(gram)
        coupling = front = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
    longer = size + min(blocks, -(-room // width)) * width
    continued = ritz.new_zeros(*ritz.shape[:-2], longer, longer)
    continued[..., :size, :size] = ritz
    for start in range(size, longer, width):
        link = front if start == size else coupling
        here, before = slice(start, start + width), slice(start - width, start)
        continued[..., here, here] = last
        continued[..., here, before] = link.mT
        continued[..., before, here] = link
    return torch.linalg.eigvalsh(continued)[..., -k:].clamp(min=0).sum(-1)
