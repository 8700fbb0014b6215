"""Growth matrices -> directions: the leading singular triplets of every site, solved together.

Each matrix is reduced by products to a small core; all cores go through one batched SVD. The way there is
chosen by cost: block Krylov where an estimate certifies it, Gram matrices, factors of few samples, or the
plain SVD.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from .arguments import whole
from .cores import fixed_signs, svd, svd_of_cores, to_host
from .errors import GrowthError
from .foresight import FORESEEN_FROM, blocks_left, foreseen, foreseen_cost
from .operators import DenseMap, LinearMap, products_in, scale_by_power
from .reduction import (
    HOST_CORE,
    HOST_EIGH,
    SMALL_SIDE,
    Reduced,
    formed,
    orthonormalised,
    reduced,
    reduction_cost,
    start_block,
)
from .surroundings import set_aside

__all__ = ["Directions", "Method", "solve", "top_directions"]

Method = Literal["auto", "svd", "gram", "subspace"]

_SPARE = 8  # columns beyond k, or a quarter of k: the k-th direction converges by the gap to the value behind them
_SAFE_PIVOT = 1e-3  # CholeskyQR loses (1/pivot)^2 ulps; below this Householder takes over
_TYPICAL_ROUNDS = 3  # of block Krylov on gradients of networks, for choosing a route before it runs
_ROUND = 1e8  # what the host does in a round, of whatever size, in flops of a product on a CPU
_NORM_ERROR = 1e-5  # relative error allowed to a squared Frobenius norm summed in float32
_EARLY_SHARE = 0.6  # of what tol leaves uncaptured, for what residuals alone tell after two rounds
_ROUNDED_ERROR = 2.0**-11  # to the same of rounded images: what tf32 takes from one operand
_ROUNDED_SHARE = 0.75  # of what tol leaves uncaptured, for rounds in tf32; the rest is for what rounding hides


@dataclass(frozen=True, slots=True)
class Directions:
    """The k leading singular triplets ``M ~ left diag(values) right^T``; unpacks as left, values, right.

    left: (m, k) and right: (n, k), orthonormal columns, the largest entry of each left one positive;
    values: (k,), descending; captured: the solver's estimate of ``||left^T M||_F`` over the root of
    ``s_1^2 + ... + s_k^2``, 1.0 where the solution is exact.
    """

    left: Tensor  # (m, k)
    values: Tensor  # (k,)
    right: Tensor  # (n, k)
    captured: float = 1.0

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.left, self.values, self.right))


def top_directions(
    matrices: Sequence[Tensor],
    k: int | Sequence[int],
    method: Method = "auto",
    *,
    names: Sequence[str] | None = None,
    tol: float = 0.999,
) -> list[Directions]:
    """The k leading singular triplets of each matrix, all in one call.

    matrices: (m_i, n_i) each, of any shapes, devices and floating dtypes (half types are solved in
    float32); k: one int, or one per matrix, clipped to min(m_i, n_i).
    method: "svd" (exact), "gram" (eigenvectors of the smaller Gram matrix; values are recomputed as
    ``||M^T u_i||``), "subspace" (block Krylov until the captured norm is estimated >= tol, exact where
    that does not come before the basis fills the space), "auto" (by cost).
    A matrix's result depends on nothing but the matrix, k, method and tol, bit for bit. On GPUs that have tf32,
    "subspace" finds its space with it, and all that is returned in float32 (`fastgrow.operators.base.TF32_ROUNDS`).

    Raises GrowthError for a non-finite or empty matrix (by its name or index) and for k < 1.
    """
    return solve(matrices, k, names=names, tol=tol, method=method)


def solve(
    maps: Sequence[LinearMap | Tensor],
    k: int | Sequence[int],
    *,
    names: Sequence[str] | None = None,
    tol: float = 0.999,
    method: Method = "auto",
) -> list[Directions]:
    """`top_directions` for matrices that need not be formed: `fastgrow.operators`, or tensors.

    With "auto" each map is solved by block Krylov on its products, by its factors where samples are
    few, or as a matrix, whichever costs least; with another method as asked, "svd" and "gram" on the matrix.
    tol: the captured norm to be certified; an estimate, accurate to 0.002.
    """
    if method not in get_args(Method):
        raise GrowthError(f"method {method!r} is unknown; choose one of {', '.join(get_args(Method))}")
    if not 0.0 < tol < 1.0:
        raise GrowthError(f"tol is the captured norm to reach, between 0 and 1; got {tol}")
    if not isinstance(maps, Iterable):
        raise GrowthError(f"top_directions: matrices is a {type(maps).__name__}; a list of tensors is wanted")
    maps = list(maps)
    ranks = _ranks(k, len(maps))
    labels = [f"matrix {i}" for i in range(len(maps))] if names is None else [f"layer {n!r}" for n in names]
    if len(labels) != len(maps):
        raise GrowthError(f"{len(maps)} matrices but {len(labels)} names; one name per matrix is wanted")
    problems = [_Problem(_as_map(m, label), rank, label) for m, rank, label in zip(maps, ranks, labels, strict=True)]
    with ExitStack() as stack, torch.no_grad(), set_aside():
        for device in {p.map.device for p in problems}:
            stack.enter_context(products_in("float32", device))
        _check_finite(problems)
        # A device is waited for by all of its sites at once; on a CPU one basis at a time is in memory.
        elsewhere = [p for p in problems if p.map.device.type != "cpu"]
        for group in (*([p] for p in problems if p.map.device.type == "cpu"), elsewhere):
            _reduce(group, method, tol)
        return _finish(problems)


@dataclass
class _Problem:
    map: LinearMap
    k: int
    label: str
    reduced: Reduced | None = field(default=None, repr=False)
    given: LinearMap = field(init=False)
    exponent: Tensor = field(init=False)  # of the map that it was reduced in

    def __post_init__(self) -> None:
        self.given = self.map
        self.side = min(self.map.shape)
        if self.side == 0:
            raise GrowthError(f"{self.label} is empty: shape {self.map.shape}; it has no directions")
        self.k = min(self.k, self.side)
        # Columns of a Krylov block. Where products come in granules, the rest of one is the spare.
        granule = self.map.granule
        wanted = self.k + max(_SPARE, self.k // 4) if granule == 1 else -(-self.k // granule) * granule
        self.width = min(wanted, self.side)
        self.kept = min(self.k + _SPARE, self.side)  # eigenvectors of a core that is solved whole

    def reduce(self, method: str) -> None:
        """To a core, with no iteration."""
        self.map, self.reduced = reduced(self.map, self.k, self.kept, method)

    def settle(self) -> None:
        """Once reduced: a matrix that was formed for it goes."""
        self.exponent, self.map = self.map.exponent, self.given

    def round_cost(self, basis: int) -> float:
        """Flops of a Krylov round that ends with this many basis columns."""
        rows, cols = self.map.shape
        algebra = 3.0 * (8.0 * rows + 4.0 * cols) * basis * self.width  # float64, and in thin pieces
        host = HOST_EIGH * basis**3 + (_ROUND if self.map.device.type == "cpu" else 0.0)
        return 2.0 * self.width * self.map.column_flops + algebra + host

    def exact_cost(self) -> float:
        """Flops of `reduce` with "auto"."""
        return reduction_cost(self.map, self.kept)


def _as_map(matrix: LinearMap | Tensor, label: str) -> LinearMap:
    if isinstance(matrix, LinearMap):
        return matrix
    if not isinstance(matrix, Tensor) or matrix.dim() != 2:
        seen = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise GrowthError(f"{label} is {seen}; a tensor of shape (m, n) or a LinearMap is wanted")
    if matrix.layout != torch.strided:
        raise GrowthError(f"{label} has layout {matrix.layout}; a strided tensor is wanted: call .to_dense()")
    if matrix.is_meta:
        raise GrowthError(f"{label} is on the meta device and has no values; a tensor that has is wanted")
    return DenseMap(matrix)


def _ranks(k: int | Sequence[int], count: int) -> list[int]:
    ranks = list(k) if isinstance(k, Sequence) else [k] * count
    if len(ranks) != count:
        raise GrowthError(f"{count} matrices but {len(ranks)} ranks; give one k, or one per matrix")
    return [whole("top_directions", "k", rank) for rank in ranks]


def _check_finite(problems: list[_Problem]) -> None:
    exponents = to_host([e if e.device.type == "cpu" else e.double() for e in (p.map.exponent for p in problems)])
    bad = [p.label for p, e in zip(problems, exponents, strict=True) if not math.isfinite(e.item())]
    if bad:
        raise GrowthError(
            f"non-finite values (NaN or inf) in {', '.join(bad)}; the loss has diverged or overflowed: skip "
            "this batch, lower the learning rate, or pass the GradScaler as loss_scale"
        )


def _route(problem: _Problem) -> Method:
    """What "auto" does with a map; a matrix that is cheaper to form than to multiply by is formed here."""
    given, side, width = problem.map, problem.side, problem.width
    if side <= SMALL_SIDE or 3 * width > side:
        return "svd" if side <= HOST_CORE else "auto"
    products = (2 * _TYPICAL_ROUNDS + 1) * width
    rows, cols = given.shape
    formed_cost = given.dense_flops + products * 2.0 * rows * cols
    exact_cost = problem.exact_cost()
    krylov_cost = sum(problem.round_cost(width * (i + 1)) for i in range(_TYPICAL_ROUNDS))
    if exact_cost < krylov_cost:
        return "auto"
    if formed_cost < products * given.column_flops:
        problem.map = formed(given)
    return "subspace"


def _reduce(problems: list[_Problem], method: Method, tol: float) -> None:
    """To cores, those that are iterated in step."""
    iterated: list[_Problem] = []
    for problem in problems:
        route = _route(problem) if method == "auto" else method
        if route == "subspace" and 3 * problem.width <= problem.side:
            iterated.append(problem)
        else:
            problem.reduce(route)
    unlimited = method == "subspace"
    runs = [_Krylov(problem, tol, unlimited, problem.map.may_round) for problem in iterated]
    _iterate(runs)
    refused = [run.problem for run in runs if run.refused]
    again = [_Krylov(problem, tol, unlimited, rounded=False) for problem in refused]
    _iterate(again)
    for run in (*runs, *again):
        if run.certified:
            run.problem.reduced = run.reduced()
        elif run.given_up:
            run.problem.reduce("auto")
    for problem in problems:
        problem.settle()


class _Krylov:
    """Block Krylov on ``M M^T``: basis Q of every product so far, Rayleigh-Ritz on all of it.

    The device multiplies; the small algebra is the host's, in float64: ``T = Q^T M M^T Q`` and the Gram
    matrix of the residual block ``N = (I - Q Q^T) M M^T Q_last``, which is at once a certificate
    (``rho_i = ||N u_i,last||``) and, orthonormalised, the next block. No product is made twice. The other
    certificate is what later rounds are foreseen to reach (`foresight`), with N or before it is made.
    """

    def __init__(self, problem: _Problem, tol: float, unlimited: bool, rounded: bool) -> None:
        self.problem, self.map, self.asked, self.unlimited = problem, problem.map, tol, unlimited
        self.rounded = rounded
        self.tol = 1 - (1 - tol) * _ROUNDED_SHARE if rounded else tol
        self.width, self.rounds = problem.width, 0
        self.next_check = 4  # by the number of products made: two a round, after the first of all
        self.certified = self.given_up = self.refused = False
        self.captured, self.shift = 0.0, 0
        self.history: list[tuple[int, float]] = []  # (products, 1 - estimate^2)
        self.basis = torch.empty(self.map.shape[0], 0, dtype=self.map.dtype, device=self.map.device)
        self.images = torch.empty(self.map.shape[1], 0, dtype=self.map.dtype, device=self.map.device)
        self.ritz = torch.zeros(0, 0, dtype=torch.float64)  # T
        self.spectrum: tuple[Tensor, Tensor] | None = None  # its eigenvalues and vectors, once a look has asked
        self.block = self._matmat(start_block(self.map.shape[1], self.width, self.map))  # (m, r)
        self.total = 0.0  # of the squares of the values found
        self.vectors = self.left = self.image = self.image_gram = torch.empty(0)
        square = self.map.unit_square()
        self.device_square = torch.full_like(self.map.exponent, math.inf) if square is None else square
        self.square = math.inf

    @property
    def active(self) -> bool:
        return not (self.certified or self.given_up)

    def gram(self) -> Tensor:
        """The Gram matrix of the block in float64: (r, r)."""
        wide = self.block.double()
        return wide.mT @ wide

    def multiply(self, gram: Tensor) -> Tensor:
        """Append the orthonormalised block to the basis; the new part of T."""
        fresh = self._orthonormal(gram)
        image = self._scaled(self._rmatmat(fresh))
        self.basis = torch.cat([self.basis, fresh], dim=1)
        self.images = torch.cat([self.images, image], dim=1)
        self.rounds += 1
        return self.images.double().mT @ image.double()  # (s, r)

    def residual(self) -> Tensor:
        """The next block, ``(I - Q Q^T) M M^T Q_last``, and its Gram matrix."""
        if self.rounds:  # none yet: the block is that of a run that starts again
            product = self._matmat(self._scaled(self.images[:, -self.width :]))
            self.block = product - self.basis @ (self.basis.mT @ product)
        return self.gram()

    def _scaled(self, columns: Tensor) -> Tensor:
        return columns * 2.0**-self.shift if self.shift else columns

    def _orthonormal(self, gram: Tensor) -> Tensor:
        """The block made orthonormal, also against the basis: CholeskyQR where safe, else Householder."""
        norms = gram.diagonal().sqrt()
        if self.map.dtype == torch.float32 and bool((norms > 0).all()):
            factor, info = torch.linalg.cholesky_ex(gram / norms[:, None] / norms)
            kept = 1.0
            if self.rounds:
                along = self.ritz[:, -self.width :].norm(dim=0)  # what the projection took away
                kept = float((norms / torch.hypot(norms, along)).min())
            if not info.item() and float(factor.diagonal().min()) * kept > _SAFE_PIVOT:
                identity = torch.eye(self.width, dtype=torch.float64)
                inverse = torch.linalg.solve_triangular(factor, identity, upper=False).mT / norms[:, None]
                fresh = (self.block.double() @ inverse.to(self.map.device)).to(self.map.dtype)
                return fresh - self.basis @ (self.basis.mT @ fresh)
        # Dependent columns: noise of an ulp gives them directions of their own, outside the basis.
        scale = torch.where(norms > 0, norms, 1.0).to(self.map.device, self.map.dtype)
        noise = start_block(self.map.shape[0], self.width, self.map) * torch.finfo(self.map.dtype).eps
        fresh = self.block / scale + noise
        for _ in range(3):
            fresh = torch.linalg.qr(fresh - self.basis @ (self.basis.mT @ fresh)).Q
        return fresh

    def take(self, ritz: Tensor) -> None:
        """Take in the new part of T; certify if that suffices."""
        self.check_finite(ritz)
        basis = ritz.shape[0]
        grown = torch.empty(basis, basis, dtype=torch.float64)
        grown[: self.ritz.shape[0], : self.ritz.shape[0]] = self.ritz
        grown[:, -self.width :] = ritz
        grown[-self.width :, :] = ritz.mT
        self.ritz, self.spectrum = grown, None
        if self.rounds == 1 and self._rescale():
            return
        if self._bounded() or (self._look_is_cheap(basis) and 2 * self.rounds >= self.next_check):
            self._check(2 * self.rounds)

    def _look_is_cheap(self, basis: int) -> bool:
        """Beside the product that it may spare."""
        cost = HOST_EIGH * basis**3 + foreseen_cost(basis, self.width)
        return 2 * cost < self.width * self.map.column_flops

    def judge(self, gram: Tensor) -> None:
        """Take in the Gram matrix of the residual; certify, give up, or go on."""
        self.check_finite(gram)
        if self.rounds == 0:
            return
        # A residual of rounding errors alone: the basis holds the whole range of M.
        noise = 8 * torch.finfo(self.map.dtype).eps * float(self.ritz.diagonal().sum())
        exhausted = float(gram.diagonal().sum()) <= noise**2
        if exhausted or 2 * self.rounds + 1 >= self.next_check:
            self._check(2 * self.rounds + 1, gram, exhausted)
        if self.active and self.ritz.shape[0] + self.width > self.problem.side:
            self.given_up = True

    def check_finite(self, product: Tensor) -> None:
        if not bool(torch.isfinite(product).all()):
            raise GrowthError(f"non-finite values (NaN or inf) in the products of {self.problem.label}")

    def _bounded(self) -> bool:
        """Whether the norm of U alone may prove that too little lies outside the basis."""
        return math.isfinite(self.square) and self._outside() <= (1 - self.tol**2) * self.square

    def _outside(self) -> float:
        """``||U - Q Q^T U||_F^2``, infinite where the norm of U is not known."""
        inside = float(self.ritz.diagonal().sum()) * 4.0**self.shift
        return max(0.0, self.square - inside) + (_ROUNDED_ERROR if self.rounded else _NORM_ERROR) * self.square

    def _rescale(self) -> bool:
        """Where entries cancel, U may be so small that float32 loses its square: start again, larger."""
        size = float(self.ritz.diagonal().max())
        power = math.frexp(math.sqrt(size))[1] if size > 0 else 0
        if self.shift or abs(power) < 30:
            return False
        self.shift, self.rounds = power, 0
        self.basis, self.images, self.ritz = self.basis[:, :0], self.images[:, :0], self.ritz[:0, :0]
        self.block = self._scaled(self._matmat(start_block(self.map.shape[1], self.width, self.map)))
        return True

    def _check(self, products: int, gram: Tensor | None = None, exhausted: bool = False) -> None:
        """Estimate what is captured; gram: of the residual, where it is known already."""
        k = self.problem.k
        if self.spectrum is None:
            self.spectrum = torch.linalg.eigh(self.ritz)
        values, vectors = self.spectrum
        total = float(values.flip(0)[:k].clamp(min=0).sum())
        vectors = vectors.flip(1)[:, :k]
        # What lies outside the basis adds no more than its norm to the best k directions (Ky Fan): a bound.
        captured = 1.0 if exhausted or total == 0 else math.sqrt(total / (total + self._left()))
        estimate = captured if captured >= self.tol else self._estimate(total, vectors, gram)
        if max(captured, estimate) >= self.tol:
            self.certified, self.vectors, self.total = True, vectors, total
            self.captured = max(captured, estimate)
        elif estimate > 0 and products >= self.next_check:
            self._plan_ahead(products, 1 - estimate**2)

    def _left(self) -> float:
        """`_outside`, in the units of T."""
        return self._outside() / 4.0**self.shift

    def _estimate(self, total: float, vectors: Tensor, gram: Tensor | None) -> float:
        """The larger of two estimates, both low on every spectrum tried; 0 before two rounds, or if none is cheap."""
        if self.rounds < 2:
            return 0.0
        estimate, width, basis = 0.0, self.width, self.ritz.shape[0]
        if gram is not None:
            last = vectors[-width:]
            estimate = math.sqrt(total / (total + float(((gram @ last) * last).sum(0).clamp(min=0).sqrt().sum())))
        if self.rounds < FORESEEN_FROM:  # a shelf of nearly equal values below the leading ones is hardly seen yet
            return estimate if estimate >= 1 - (1 - self.tol) * _EARLY_SHARE else min(estimate, self.tol - 1e-12)
        blocks = blocks_left(self.ritz, width, self._left())
        # What it may spare: the product that only certifies, or where that is made already, the next round.
        spared = width * self.map.column_flops if gram is None else self.problem.round_cost(basis + width)
        if estimate < self.tol and 2 * foreseen_cost(basis, width, blocks) < spared:
            reach = float(foreseen(self.ritz, width, self.problem.k, self.problem.side - basis, gram, blocks))
            estimate = max(estimate, math.sqrt(total / max(total, reach)))
        return estimate

    def _plan_ahead(self, products: int, gap: float) -> None:
        """When to check next, from how fast the gap closed; whether that is worth its cost."""
        basis, target = self.ritz.shape[0], 1 - self.tol**2
        ahead = 1 if self._look_is_cheap(basis) else 2
        if self.history and products - self.history[0][0] > 1:
            # Over all looks, a round apart: what is foreseen before a product and after it is not quite alike.
            counted, before = self.history[0]
            rate = math.log(before / gap) / (products - counted) if gap < before else 0.0
            ahead = math.ceil(math.log(gap / target) / rate) if rate > 0 else 2 * self.problem.side
            # Krylov bases converge ever faster: half of the predicted way.
            ahead = max(1, ahead // 2)
            rounds = math.ceil(ahead / 2)
            cost = sum(self.problem.round_cost(basis + (i + 1) * self.width) for i in (0, rounds - 1)) / 2 * rounds
            if not self.unlimited and cost > self.problem.exact_cost():
                self.given_up = True
            ahead = max(1, min(ahead, 2 * ((self.problem.side - basis) // self.width)))
        self.history.append((products, gap))
        self.next_check = products + ahead

    def _matmat(self, columns: Tensor) -> Tensor:
        with self.map.rounded() if self.rounded else nullcontext():
            return self.map.unit_matmat(columns)

    def _rmatmat(self, columns: Tensor) -> Tensor:
        with self.map.rounded() if self.rounded else nullcontext():
            return self.map.unit_rmatmat(columns)

    def finish(self) -> Tensor:
        """The left vectors Y and ``M^T Y``, made once more where products were rounded; the Gram matrix of that."""
        vectors = self.vectors.to(self.map.device, self.map.dtype)
        self.left = self.basis @ vectors
        self.image = self._scaled(self.map.unit_rmatmat(self.left)) if self.rounded else self.images @ vectors
        return self.image.mT @ self.image

    def confirm(self) -> None:
        """Take back the certificate if ``||M^T Y||^2`` in float32 is less than rounded products promised."""
        square = float(self.image_gram.diagonal().double().sum())
        if square < self.total:
            self.captured *= math.sqrt(square / self.total)
        self.certified = self.captured >= self.asked
        self.refused = not self.certified

    def reduced(self) -> Reduced:
        right, core = orthonormalised(self.image, self.image_gram)
        return Reduced(self.left, core.mT, right, self.captured, self.shift)


def _iterate(runs: list[_Krylov]) -> None:
    """All sites in step: one read of the device per product, for all of them together."""
    small = to_host([part for run in runs for part in (run.gram(), run.device_square.double())])
    grams = small[::2]
    for run, square in zip(runs, small[1::2], strict=True):
        run.square = square.item()
    active = runs
    while active:
        for run, ritz in zip(active, to_host([r.multiply(g) for r, g in zip(active, grams, strict=True)]), strict=True):
            run.take(ritz)
        active = [run for run in active if run.active]
        grams = to_host([run.residual() for run in active])
        for run, gram in zip(active, grams, strict=True):
            run.judge(gram)
        grams = [gram for run, gram in zip(active, grams, strict=True) if run.active]
        active = [run for run in active if run.active]
    certified = [run for run in runs if run.certified]
    for run, gram in zip(certified, to_host([run.finish() for run in certified]), strict=True):
        run.check_finite(gram)
        run.image_gram = gram
        if run.rounded:
            run.confirm()


def _finish(problems: list[_Problem]) -> list[Directions]:
    """SVDs of all cores, rotated back."""
    reduced = [p.reduced for p in problems if p.reduced is not None]
    small = [i for i, r in enumerate(reduced) if max(r.core.shape) <= HOST_CORE]
    solved: dict[int, tuple[Tensor, Tensor, Tensor]] = dict(
        zip(small, svd_of_cores(to_host([reduced[i].core.double() for i in small])), strict=True)
    )
    result = []
    for i, (problem, part) in enumerate(zip(problems, reduced, strict=True)):
        if i not in solved:
            solved[i] = svd(part.core)
        left, values, right = (t[..., : problem.k] for t in solved[i])
        left, right = (_rotate(b, t, problem.map) for b, t in ((part.left, left), (part.right, right)))
        sign = fixed_signs(left)
        values = values.to(problem.map.device)
        values = scale_by_power(values, problem.exponent + part.shift).to(problem.map.dtype)
        result.append(Directions(left * sign, values, right * sign, part.captured))
    return result


def _rotate(basis: Tensor | None, vectors: Tensor, like: LinearMap) -> Tensor:
    if basis is None:
        return vectors.to(like.device, like.dtype)
    return (basis @ vectors.to(like.device, basis.dtype)).to(like.dtype)
