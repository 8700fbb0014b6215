"""Directions against a float64 SVD, over spectra, shapes, scales, methods and maps."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from tolerances import tolerance
from torch import Tensor

from fastgrow import reduction
from fastgrow.errors import GrowthError
from fastgrow.operators import ConvPair, DenseMap, LinearMap, LinearPair, ScaledMap, SumMap
from fastgrow.ops import ConvGeometry
from fastgrow.solve import Directions, Method, solve, top_directions

METHODS: tuple[Method, ...] = ("svd", "gram", "subspace", "auto")


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, unless a test asks for more: on matrices this small a busy machine makes them wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield
    torch.set_num_threads(before)


def spectrum(kind: str, size: int) -> Tensor:
    i = torch.arange(size, dtype=torch.float64)
    match kind:
        case "slow":
            return (1 + i) ** -0.5
        case "power":
            return 1 / (1 + i)
        case "exponential":
            return 0.9**i
        case "steep":
            return 0.3**i
        case "plateau":  # more equal leading values than a block has columns
            return torch.where(i < 60, 1.0, 0.1)
        case "steps":
            return 0.5 ** (i // 12)
        case "outlier":
            return torch.where(i < 1, 1e4, 1.0) * (1 + i) ** -0.25
        case "equal":
            return torch.ones_like(i)
        case "low rank":
            return (i < 5).double() * (6 - i)
        case "zero":
            return torch.zeros_like(i)
        case _:
            raise AssertionError(kind)


KINDS = (
    "gaussian",
    "slow",
    "power",
    "exponential",
    "steep",
    "plateau",
    "steps",
    "outlier",
    "equal",
    "low rank",
    "zero",
)


def matrix_of(kind: str, rows: int, cols: int, seed: int = 0) -> Tensor:
    """(rows, cols) float64 with this spectrum."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(n: int, r: int) -> Tensor:
        return torch.randn(n, r, generator=generator, dtype=torch.float64)

    if kind == "gaussian":
        return gaussian(rows, cols)
    side = min(rows, cols)
    left, right = (torch.linalg.qr(gaussian(n, side)).Q for n in (rows, cols))
    return left * spectrum(kind, side) @ right.mT


def check(found: Directions, matrix: Tensor, k: int, tol: float = 0.999) -> float:
    """Captured norm, orthonormality, values, order and signs; returns the true captured norm."""
    exact = matrix.double()
    values = torch.linalg.svdvals(exact)
    k = min(k, values.numel())
    dtype = found.left.dtype
    assert found.left.shape == (matrix.shape[0], k)
    assert found.right.shape == (matrix.shape[1], k)
    assert found.values.shape == (k,)
    left, mine, right = (t.double() for t in found)
    bound = tolerance(dtype, max(matrix.shape))
    for side in (left, right):
        assert (side.mT @ side - torch.eye(k, dtype=torch.float64)).abs().max() <= bound
    assert bool((mine >= 0).all())
    assert bool((mine.diff() <= 0).all())
    assert bool((left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all())
    # M^T u = s v holds for exact triplets of M restricted to the directions, whatever they captured.
    assert (exact.mT @ left - right * mine).norm(dim=0).max() <= bound * values[0]
    best = values[:k].square().sum().sqrt()
    true = float((left.mT @ exact).norm() / best) if best > 0 else 1.0
    assert true >= tol
    assert found.captured >= tol
    assert found.captured <= true + 0.002
    return true


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_spectrum_is_captured(kind: str, method: Method) -> None:
    shapes_and_ranks = [((220, 220), 14), ((300, 180), 5), ((170, 400), 20), ((40, 30), 4), ((7, 90), 7)]
    matrices = [matrix_of(kind, *shape, seed=i) for i, (shape, _) in enumerate(shapes_and_ranks)]
    ranks = [k for _, k in shapes_and_ranks]
    for matrix, k, found in zip(
        matrices, ranks, top_directions([m.float() for m in matrices], ranks, method), strict=True
    ):
        check(found, matrix.float(), k)
        if method == "svd":
            exact = torch.linalg.svdvals(matrix.float().double())
            assert (found.values.double() - exact[:k]).abs().max() <= tolerance(torch.float32, 1) * exact[0]
            assert found.captured == 1.0


@pytest.mark.parametrize("kind", ["gaussian", "power", "plateau", "outlier"])
@pytest.mark.parametrize("k", [4, 16, 60])
def test_larger_matrices_and_the_estimate(kind: str, k: int) -> None:
    matrix = matrix_of(kind, 640, 512).float()
    for method in ("subspace", "auto"):
        found = top_directions([matrix], k, method)[0]
        check(found, matrix, k)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, method: Method) -> None:
    matrix = matrix_of("power", 200, 150).to(dtype)
    found = top_directions([matrix], 6, method)[0]
    assert found.left.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(found, matrix, 6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["power", "low rank"])
@pytest.mark.parametrize("power", [-100, 60, 100])
def test_a_power_of_two_moves_nothing(kind: str, power: int, method: Method) -> None:
    matrix = matrix_of(kind, 160, 200).float()
    matrix /= matrix.abs().max()
    matrix[matrix.abs() < 2.0**-12] = 0.0  # no scaled entry becomes denormal: float32 would round it
    plain, scaled = (top_directions([m], 5, method)[0] for m in (matrix, matrix * 2.0**power))
    assert torch.equal(plain.values * 2.0**power, scaled.values)
    assert torch.equal(plain.left, scaled.left)
    assert torch.equal(plain.right, scaled.right)
    assert plain.captured == scaled.captured
    check(plain, matrix, 5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e30, 1e37])
def test_any_units_of_the_loss(scale: float, method: Method) -> None:
    matrix = (matrix_of("slow", 190, 150) * scale).float()
    found = top_directions([matrix], 8, method)[0]
    check(Directions(found.left, found.values / scale, found.right, found.captured), matrix.double() / scale, 8)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_a_result_does_not_depend_on_what_shares_the_call(method: Method) -> None:
    shapes = [(150, 130), (90, 210), (150, 130), (33, 21), (300, 120), (65, 64)]
    kinds = ["power", "gaussian", "exponential", "slow", "low rank", "equal"]
    ranks = [5, 9, 3, 4, 7, 5]
    matrices = [matrix_of(kind, *shape, seed=7).float() for kind, shape in zip(kinds, shapes, strict=True)]
    together = top_directions(matrices, ranks, method)
    backwards = top_directions(matrices[::-1], ranks[::-1], method)[::-1]
    for matrix, k, one, other in zip(matrices, ranks, together, backwards, strict=True):
        alone = top_directions([matrix], k, method)[0]
        for a, b, c in zip(alone, one, other, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
        assert alone.captured == one.captured == other.captured


def test_signs_follow_the_matrix_and_nothing_random_is_touched() -> None:
    matrix = matrix_of("exponential", 120, 140).float()
    state = torch.get_rng_state()
    for method in METHODS:
        plain, flipped = (top_directions([m], 6, method)[0] for m in (matrix, -matrix))
        assert (plain.left - flipped.left).abs().max() <= tolerance(torch.float32, 140)
        assert (plain.right + flipped.right).abs().max() <= tolerance(torch.float32, 140)
    assert torch.equal(state, torch.get_rng_state())


def test_unpacks_and_clips() -> None:
    matrix = torch.randn(6, 4)
    left, values, right = top_directions([matrix], 100)[0]
    assert (left * values @ right.mT - matrix).abs().max() <= tolerance(torch.float32, 6) * matrix.norm()
    assert top_directions([], 3) == []


@pytest.mark.parametrize("sides", [(1, 1), (1, 9), (9, 1), (2, 2), (500, 1), (500, 3)])
@pytest.mark.parametrize("method", METHODS)
def test_thin_matrices(sides: tuple[int, int], method: Method) -> None:
    matrix = torch.randn(sides, generator=torch.Generator().manual_seed(0))
    check(top_directions([matrix], 3, method)[0], matrix, 3)


def test_strides_and_gradients_do_not_matter() -> None:
    matrix = matrix_of("power", 150, 180).float()
    for seen in (
        matrix.mT.contiguous().mT,
        matrix.clone().requires_grad_(),
        torch.stack([matrix] * 2, 2)[..., 1],
    ):
        found = top_directions([seen], 5)[0]
        check(found, matrix, 5)
        assert not found.left.requires_grad


def test_the_matrix_is_left_alone() -> None:
    matrix = matrix_of("power", 150, 180).float()
    before = matrix.clone()
    for method in METHODS:
        top_directions([matrix], 5, method)
    assert torch.equal(matrix, before)


def maps() -> dict[str, LinearMap]:
    torch.manual_seed(3)
    decay = 1 / torch.arange(1, 401).sqrt()
    x, grad = torch.randn(600, 400) * decay, torch.randn(600, 300)
    images, out = torch.randn(6, 24, 10, 10).relu(), torch.randn(6, 24, 5, 5) * 1e-7
    few = [LinearPair(torch.randn(12, 300), torch.randn(12, 400), 0.1) for _ in range(3)]
    return {
        "linear": LinearPair(grad, x, 1e-3, bias=True),
        "few samples": LinearPair(grad[:20] * 1e-6, x[:20], bias=True),
        "some samples": LinearPair(grad[:280], x[:280]),
        "conv": ConvPair(out, images, ConvGeometry(3, padding=1), ConvGeometry(3, 2, 1), bias=True),
        "batches": SumMap([ScaledMap(m, share) for m, share in zip(few, (0.5, 0.3, 0.2), strict=True)]),
        "many batches": SumMap([LinearPair(grad[i::3], x[i::3]) for i in range(3)]),
        "dense": DenseMap(grad.mT @ x),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [3, 24])
def test_maps_are_solved_like_the_matrices_they_stand_for(k: int, method: Method) -> None:
    chosen = maps()
    for (_, given), found in zip(
        chosen.items(), solve(list(chosen.values()), k, names=list(chosen), method=method), strict=True
    ):
        scale = 2.0 ** float(given.exponent)
        check(
            Directions(found.left, found.values / scale, found.right, found.captured),
            given.dense().double() / scale,
            k,
        )


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_maps_do_not_depend_on_what_shares_the_call() -> None:
    chosen = list(maps().values())
    for given, found in zip(chosen, solve(chosen, 6), strict=True):
        alone = solve([given], 6)[0]
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_few_samples_are_exact() -> None:
    given = maps()["few samples"]
    found = solve([given], 20)[0]
    assert found.captured == 1.0
    exact = torch.linalg.svdvals(given.dense().double())
    assert (found.values.double() - exact[:20]).abs().max() <= tolerance(torch.float32, 400) * exact[0]


@pytest.mark.parametrize("kind", ["independent", "repeated", "silent", "many scales"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_of_many_samples_directions(kind: str, dtype: torch.dtype) -> None:
    """More samples than a core on the host may have: by Gram matrices of the factors."""
    torch.manual_seed(0)
    grad, x = torch.randn(320, 400, dtype=dtype), torch.randn(320, 450, dtype=dtype)
    if kind == "repeated":
        grad[160:], x[160:] = grad[:160], x[:160]
    if kind == "silent":
        grad[40:], x[300:] = 0, 0
    if kind == "many scales":
        grad *= torch.logspace(0, -4, 320, dtype=dtype)[:, None]
    found = solve([LinearPair(grad, x)], 60)[0]
    matrix = grad.double().mT @ x.double()
    values = torch.linalg.svdvals(matrix)
    best = values[:60].square().sum().sqrt()
    slack = tolerance(dtype, 320)
    for basis, inside in ((found.left, found.left.double().mT @ matrix), (found.right, matrix @ found.right.double())):
        eye = torch.eye(60, dtype=torch.float64)
        assert (basis.double().mT @ basis.double() - eye).abs().max() <= slack
        assert torch.linalg.matrix_norm(inside) >= (1 - slack) * best
    assert (found.values.double() - values[:60]).abs().max() <= slack * values[0]
    assert found.captured == 1.0


def test_samples_that_cancel_are_not_solved_by_gram_matrices_of_float32() -> None:
    """Where |M| is far below |D| |H| the squares of M lie below the rounding of the factors' squares."""
    torch.manual_seed(0)
    grad, x = torch.randn(512, 600), torch.randn(512, 640)
    grad[256:] *= 1e-4
    x[:256] *= 1e-4
    mixed = torch.linalg.qr(torch.randn(512, 512)).Q  # every sample takes part: M is a sum of terms 1e4 times larger
    grad, x = mixed @ grad, mixed @ x
    matrix = grad.double().mT @ x.double()
    best = torch.linalg.svdvals(matrix)[:60].square().sum().sqrt()

    def captured() -> float:
        found = reduction.reduced(LinearPair(grad, x), 60, 68, "auto")[1]
        left = found.left @ torch.linalg.svd(found.core).U[:, :60]
        return float(torch.linalg.matrix_norm(left.double().mT @ matrix) / best)

    assert captured() >= 0.9999
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "_GRAM_ERROR", math.inf)
        assert captured() < 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_much_smaller_than_its_factors(dtype: torch.dtype) -> None:
    """Large gradients meet small inputs: every product is far below what the factors' scale promises."""
    torch.manual_seed(0)
    grad, x = torch.randn(300, 200, dtype=dtype), torch.randn(300, 220, dtype=dtype)
    grad[0], x[0] = 1e15, 0.0
    grad[1:] *= 1e-15
    x[1:] *= torch.logspace(0, -3, 220, dtype=dtype)
    exact = grad[1:].double().mT @ x[1:].double()
    for method in METHODS:
        found = solve([LinearPair(grad, x)], 6, method=method)[0]
        check(Directions(found.left, found.values * 1e15, found.right, found.captured), exact * 1e15, 6)


class _Broken(DenseMap):
    def unit_matmat(self, columns: Tensor) -> Tensor:
        return super().unit_matmat(columns) * math.inf


def test_what_is_not_finite_is_named() -> None:
    good, bad = torch.randn(4, 5), torch.randn(30, 20)
    for value in (math.nan, math.inf, -math.inf):
        bad[3, 4] = value
        with pytest.raises(GrowthError, match=r"matrix 1\b"):
            top_directions([good, bad], 2)
        with pytest.raises(GrowthError, match="'conv2'"):
            top_directions([good, bad], 2, names=["conv1", "conv2"])
    with pytest.raises(GrowthError, match="'fc'"):
        solve([_Broken(torch.randn(100, 100))], 2, names=["fc"], method="subspace")


@pytest.mark.parametrize(
    ("k", "says"), [(0, "at least 1"), (-2, "at least 1"), (True, "at least 1"), ([1, 2, 3], "3 ranks")]
)
def test_bad_ranks(k: int | list[int], says: str) -> None:
    with pytest.raises(GrowthError, match=says):
        top_directions([torch.randn(4, 4)] * 2, k)


def test_bad_arguments() -> None:
    matrix = torch.randn(4, 4)
    with pytest.raises(GrowthError, match="'lobpcg' is unknown"):
        top_directions([matrix], 2, "lobpcg")  # type: ignore[arg-type]
    with pytest.raises(GrowthError, match="1 matrices but 2 names"):
        top_directions([matrix], 2, names=["a", "b"])
    with pytest.raises(GrowthError, match=r"\(4,\)"):
        top_directions([matrix[0]], 2)
    with pytest.raises(GrowthError, match="empty"):
        top_directions([matrix[:0]], 2)
    with pytest.raises(GrowthError, match="int64"):
        top_directions([matrix.long()], 2)
    with pytest.raises(GrowthError, match="tol"):
        top_directions([matrix], 2, tol=1.0)
