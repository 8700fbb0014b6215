"""Linear maps against the mixed second derivative of a real two-layer network, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import hypothesis
import pytest
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from tolerances import tolerance
from torch import Tensor
from torch.nn import functional

from fastgrow.errors import GrowthError
from fastgrow.operators import (
    ConvFlattenLinearPair,
    ConvPair,
    DenseMap,
    LinearMap,
    LinearPair,
    ScaledMap,
    SumMap,
    products_in,
)
from fastgrow.ops import ConvGeometry

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass(frozen=True)
class Shape:
    """A convolution of any dimension (`ConvGeometry` is for two)."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        convolution = CONVOLUTIONS[len(self.kernel_size)]
        return convolution(x, weight, bias, self.stride, self.padding, self.dilation)


def mixed_derivative(
    branch: Callable[[Tensor, Tensor], Tensor], base: Tensor, ins: int, outs: int
) -> tuple[Tensor, Tensor]:
    """dL/dz and d^2 L / dw_out dw_in at zero new weights, of a smooth loss of z = base + branch."""
    target = torch.randn_like(base)

    def loss(z: Tensor) -> Tensor:
        return (functional.softplus(z - target) + 0.1 * (z * target) ** 2).sum()

    z = base.clone().requires_grad_()
    (grad_output,) = torch.autograd.grad(loss(z), z)
    incoming = torch.zeros(ins, dtype=base.dtype, requires_grad=True)

    def gradient(outgoing: Tensor) -> Tensor:
        value = loss(base + branch(incoming, outgoing))
        return torch.autograd.grad(value, incoming, create_graph=True)[0]

    matrix = torch.autograd.functional.jacobian(gradient, torch.zeros(outs, dtype=base.dtype))
    return grad_output, matrix.mT


def check(given: LinearMap, expected: Tensor) -> None:
    rows, cols = expected.shape
    bound = 1e-10 * max(1.0, expected.abs().max().item())
    eye = torch.eye(max(rows, cols), dtype=torch.float64)
    assert given.shape == (rows, cols)
    assert (given.matmat(eye[:cols, :cols]) - expected).abs().max() <= bound
    assert (given.rmatmat(eye[:rows, :rows]) - expected.mT).abs().max() <= bound
    assert (given.dense() - expected).abs().max() <= bound
    factors = given.unit_factors()
    if factors is not None:
        assert (factors[0] @ factors[1].mT * 2.0**given.exponent - expected).abs().max() <= bound


@st.composite
def shapes(draw: st.DrawFn, dims: int) -> Shape:
    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(dims))

    return Shape(each(1, 3), each(1, 2), each(0, 2), each(1, 2))


def out_size(shape: Shape, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(sizes, shape.kernel_size, shape.stride, shape.padding, shape.dilation, strict=True)
    )


@pytest.mark.parametrize(("dims", "examples"), [(1, 25), (2, 40), (3, 6)])
def test_conv_pair_is_the_mixed_derivative(dims: int, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @hypothesis.given(st.data())
    def run(data: st.DataObject) -> None:
        producer, consumer = data.draw(shapes(dims)), data.draw(shapes(dims))
        batch, ins, outs = (data.draw(st.integers(1, 3)) for _ in range(3))
        if dims == 3:
            batch = ins = 1
        sizes = tuple(data.draw(st.integers(3, 7 if dims < 3 else 4)) for _ in range(dims))
        bias = data.draw(st.booleans())
        hidden = out_size(producer, sizes)
        assume(min(hidden) >= 1 and min(out_size(consumer, hidden)) >= 1)
        x = torch.randn(batch, ins, *sizes, dtype=torch.float64)
        base = torch.randn(batch, outs, *out_size(consumer, hidden), dtype=torch.float64)
        taps = ins * math.prod(producer.kernel_size)

        def branch(incoming: Tensor, outgoing: Tensor) -> Tensor:
            weight = incoming[:taps].reshape(1, ins, *producer.kernel_size)
            unit = producer.apply(x, weight, incoming[taps:] if bias else None)
            return consumer.apply(unit, outgoing.reshape(outs, 1, *consumer.kernel_size))

        rows = outs * math.prod(consumer.kernel_size)
        grad_output, matrix = mixed_derivative(branch, base, taps + bias, rows)
        check(ConvPair(grad_output, x, producer, consumer, bias=bias), matrix)
        check(ConvPair(grad_output, x, producer, consumer, -0.3, bias), -0.3 * matrix)

    torch.manual_seed(dims)
    run()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_flatten_linear_is_the_mixed_derivative(dims: int, bias: bool) -> None:
    torch.manual_seed(0)
    producer = Shape((3, 2, 1)[:dims], (2, 1, 1)[:dims], (1, 0, 1)[:dims], (1, 2, 1)[:dims])
    x = torch.randn(2, 2, *(5, 4, 2)[:dims], dtype=torch.float64)
    positions = math.prod(out_size(producer, tuple(x.shape[2:])))
    taps = 2 * math.prod(producer.kernel_size)

    def branch(incoming: Tensor, outgoing: Tensor) -> Tensor:
        weight = incoming[:taps].reshape(1, 2, *producer.kernel_size)
        unit = producer.apply(x, weight, incoming[taps:] if bias else None)
        return unit.flatten(1) @ outgoing.reshape(3, positions).mT

    base = torch.randn(2, 3, dtype=torch.float64)
    grad_output, matrix = mixed_derivative(branch, base, taps + bias, 3 * positions)
    check(ConvFlattenLinearPair(grad_output, x, producer, 0.7, bias), 0.7 * matrix)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (3,), (40,), (2, 5), (0,)])
def test_linear_pair_is_the_mixed_derivative(leading: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(*leading, 6, dtype=torch.float64)

    def branch(incoming: Tensor, outgoing: Tensor) -> Tensor:
        unit = x @ incoming[:6] + (incoming[6] if bias else 0.0)
        return unit[..., None] * outgoing

    base = torch.randn(*leading, 7, dtype=torch.float64)
    grad_output, matrix = mixed_derivative(branch, base, 6 + bias, 7)
    check(LinearPair(grad_output, x, 1 / 3, bias), matrix / 3)


def test_two_dimensional_geometry_of_ops_fits() -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    given = ConvPair(grad, x, ConvGeometry(3, padding=1), ConvGeometry(3, stride=2, padding=1), bias=True)
    assert given.shape == (45, 28)
    eye = torch.eye(28)
    assert (given.dense() - given.matmat(eye)).abs().max() <= tolerance(torch.float32, 2 * 64) * 64


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dims", [1, 2])
def test_centred_pair_sees_batch_norm(dims: int, bias: bool) -> None:
    """Mean-free hidden maps: batch norm in training mode, its gamma / sqrt(eps) left to scale."""
    torch.manual_seed(0)
    producer = Shape((3, 2)[:dims], (1, 2)[:dims], (1, 0)[:dims], (1, 1)[:dims])
    consumer = Shape((2, 3)[:dims], (2, 1)[:dims], (1, 1)[:dims], (1, 1)[:dims])
    x = torch.randn(3, 2, *(5, 6)[:dims], dtype=torch.float64)
    hidden = out_size(producer, tuple(x.shape[2:]))
    taps, rows = 2 * math.prod(producer.kernel_size), 3 * math.prod(consumer.kernel_size)

    def branch(incoming: Tensor, outgoing: Tensor) -> Tensor:
        weight = incoming[:taps].reshape(1, 2, *producer.kernel_size)
        unit = producer.apply(x, weight, incoming[taps:] if bias else None)
        return consumer.apply(unit - unit.mean(), outgoing.reshape(3, 1, *consumer.kernel_size))

    base = torch.randn(3, 3, *out_size(consumer, hidden), dtype=torch.float64)
    grad_output, matrix = mixed_derivative(branch, base, taps + bias, rows)
    check(ConvPair(grad_output, x, producer, consumer, 2.0, bias, centred=True), 2.0 * matrix)


def pairs(dtype: torch.dtype) -> list[LinearMap]:
    torch.manual_seed(1)
    geometry = ConvGeometry(3, padding=1)
    x, grad = torch.randn(4, 3, 9, 9).to(dtype), torch.randn(4, 5, 9, 9).to(dtype)
    rows, out = torch.randn(20, 30).to(dtype), torch.randn(20, 25).to(dtype)
    return [
        DenseMap(out),
        LinearPair(out, rows, 0.1, bias=True),
        ConvPair(grad, x, geometry, geometry, bias=True),
        ConvPair(grad, x.to(memory_format=torch.channels_last), geometry, geometry),
        ConvFlattenLinearPair(grad[:, :, 0, 0], x, geometry),
        ScaledMap(LinearPair(out, rows), -3.0),
        SumMap([LinearPair(out, rows, 0.2), LinearPair(out[:7], rows[:7], 1e-4)]),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("which", range(7))
def test_adjoint(which: int, dtype: torch.dtype) -> None:
    given = pairs(dtype)[which]
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    rows, cols = given.shape
    x, y = torch.randn(cols, 4, dtype=accumulated), torch.randn(rows, 4, dtype=accumulated)
    forward, backward = given.matmat(x), given.rmatmat(y)
    assert forward.dtype == backward.dtype == given.dtype == accumulated
    gap = (forward.double() * y.double()).sum() - (x.double() * backward.double()).sum()
    size = forward.double().norm() * y.double().norm()
    assert gap.abs() <= tolerance(accumulated, 400) * size


def test_half_precision_inputs_are_accumulated_in_float32() -> None:
    torch.manual_seed(0)
    grad, x = torch.randn(300, 10).bfloat16(), torch.randn(300, 12).bfloat16()
    exact = grad.double().mT @ x.double()
    error = (LinearPair(grad, x).dense().double() - exact).abs().max()
    assert error <= tolerance(torch.float32, 300) * exact.abs().max()


@pytest.mark.parametrize("power", [-36, -25, 0, 17])
def test_products_keep_their_digits_at_any_scale(power: int) -> None:
    torch.manual_seed(0)
    grad, x = torch.randn(50, 10, dtype=torch.float64), torch.randn(50, 12, dtype=torch.float64)
    small, large = (grad * 10.0**power).float(), (x * 10.0**-power).float()
    exact = small.double().mT @ large.double()
    error = (LinearPair(small, large).dense().double() - exact).abs().max()
    lost = max(0.0, 10.0 ** (-power - 38)) * 10  # digits that denormal inputs never had
    assert error <= (tolerance(torch.float32, 50) + lost) * exact.abs().max()


def test_sums_of_batches_of_very_different_size() -> None:
    torch.manual_seed(0)
    maps = [DenseMap(torch.randn(6, 5, dtype=torch.float64) * 10.0**p) for p in (-300, 0, 8)]
    expected = sum(m.matrix for m in maps)
    assert torch.equal(SumMap(maps[:1]).dense(), maps[0].dense())
    check(SumMap(maps), torch.as_tensor(expected))
    check(ScaledMap(SumMap(maps), 0.0), torch.zeros(6, 5, dtype=torch.float64))


def test_factors_only_where_samples_are_few() -> None:
    few = LinearPair(torch.randn(3, 10), torch.randn(3, 8))
    assert few.unit_factors() is not None
    assert few.rank_bound == 3
    assert LinearPair(torch.randn(9, 10), torch.randn(9, 8)).unit_factors() is None
    assert SumMap([few, few]).rank_bound == 6
    assert SumMap([few, few]).unit_factors() is not None
    assert SumMap([few, few, few]).unit_factors() is None
    assert SumMap([few, DenseMap(torch.randn(10, 8))]).unit_factors() is None


def test_bad_numbers_reach_the_exponent() -> None:
    bad = torch.randn(5, 4)
    bad[2, 1] = math.nan
    for given in (DenseMap(bad), LinearPair(bad, torch.randn(5, 3)), ScaledMap(DenseMap(bad), 2.0)):
        assert not torch.isfinite(given.exponent)
    assert not torch.isfinite(SumMap([DenseMap(torch.randn(5, 4)), DenseMap(bad)]).exponent)
    bad[2, 1] = -math.inf
    assert not torch.isfinite(DenseMap(bad).exponent)


@pytest.mark.parametrize("outside", ["ieee", "tf32"])
@pytest.mark.parametrize("inside", ["float32", "tf32"])
def test_precision_of_products_is_said_and_put_back(inside: str, outside: str) -> None:
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    cuda, wanted = torch.device("cuda"), {"float32": "ieee", "tf32": "tf32"}[inside]
    try:
        products.fp32_precision = convolutions.fp32_precision = outside
        with products_in("float32", cuda), products_in(inside, cuda):
            assert (convolutions.fp32_precision, products.fp32_precision) == (wanted, wanted)
        assert (convolutions.fp32_precision, products.fp32_precision) == (outside, outside)
    finally:
        convolutions.fp32_precision, products.fp32_precision = before


def test_what_is_inherited_stays_inherited() -> None:
    try:
        torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
        with products_in("float32", torch.device("cuda")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
        assert torch.backends.cuda.matmul.fp32_precision == "none"
        assert torch.backends.cudnn.allow_tf32  # the old switch raises where conv and rnn differ
    finally:
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DenseMap(torch.randn(3)), "shape"),
        (lambda: DenseMap(torch.zeros(3, 3, dtype=torch.int64)), "int64"),
        (lambda: LinearPair(torch.randn(3, 2), torch.randn(4, 2)), "leading dimensions"),
        (lambda: LinearPair(torch.randn(3, 2), torch.randn(3, 2), math.nan), "finite"),
        (lambda: SumMap([]), "at least one"),
        (lambda: SumMap([DenseMap(torch.randn(2, 3)), DenseMap(torch.randn(3, 2))]), "one shape"),
        (
            lambda: ConvPair(torch.randn(1, 2, 5, 5), torch.randn(1, 2, 5, 5), ConvGeometry(3), ConvGeometry(3)),
            "does not fit",
        ),
        (
            lambda: ConvPair(torch.randn(1, 2, 5), torch.randn(1, 2, 5, 5), ConvGeometry(7), ConvGeometry(1)),
            "smaller than",
        ),
        (
            lambda: ConvFlattenLinearPair(torch.randn(1, 2), torch.randn(1, 2, 5), Shape((3, 3), (1,), (1,), (1,))),
            "kernel_size",
        ),
        (
            lambda: ConvFlattenLinearPair(torch.randn(2, 2), torch.randn(1, 2, 5, 5), ConvGeometry(3)),
            "flattened",
        ),
    ],
)
def test_misfits_are_refused(make: Callable[[], LinearMap], says: str) -> None:
    with pytest.raises(GrowthError, match=says):
        make()
