from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from fastgrow.kernels import reference
from tolerances import assert_close, tolerance
from torch import Tensor

from fastgrow import ops

ACTIVATIONS = get_args(ops.Activation)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    grad, x = torch.randn(shape), 3 * torch.randn(shape)
    flat = x.view(-1)
    edges = torch.tensor([0.0, -0.0, 6.0, 1e-30, -1e-30, 40.0, -40.0])[: len(flat)]
    flat[: len(edges)] = edges
    return grad.to(device, dtype), x.to(device, dtype)


def check(grad: Tensor, x: Tensor, activation: str, got: Tensor, squares: Tensor) -> None:
    expected, _ = reference.activation_backward(grad.double(), x.double(), activation)
    assert (got.shape, got.dtype) == (grad.shape, grad.dtype)
    assert_close(got, expected, got.dtype, 1)
    # the sum is of g as it was stored
    assert_close(squares, reference.sum_of_squares(got.double()), torch.float32, got.numel())


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    grad, x = inputs((3, 5, 4, 7), dtype, device)
    check(grad, x, activation, *ops.activation_backward(grad, x, activation, backend=backend))
    got, squares, sums = ops.activation_backward_bias(grad, x, activation, backend=backend)
    check(grad, x, activation, got, squares)
    assert_close(sums, got.double().sum((0, 2, 3)), torch.float32, got.numel() // 5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_relu1_lets_the_gradient_through_at_zero(backend: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny])
        x, grad = x.to(device, dtype), torch.ones(6, device=device, dtype=dtype)
        relu1, _ = ops.activation_backward(grad, x, "relu1", backend=backend)
        relu, _ = ops.activation_backward(grad, x, "relu", backend=backend)
        assert relu1.tolist() == [1, 1, 1, 0, 1, 0]
        assert relu.tolist() == [0, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "tanh", "relu6", "leaky_relu"])
def test_slopes_are_those_of_autograd(activation: str) -> None:
    functions = {
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "leaky_relu": lambda x: torch.nn.functional.leaky_relu(x, 0.2),
        "relu6": torch.nn.functional.relu6,
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
    }
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(functions[activation](x).sum(), x)
    slope = reference.activation_slope(x.detach(), activation, 0.2)
    torch.testing.assert_close(slope, expected, rtol=1e-13, atol=1e-14)
    got, _ = ops.activation_backward(torch.ones_like(x), x, activation, negative_slope=0.2)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4), (4, 0), (3, 1), (1, 130), (2, 3, 1), (5, 3, 49)])
def test_shapes(shape: tuple[int, ...], device: torch.device) -> None:
    grad, x = inputs(shape, torch.float32, device)
    check(grad, x, "silu", *ops.activation_backward(grad, x, "silu", backend="triton"))
    for channel_dim in range(-len(shape), 0):
        arguments = dict(channel_dim=channel_dim)
        got, squares, sums = ops.activation_backward_bias(grad, x, "silu", backend="triton", **arguments)
        check(grad, x, "silu", got, squares)
        others = [d for d in range(len(shape)) if d != channel_dim % len(shape)]
        wanted = got.double().sum(others) if others else got.double()
        assert_close(sums, wanted, torch.float32, got.numel())


def test_layouts(device: torch.device) -> None:
    grad, x = inputs((4, 6, 5, 8), torch.float32, device)
    last = torch.channels_last
    cases = [
        (grad.to(memory_format=last), x.to(memory_format=last)),
        (grad.to(memory_format=last), x),
        (grad[:, ::2], x[:, ::2]),
        (grad[:, :1].expand(4, 6, 5, 8), x),
        (grad.permute(3, 0, 1, 2), x.permute(3, 0, 1, 2)),
        (grad.bfloat16(), x),
    ]
    for g, y in cases:
        check(g, y, "gelu", *ops.activation_backward(g, y, "gelu", backend="triton"))
        got, squares, sums = ops.activation_backward_bias(g, y, "gelu", backend="triton")
        check(g, y, "gelu", got, squares)
        assert_close(sums, got.double().sum((0, 2, 3)), torch.float32, got.numel() // got.shape[1])


def test_more_partial_sums_than_slots(device: torch.device) -> None:
    from fastgrow.kernels.activation_backward import bias_tiles
    from fastgrow.kernels.sum_of_squares import SLOTS

    for shape in [(64, 4, 1, False), (1, 5000, 9, True), (8, 300000, 1024, False)]:
        block_c, _, splits = bias_tiles(*shape)
        blocks = math.ceil(shape[1] / block_c)
        assert splits == 1 or blocks * splits <= SLOTS
    grad, x = inputs((2, 4 * SLOTS + 12, 1024), torch.bfloat16, torch.device("cpu"))
    assert math.ceil(grad.shape[1] / bias_tiles(2, grad.shape[1], 1024, False)[0]) > SLOTS
    if device.type == "cuda":
        got, squares, _ = ops.activation_backward_bias(grad.to(device), x.to(device), "relu", backend="triton")
        assert_close(squares, got.double().square().sum(), torch.float32, got.numel())


def test_nan_is_not_hidden(device: torch.device) -> None:
    nan = torch.full((4,), float("nan"), device=device)
    one = torch.ones(4, device=device)
    for activation in ("gelu", "silu", "tanh"):
        assert ops.activation_backward(one, nan, activation, backend="triton")[1].isnan()
    assert ops.activation_backward(nan, one, "relu", backend="triton")[1].isnan()


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    grad, x = inputs((7, 33, 50), torch.float32, device)
    first, second = (ops.activation_backward_bias(grad, x, "gelu", backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck(device: torch.device) -> None:
    from fastgrow.kernels import activation_backward  # noqa: F401

    grad, x = inputs((3, 4, 5), torch.float32, device)
    torch.library.opcheck(torch.ops.fastgrow.activation_backward.default, (grad, x, "gelu", 0.01))
    torch.library.opcheck(torch.ops.fastgrow.activation_backward_bias.default, (grad, x, "relu", 1, 0.01))


def test_tolerance_grows_with_the_reduction() -> None:
    assert tolerance(torch.float32, 400) == pytest.approx(20 * tolerance(torch.float32, 1))
    assert tolerance(torch.float32, 0) == tolerance(torch.float32, 1)
