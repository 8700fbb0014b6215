from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fastgrow.kernels import conv_growth_aten, reference
from fastgrow.kernels.geometry import Plan
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor, nn

from fastgrow import ops
from fastgrow.errors import GrowthError
from fastgrow.ops import ConvGeometry

sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))
strides = st.tuples(st.integers(1, 3), st.integers(1, 3))
geometries = st.builds(
    ConvGeometry,
    sizes,
    strides,
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
)


def convolve(x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
    return F.conv2d(x, weight, None, g.stride, g.padding, g.dilation)


def probed(h: Tensor, target: Tensor, producer: ConvGeometry, consumer: ConvGeometry) -> tuple[Tensor, Tensor]:
    """(dL/dz, M) of a two-convolution network, M by growing it: one new channel per outgoing basis vector.

    The new incoming weights are zero: the network's function is unchanged and dL/dW_in_new = W_out_new^T M.
    """
    inputs, outputs = h.shape[1], target.shape[1]
    kernel_1, kernel_2 = producer.kernel_size, consumer.kernel_size
    old_in = torch.randn(2, inputs, *kernel_1, dtype=h.dtype)
    old_out = torch.randn(outputs, 2, *kernel_2, dtype=h.dtype)
    taps = kernel_2[0] * kernel_2[1]
    new_in = torch.zeros(outputs * taps, inputs, *kernel_1, dtype=h.dtype, requires_grad=True)
    new_out = torch.eye(outputs * taps, dtype=h.dtype).reshape(-1, outputs, *kernel_2).transpose(0, 1)
    hidden = convolve(h, torch.cat([old_in, new_in]), producer)
    z = convolve(hidden, torch.cat([old_out, new_out], dim=1), consumer)
    loss = torch.log1p((z - target) ** 2).sum()
    dz, matrix = torch.autograd.grad(loss, [z, new_in])
    return dz, matrix.flatten(1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(geometries, geometries, st.tuples(*[st.integers(1, 9)] * 2), st.integers(1, 3))
def test_every_way_is_autograds_gradient(
    producer: ConvGeometry, consumer: ConvGeometry, size: tuple[int, int], batch: int
) -> None:
    hidden = producer.output_size(size)
    out = consumer.output_size(hidden)
    if min(hidden) < 1 or min(out) < 1:
        return
    torch.manual_seed(0)
    h = torch.randn(batch, 2, *size, dtype=torch.float64)
    dz, expected = probed(h, torch.randn(batch, 3, *out, dtype=torch.float64), producer, consumer)
    plan = Plan.of(tuple(dz.shape), tuple(h.shape), producer, consumer)
    for way in ("offsets", "cells", "unfold"):
        matrix = conv_growth_aten.growth_matrix(dz, h, plan, way)
        # one way subtracts the hidden map's border again, which may leave nothing
        partial = (dz.abs().sum() * h.abs().max()).item()
        assert_close(matrix, expected, torch.float64, dz.numel(), scale=partial)
    assert_close(reference.conv2d_growth_matrix(dz, h, producer, consumer), expected, torch.float64, dz.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_conv_dtypes_layouts_and_out(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    geometry = ConvGeometry(3, 1, 1)
    dz, h = torch.randn(4, 6, 8, 8).to(dtype), torch.randn(4, 5, 8, 8).to(dtype)
    expected = reference.conv2d_growth_matrix(dz.double(), h.double(), geometry, geometry)
    wide = torch.promote_types(dtype, torch.float32)
    last = torch.channels_last
    for g, x in [(dz, h), (dz.to(memory_format=last), h.to(memory_format=last)), (dz.mT.contiguous().mT, h)]:
        got = ops.conv2d_growth_matrix(g, x, geometry, geometry)
        assert got.dtype == wide
        assert_close(got, expected, wide, 256)
    out = torch.randn(expected.shape).to(wide)
    before = out.clone()
    assert ops.conv2d_growth_matrix(dz, h, geometry, geometry, out) is out
    assert_close(out, before + expected, wide, 256)


def test_one_dimensional_convolutions() -> None:
    torch.manual_seed(0)
    producer, consumer = nn.Conv1d(3, 4, 5, 2, 1), nn.Conv1d(4, 2, 3, 1, 1, 2)
    h = torch.randn(2, 3, 20)
    dz = torch.randn_like(consumer(producer(h)))
    one, two = ConvGeometry.of(producer), ConvGeometry.of(consumer)
    got = ops.conv2d_growth_matrix(dz, h, one, two)
    expected = reference.conv2d_growth_matrix(dz.double()[:, :, None], h.double()[:, :, None], one, two)
    assert_close(got, expected, torch.float32, dz.shape[-1] * 2)


def test_geometry_of_modules() -> None:
    assert ConvGeometry.of(nn.Conv2d(1, 1, (3, 5), 2, (1, 2), 3)) == ConvGeometry((3, 5), 2, (1, 2), 3)
    assert ConvGeometry.of(nn.Conv2d(1, 1, 3, padding="same")).padding == (1, 1)
    assert ConvGeometry.of(nn.Conv1d(1, 1, 3, padding="valid")).padding == (0, 0)
    for module in (
        nn.Conv2d(1, 1, 2, padding="same"),
        nn.Conv2d(2, 2, 3, groups=2),
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"),
        nn.Conv3d(1, 1, 3),
    ):
        with pytest.raises(GrowthError):
            ConvGeometry.of(module)
    for values in ((0,), (3, 0), (3, 1, -1), (3, 1, 0, 0), (3.0,), ((1, 2, 3),)):
        with pytest.raises(GrowthError, match="ConvGeometry"):
            ConvGeometry(*values)


def test_the_cost_model_picks_the_way() -> None:
    """Orders that were measured on two cores; the model must know them."""

    def plan(channels: int, size: int, one: int, two: int, batch: int = 32) -> Plan:
        shape = (batch, channels, size, size)
        return Plan.of(shape, shape, ConvGeometry(one, 1, one // 2), ConvGeometry(two, 1, two // 2))

    for channels, size in ((64, 32), (64, 28), (64, 8), (256, 7)):
        assert conv_growth_aten.choose(plan(channels, size, 3, 3)) == "offsets"
    assert conv_growth_aten.choose(plan(256, 2, 3, 3)) == "cells"
    assert conv_growth_aten.choose(plan(4, 4, 3, 3, batch=2)) == "unfold"
    predicted = conv_growth_aten.costs(plan(64, 32, 3, 3))
    assert set(predicted) == {"offsets", "cells", "unfold"}
    assert 3 * predicted["offsets"] < predicted["unfold"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(7,), (2, 3, 5), (), (0,)])
def test_linear(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dz, h = torch.randn(*lead, 6).to(dtype), torch.randn(*lead, 4).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = dz.double().reshape(-1, 6).T @ h.double().reshape(-1, 4)
    got = ops.linear_growth_matrix(dz, h)
    assert got.dtype == wide
    assert_close(got, expected, wide, 30)
    out = torch.ones(6, 4, dtype=wide)
    assert ops.linear_growth_matrix(dz, h, out) is out
    assert_close(out, expected + 1, wide, 30)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tf32_only_where_asked() -> None:
    torch.manual_seed(0)
    dz, h = torch.randn(512, 64, device="cuda"), torch.randn(512, 64, device="cuda")
    expected = reference.linear_growth_matrix(dz.double(), h.double())
    torch.set_float32_matmul_precision("high")
    try:
        assert_close(ops.linear_growth_matrix(dz, h), expected, torch.float32, 512)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_results_carry_no_graph() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    conv = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert not ops.sum_of_squares(x).requires_grad
    assert not ops.linear_growth_matrix(x, x).requires_grad
    assert not any(t.requires_grad for t in ops.activation_backward(x, x, "gelu"))
    assert not ops.conv2d_growth_matrix(conv, conv, ConvGeometry(1), ConvGeometry(1)).requires_grad


def test_errors_say_what_was_wanted() -> None:
    g = ConvGeometry(3, 1, 1)
    x = torch.randn(2, 3, 8, 8)
    bad = [
        (lambda: ops.conv2d_growth_matrix(x[:, :, :4], x, g, g), r"wanted \(2, 3, 8, 8\)"),
        (lambda: ops.conv2d_growth_matrix(x[:1], x, g, g), "wanted"),
        (lambda: ops.conv2d_growth_matrix(x, x, ConvGeometry(11), g), "no output"),
        (lambda: ops.conv2d_growth_matrix(x, x, g, 3), "ConvGeometry.of"),
        (lambda: ops.conv2d_growth_matrix(x[0], x[0], g, g), "height 1"),
        (lambda: ops.conv2d_growth_matrix(x, x, g, g, torch.zeros(3, 3)), r"\(27, 27\)"),
        (lambda: ops.conv2d_growth_matrix(x, x, g, g, torch.zeros(27, 27).half()), "float32"),
        (lambda: ops.conv2d_growth_matrix(x, x, g, g, precision="bf16"), "'tf32'"),
        (lambda: ops.conv2d_growth_matrix(x, x.to("meta"), g, g), "meta"),
        (lambda: ops.linear_growth_matrix(x[0], x), "leading dimensions"),
        (lambda: ops.linear_growth_matrix(x, x, backend="triton"), "library GEMM"),
        (lambda: ops.activation_backward(x, x[:1], "relu"), "wanted the same"),
        (lambda: ops.activation_backward(x, x, "softmax"), "'gelu'"),
        (lambda: ops.activation_backward_bias(x, x, "relu", channel_dim=4), "channel_dim=4"),
        (lambda: ops.sum_of_squares(x.long()), "int64"),
        (lambda: ops.sum_of_squares(x, backend="cuda"), "'triton'"),
        (lambda: ops.conv2d_growth_matrix(x.double(), x.double(), g, g, backend="triton"), "float16"),
    ]
    for call, message in bad:
        with pytest.raises(GrowthError, match=message):
            call()


def test_an_explicit_backend_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(GrowthError, match=r"backend='triton' cannot run.*cpu"):
        ops.sum_of_squares(torch.randn(3), backend="triton")


def test_kernels_are_not_importable_as_a_second_package() -> None:
    # transformers looks for a package of this name, and must not trip over ours
    code = "import kernels\nprint('found')\nimport kernels.launch"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=".")
    assert result.stdout.split() == ["found"]
    assert result.returncode != 0
