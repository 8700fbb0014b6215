"""Spectra that mislead: many nearly equal values behind the leading ones, and decompositions that do not converge."""

from __future__ import annotations

import pytest
import torch
from tolerances import tolerance
from torch import Tensor

from fastgrow import cores
from fastgrow.cores import svd, svd_of_cores
from fastgrow.solve import Method, top_directions

pytestmark = pytest.mark.usefixtures("one_thread")


def shelved(rows: int, cols: int, tops: int, shelf: int, gap: float, tail: float) -> tuple[Tensor, Tensor]:
    """(rows, cols) float64: ``tops`` values of 1, ``shelf`` of 1 - gap, the rest ``tail``; and the values."""
    generator = torch.Generator().manual_seed(0)
    side = min(rows, cols)
    left, right = (
        torch.linalg.qr(torch.randn(n, side, generator=generator, dtype=torch.float64)).Q for n in (rows, cols)
    )
    i = torch.arange(side)
    values = torch.where(i < tops, 1.0, torch.where(i < tops + shelf, 1.0 - gap, tail)).double()
    return left * values @ right.mT, values


def true_captured(left: Tensor, matrix: Tensor, values: Tensor) -> float:
    return float((left.double().mT @ matrix).norm() / values[: left.shape[1]].norm())


@pytest.mark.parametrize("method", ["auto", "subspace"])
@pytest.mark.parametrize(
    ("k", "tops", "shelf", "gap", "tail"),
    [
        (4, 4, 24, 0.05, 0.01),
        (16, 9, 80, 0.05, 0.1),
        (16, 16, 96, 0.02, 0.3),
        (4, 4, 12, 0.05, 0.1),
        (2, 2, 10, 0.2, 0.1),
    ],
)
def test_a_shelf_is_told_from_a_tail(k: int, tops: int, shelf: int, gap: float, tail: float, method: Method) -> None:
    matrix, values = shelved(500, 400, tops, shelf, gap, tail)
    (found,) = top_directions([matrix.float()], k, method)
    true = true_captured(found.left, matrix, values)
    assert true >= 0.999
    assert found.captured <= true + 0.002


@pytest.mark.parametrize(("k", "gap"), [(16, 0.003), (24, 0.003), (24, 0.002), (16, 0.0015)])
def test_where_the_shelf_is_all_but_as_high_the_estimate_is_right_to_two_thousandths(k: int, gap: float) -> None:
    matrix, values = shelved(300, 300, k, 6 * k, gap, 0.01)
    (found,) = top_directions([matrix.float()], k)
    true = true_captured(found.left, matrix, values)
    assert true >= 0.9985
    assert found.captured <= true + 0.002


def check_triplets(found: tuple[Tensor, Tensor, Tensor], matrix: Tensor) -> None:
    left, values, right = found
    side = min(matrix.shape)
    bound = tolerance(torch.float64, side) * float(values[0])
    assert (left * values @ right.mT - matrix).abs().max() <= bound
    for vectors in (left, right):
        assert (vectors.mT @ vectors - torch.eye(side, dtype=torch.float64)).abs().max() <= bound


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)])
@pytest.mark.parametrize("failures", [1, 2])
def test_a_decomposition_that_does_not_converge_is_made_another_way(
    shape: tuple[int, int], failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, left = torch.linalg.svd, [failures]

    def failing(*args: object, **options: object) -> object:
        if left[0]:
            left[0] -= 1
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return plain(*args, **options)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    found = svd(matrix)
    monkeypatch.undo()
    assert left == [0]
    check_triplets(found, matrix)
    assert torch.allclose(found[1], torch.linalg.svdvals(matrix))


def test_a_core_that_does_not_converge_leaves_the_others_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    several = [torch.randn(16, 16, generator=generator, dtype=torch.float64) for _ in range(3)]
    expected = svd_of_cores(several)
    plain, bad = torch.linalg.svd, several[1]

    def failing(matrix: Tensor, **options: object) -> object:
        if matrix.dim() > 2 or torch.equal(matrix, bad):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return plain(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    found = svd_of_cores(several)
    monkeypatch.undo()
    for at in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(found[at], expected[at], strict=True))
    check_triplets(found[1], bad)


def test_values_that_the_gram_matrix_loses_keep_orthonormal_vectors() -> None:
    matrix, _ = shelved(30, 20, 3, 0, 0.0, 0.0)
    left, values, right = cores._svd_by_gram(matrix.mT)
    assert (left.mT @ left - torch.eye(20, dtype=torch.float64)).abs().max() <= tolerance(torch.float64, 20)
    assert (right.mT @ right - torch.eye(20, dtype=torch.float64)).abs().max() <= tolerance(torch.float64, 20)
    assert torch.allclose(values, torch.tensor([1.0] * 3 + [0.0] * 17, dtype=torch.float64), atol=1e-7)
