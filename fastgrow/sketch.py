"""A growth matrix that is only ever seen through two thin products, which add up over any number of batches.

Single-view sketching: Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 2011, section 5.5;
Tropp, Yurtsever, Udell, Cevher, "Practical sketching algorithms for low-rank matrix approximation", SIMAX 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cores import svd
from .errors import GrowthError
from .operators import LinearMap
from .solve import Directions, solve

__all__ = ["Sketch", "sketch_columns", "sketched_directions"]

_SPARE = 16  # columns beyond twice the rank
_NOISE = 1e-4  # of a column's norm: fills the directions that a batch of low rank leaves open


def sketch_columns(rank: int, granule: int = 1) -> int:
    """Columns r of Y for so many directions; W has 2 r. Products come in granules, so the rest of one is used."""
    return -(-(2 * rank + _SPARE) // granule) * granule


class Sketch:
    """``Y = M Omega`` (m, r) and ``W = M^T Psi^T`` (n, 2r) of ``M = sum_b w_b M_b``, for fixed Omega and Psi.

    Psi is gaussian. Omega is chosen once, by the first batch: the leading left singular vectors of its W, which
    is half a power iteration for no further product. Memory is 3 r (m + n) numbers with Omega and Psi, whatever
    the number of batches, and in each of them one product of r columns and one of 2 r; a matrix of fewer numbers
    than Y and W is added up itself. float32, float64 for float64 maps.

    columns: r. aims: whether the first batch chooses Omega; otherwise it stays gaussian until `aim`.
    """

    def __init__(self, rank: int, *, aims: bool = True, columns: int | None = None) -> None:
        self.rank, self.aims, self.columns = rank, aims, columns
        self.sums: tuple[Tensor, ...] = ()
        self.counted: Tensor | float = 0.0  # samples behind the sums
        self.stale = False  # whether the sums belong to another Omega than `omega`
        self._aimed = False

    def _prepare(self, like: LinearMap) -> None:
        rows, cols = like.shape
        self._like = like.shape, like.dtype, like.device
        r = self.columns or sketch_columns(self.rank, like.granule)
        options = {"dtype": like.dtype, "device": like.device}
        if r * (rows + 2 * cols) >= rows * cols:
            self.sums = (torch.zeros(rows, cols, **options),)  # type: ignore[call-overload]
            return
        generator = torch.Generator().manual_seed(0)
        draw = [torch.randn(*shape, generator=generator, dtype=torch.float32) for shape in ((rows, 2 * r), (cols, r))]
        self.psi, self.omega = (drawn.to(**options) / drawn.shape[1] ** 0.5 for drawn in draw)  # type: ignore[call-overload]
        self.sums = torch.zeros(rows, r, **options), torch.zeros(cols, 2 * r, **options)  # type: ignore[call-overload]

    @property
    def exact(self) -> bool:
        """Whether the matrix itself is added up."""
        return len(self.sums) == 1

    @property
    def settled(self) -> bool:
        """Whether Omega will not change any more."""
        return self.exact or self._aimed

    def parts(self, mapping: LinearMap) -> tuple[Tensor, ...]:
        """One batch's terms of the sums."""
        if not self.sums:
            self._prepare(mapping)
        if (mapping.shape, mapping.dtype, mapping.device) != self._like:
            raise GrowthError(
                f"a growth matrix of {mapping.shape} {mapping.dtype} {mapping.device} came after one of "
                f"{' '.join(map(str, self._like))}: the model changed within one observation; begin a new one"
            )
        if self.exact:
            return (mapping.dense(),)
        into = mapping.rmatmat(self.psi)
        if self.aims and not self._aimed:
            self.aim(into)
        return mapping.matmat(self.omega), into

    def aim(self, into: Tensor) -> None:
        """Choose Omega by W (n, 2r); what it was multiplied with before is forgotten when the next batch is added."""
        norm = torch.linalg.vector_norm(into)
        if not (bool(torch.isfinite(norm)) and float(norm) > 0):
            return
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(into.shape, generator=generator).to(into) * (_NOISE / into.shape[0] ** 0.5)
        vectors, _, _ = svd(into / norm + noise)
        self.omega = vectors[:, : self.omega.shape[1]].contiguous()
        self._aimed, self.stale = True, not self.aims

    def forget(self) -> None:
        """Begin anew with the present Omega."""
        self.stale, self.counted = False, 0.0
        for total in self.sums:
            total.zero_()

    def add(self, parts: Sequence[Tensor], weight: Tensor | float, samples: int, fine: Tensor) -> None:
        """Adds weight * parts where ``fine``, a boolean on their device, says so: no wait for the device."""
        if self.stale:
            self.forget()
        for total, part in zip(self.sums, parts, strict=True):
            total += torch.where(fine, part * weight, 0.0)
        self.counted = self.counted + torch.where(fine, float(samples), 0.0)

    def reduced(self) -> tuple[Tensor, Tensor, float]:
        """Y = Q R, X = the least-squares solution of Psi Q X = W^T: (m, r), (r, n) with M ~ Q X, float64.

        Also the estimate of what the k best directions in Q capture: the part of Psi M that no X explains is a
        sketch S of the rest, ``sum_{i <= k} s_i(X)^2 / sum_{i <= k} s_i([X; S])^2``.
        """
        out, into = (total.double() for total in self.sums)
        basis = torch.linalg.qr(out).Q  # (m, r)
        frame, corner = torch.linalg.qr(self.psi.double().mT @ basis)  # (2r, r), (r, r)
        seen = frame.mT @ into.mT
        found = torch.linalg.solve_triangular(corner, seen, upper=True)  # (r, n)
        rest = into.mT - frame @ seen
        share = frame.shape[0] / (frame.shape[0] - frame.shape[1])
        stacked = torch.cat([found, rest * share**0.5])
        inside, both = (
            float(torch.linalg.eigvalsh((a @ a.mT).cpu())[-self.rank :].clamp(min=0).sum()) for a in (found, stacked)
        )
        return basis, found, inside / both if both > 0 else 1.0


def sketched_directions(sketches: Sequence[Sketch], scales: Sequence[float], names: Sequence[str]) -> list[Directions]:
    """The leading directions of ``scale * M`` for each sketch; `Directions.captured` is an estimate."""
    exact = [at for at, sketch in enumerate(sketches) if sketch.exact]
    found: dict[int, Directions] = dict(
        zip(
            exact,
            solve(
                [sketches[at].sums[0] * scales[at] for at in exact],
                [sketches[at].rank for at in exact],
                names=[names[at] for at in exact],
            ),
            strict=True,
        )
    )
    for at, sketch in enumerate(sketches):
        if at not in found:
            found[at] = _directions(sketch, scales[at])
    return [found[at] for at in range(len(sketches))]


def _directions(sketch: Sketch, scale: float) -> Directions:
    basis, reduced, captured = sketch.reduced()
    right, corner = torch.linalg.qr(reduced.mT)  # X = corner^T right^T
    u, values, v = svd(corner.mT.cpu())
    k = min(sketch.rank, len(values))
    left = basis @ u[:, :k].to(basis.device)
    right = right @ v[:, :k].to(right.device)
    sign = torch.where(left.gather(0, left.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    dtype = sketch.sums[0].dtype
    values = (values[:k] * scale).to(left.device)
    return Directions((left * sign).to(dtype), values.to(dtype), (right * sign).to(dtype), captured)
