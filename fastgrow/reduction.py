"""A map brought to a small core with the same leading triplets: from its factors, by a Gram matrix, or whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .cores import to_host
from .operators import DenseMap, LinearMap

__all__ = [
    "HOST_CORE",
    "HOST_EIGH",
    "SMALL_SIDE",
    "Reduced",
    "formed",
    "orthonormalised",
    "reduced",
    "reduction_cost",
    "start_block",
]

HOST_CORE = 256  # cores up to this are decomposed in float64 on the host
SMALL_SIDE = 64  # those up to this wholly, whatever is wanted of them
_GRAM_ERROR = 1e-2  # of |U|^2, the bound of what rounding may take; what it takes is less than a thousandth of it
_STRIPS = 4  # that a symmetric product is made in on a CPU: 5/8 of its flops; more would be too thin
_SAFE_PIVOT = 0.5  # Cholesky factors with smaller ones make columns less orthonormal than reflections do
# Cost of an n x n decomposition in units of n^3 flops of a product on the same device: eigh, svd.
# Measured on a CPU; the other line counts what sequential panels cost a device made for products.
_DECOMPOSITION = {"cpu": (30.0, 60.0)}
_DECOMPOSITION_ELSEWHERE = (300.0, 1500.0)
HOST_EIGH = 60.0  # the same for a float64 eigh on the host
_HOST_SVD = 200.0


@dataclass
class Reduced:
    """``M = 2^(exponent + shift) * left core right^T`` on what is kept; None stands for the identity."""

    left: Tensor | None  # (m, p), orthonormal columns
    core: Tensor  # (p, p)
    right: Tensor | None  # (n, p)
    captured: float = 1.0
    shift: int = 0


def formed(given: LinearMap) -> DenseMap:
    """The same map as a matrix."""
    if isinstance(given, DenseMap):
        return given
    result = DenseMap(given.unit_dense())
    result.exponent = result.exponent + given.exponent
    return result


def reduced(given: LinearMap, k: int, width: int, method: str) -> tuple[LinearMap, Reduced]:
    """A core with the k leading triplets, and the map whose exponent it is in.

    method: "svd" (whole), "gram" (by eigenvectors of the smaller Gram matrix, ``width`` >= k of them), "auto": from
    factors where the map has any, small matrices whole, else by Gram.
    """
    if method == "auto":
        factors = given.unit_factors()
        if factors is not None:
            return given, _by_factors(*factors, given, k, width)
    given = formed(given)
    matrix, side = given.unit_dense(), min(given.shape)  # (m, n)
    few = method == "auto" and _few_of_many(given, side, width)
    if method == "gram" or (method == "auto" and (few or side > HOST_CORE)):
        return given, _by_gram(matrix.double() if few and side <= HOST_CORE else matrix, width)
    if side > HOST_CORE:
        return given, Reduced(None, matrix, None)
    matrix = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        left, core = torch.linalg.qr(matrix)
        return given, Reduced(left, core, None)
    if matrix.shape[0] < matrix.shape[1]:
        right, core = torch.linalg.qr(matrix.mT)
        return given, Reduced(None, core.mT, right)
    return given, Reduced(None, matrix, None)


def reduction_cost(given: LinearMap, width: int) -> float:
    """Flops of `reduced` with "auto", in units of those of a product on the map's device."""
    rank, side, length = given.rank_bound, min(given.shape), sum(given.shape)
    eigh, svd = _DECOMPOSITION.get(given.device.type, _DECOMPOSITION_ELSEWHERE)
    by_factors = math.inf
    if rank < side and _few_of_many(given, rank, width):
        wide = rank <= HOST_CORE
        grams = (4.0 if wide else 2.0) * length * rank**2
        by_factors = grams + 8.0 * length * rank * width + (HOST_EIGH if wide else eigh) * rank**3
    elif rank < side:
        by_factors = 8.0 * length * rank**2 + (_HOST_SVD if rank <= HOST_CORE else svd) * rank**3
    if side > HOST_CORE:
        whole = 2.0 * side * side * max(given.shape) + eigh * side**3
    elif _few_of_many(given, side, width):
        whole = 4.0 * side * side * max(given.shape) + HOST_EIGH * side**3
    else:
        whole = 8.0 * side * side * max(given.shape) + _HOST_SVD * side**3
    return min(by_factors, given.dense_flops + whole)


def _few_of_many(given: LinearMap, rank: int, width: int) -> bool:
    """Whether so few of so many directions are wanted that eigenvectors cost less than an SVD of all.

    Those of a Gram matrix in float64 are as exact as float32 tensors; beyond the host's sizes nothing else would end.
    """
    if 2 * width > rank:
        return False
    return rank > HOST_CORE or (rank > SMALL_SIDE and given.dtype == torch.float32 and given.device.type == "cpu")


def _by_factors(left: Tensor, right: Tensor, given: LinearMap, k: int, width: int) -> Reduced:
    """From ``U = L R^T``; where the rank is below k, further columns complete the bases, with value 0."""
    rank = left.shape[1]
    if _few_of_many(given, rank, width):
        wide = rank <= HOST_CORE
        return _by_gram_of_factors(left.double() if wide else left, right.double() if wide else right, width)
    spare = max(0, k - rank)
    (q_left, r_left), (q_right, r_right) = (
        torch.linalg.qr(torch.cat([f, start_block(f.shape[0], spare, given)], dim=1)) for f in (left, right)
    )
    return Reduced(q_left, r_left[:, :rank] @ r_right[:, :rank].mT, q_right)


def _by_gram_of_factors(left: Tensor, right: Tensor, width: int) -> Reduced:
    """The same with no long decomposition but those of the result: ``U U^T = (L C)(L C)^T`` where ``R^T R = C C^T``.

    The eigenvectors W of (L C)^T (L C), of the size of the rank, give the leading left space L C W; what rounding has
    turned it by is second order in what it captures. Its image, orthonormalised, is the right one. Where U is so much
    smaller than |L| |R| that the Gram matrices' rounding could count, the factors are orthonormalised first.
    """
    grams = _symmetric(left.mT, left), _symmetric(right.mT, right)
    rounding = 2 * torch.finfo(left.dtype).eps * float(grams[0].norm() * grams[1].norm())
    if 2 * width**0.5 * rounding > _GRAM_ERROR * float((grams[0] * grams[1]).sum()):  # |U|^2
        return _by_gram_of_triangles(left, right, width)
    factor, info = torch.linalg.cholesky_ex(grams[1])
    if info.item():  # dependent samples: C from the eigenvectors, which always are
        values, vectors = torch.linalg.eigh(grams[1])
        factor = vectors * values.clamp(min=0).sqrt()
    inner = _symmetric(factor.mT, grams[0] @ factor)
    chosen = torch.linalg.eigh(inner).eigenvectors[:, -width:]
    spanning = factor @ chosen
    del grams, factor, inner, chosen  # together larger than a captured tensor, where a growth step is at its peak
    basis = orthonormalised(left @ spanning)[0]  # (m, width)
    image, core = orthonormalised(right @ (left.mT @ basis))
    return Reduced(basis, core.mT, image)


def _by_gram_of_triangles(left: Tensor, right: Tensor, width: int) -> Reduced:
    """The same by ``L = Q R_l``, ``R = P R_r``: eigenvectors W of ``R_l R_r^T``'s Gram matrix; P is never made."""
    packed, scales = torch.geqrf(left)  # Q, as reflections below the diagonal
    rank = left.shape[1]
    r_left = packed[:rank].triu()
    core = r_left @ torch.geqrf(right)[0][:rank].triu().mT
    chosen = torch.linalg.eigh(_symmetric(core, core.mT)).eigenvectors[:, -width:]  # W, (p, r)
    image, core = orthonormalised(right @ (r_left.mT @ chosen))  # U^T Q W
    tall = torch.cat([chosen, chosen.new_zeros(left.shape[0] - rank, width)])
    return Reduced(torch.ormqr(packed, scales, tall), core.mT, image)


def _by_gram(matrix: Tensor, width: int) -> Reduced:
    if matrix.shape[0] <= matrix.shape[1]:
        left = torch.linalg.eigh(_symmetric(matrix, matrix.mT)).eigenvectors[:, -width:]
    else:
        vectors = torch.linalg.eigh(_symmetric(matrix.mT, matrix)).eigenvectors[:, -width:]
        left = orthonormalised(matrix @ vectors)[0]
    right, core = orthonormalised(matrix.mT @ left)
    return Reduced(left, core.mT, right)


def _symmetric(rows: Tensor, columns: Tensor) -> Tensor:
    """``rows columns``, known to be symmetric: (p, q), (q, p) -> (p, p)."""
    size = rows.shape[0]
    if rows.device.type != "cpu" or size < HOST_CORE:
        return rows @ columns
    step = -(-size // _STRIPS)
    result = rows.new_empty(size, size)
    for start in range(0, size, step):
        end = min(start + step, size)
        strip = rows[start:end] @ columns[:, start:]
        result[start:end, start:] = strip
        result[end:, start:end] = strip[:, end - start :].mT
    return result


def orthonormalised(columns: Tensor, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Q, R of columns (m, r) that are nearly orthogonal already, as images of singular vectors are: one small
    Cholesky factor, of the host, in place of r reflections, which still make what is not so.

    gram: ``columns^T columns`` on the host, where it is there; else the device is waited for.
    """
    if gram is None:
        (gram,) = to_host([columns.mT @ columns])
    gram = gram.double()
    norms = gram.diagonal().sqrt()
    factor, info = torch.linalg.cholesky_ex(gram / norms[:, None] / norms)
    if info.item() or not float(factor.diagonal().min()) > _SAFE_PIVOT:
        return torch.linalg.qr(columns)
    identity = torch.eye(len(factor), dtype=factor.dtype)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False).mT / norms[:, None]
    return columns @ inverse.to(columns), (factor.mT * norms).to(columns)


def start_block(rows: int, columns: int, like: LinearMap) -> Tensor:
    """(rows, columns) in (-1, 1), by hashing the indices: the same on every device, no generator touched."""
    row = torch.arange(rows, device=like.device)[:, None] * 0x9E3779B1
    column = torch.arange(columns, device=like.device) * 0x85EBCA77
    mixed = row + column
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0x7FFFFFFF
    return ((mixed ^ (mixed >> 15)) & 0xFFFFFF).to(like.dtype) * 2.0**-23 - 1.0
