from __future__ import annotations

import pytest
import torch
from fastgrow.kernels import reference
from fastgrow.kernels.geometry import Plan
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from fastgrow import ops
from fastgrow.ops import ConvGeometry

CASES = {
    "3x3 on 3x3": (2, 5, 7, (6, 5), ConvGeometry(3, 1, 1), ConvGeometry(3, 1, 1)),
    "batch of a whole K step": (32, 3, 20, (4, 3), ConvGeometry(3, 1, 1), ConvGeometry(3, 1, 1)),
    "batch a little short": (30, 4, 3, (3, 4), ConvGeometry(2), ConvGeometry(3, 1, 2)),
    "one of everything": (1, 1, 1, (1, 1), ConvGeometry(1), ConvGeometry(1)),
    "1x1 consumer": (3, 9, 4, (5, 5), ConvGeometry(3, 1, 1), ConvGeometry(1)),
    "1x1 producer": (3, 9, 4, (5, 5), ConvGeometry(1), ConvGeometry(3, 1, 1)),
    "strides": (3, 4, 3, (9, 8), ConvGeometry(3, 2, 1), ConvGeometry(3, 2, 1)),
    "dilations": (2, 3, 3, (9, 9), ConvGeometry(3, 1, 2, 2), ConvGeometry(2, 1, 1, 3)),
    "lopsided": (2, 3, 4, (7, 5), ConvGeometry((1, 4), (2, 1), (0, 3)), ConvGeometry((3, 1), 1, (2, 0))),
    "more than a tile": (2, 130, 66, (2, 2), ConvGeometry(2, 1, 1), ConvGeometry(1)),
    "padding over half the map": (2, 2, 2, (2, 2), ConvGeometry(3, 1, 1), ConvGeometry(5, 1, 2)),
}
# one job for an element and several, one tile and several
ADDED_TO = ("one of everything", "1x1 consumer", "lopsided", "more than a tile")


def draw(
    name: str, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, ConvGeometry, ConvGeometry]:
    n, o, i, size, producer, consumer = CASES[name]
    torch.manual_seed(0)
    out = consumer.output_size(producer.output_size(size))
    dz, h = torch.randn(n, o, *out), torch.randn(n, i, *size)
    return dz.to(device, dtype), h.to(device, dtype), producer, consumer


def length(dz: torch.Tensor) -> int:
    return dz.shape[0] * dz.shape[2] * dz.shape[3]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES]
    + [(name, dtype) for name in ("3x3 on 3x3", "strides") for dtype in (torch.bfloat16, torch.float16)],
)
def test_against_the_formula(name: str, dtype: torch.dtype, device: torch.device) -> None:
    dz, h, producer, consumer = draw(name, dtype, device)
    expected = reference.conv2d_growth_matrix(dz.double(), h.double(), producer, consumer)
    got = ops.conv2d_growth_matrix(dz, h, producer, consumer, backend="triton")
    assert got.dtype == torch.float32
    assert_close(got, expected, torch.float32, length(dz))
    if name not in ADDED_TO or dtype != torch.float32:
        return
    out = torch.randn(expected.shape, device=device)
    before = out.clone()
    same = ops.conv2d_growth_matrix(dz, h, producer, consumer, out=out, backend="triton")
    assert same is out
    assert_close(out, before + expected, torch.float32, length(dz))


def test_every_element_is_written(device: torch.device) -> None:
    from fastgrow.kernels.conv_growth import conv2d_growth_matrix_

    for name in ("padding over half the map", "3x3 on 3x3", "lopsided"):
        dz, h, producer, consumer = draw(name, torch.float32, device)
        expected = reference.conv2d_growth_matrix(dz.double(), h.double(), producer, consumer)
        out = torch.full(expected.shape[::-1], float("nan"), device=device).T
        conv2d_growth_matrix_(dz, h, producer, consumer, out, False, "float32")
        assert_close(out, expected, torch.float32, length(dz))


def test_layouts_and_mixed_dtypes(device: torch.device) -> None:
    dz, h, producer, consumer = draw("lopsided", torch.float32, device)
    expected = reference.conv2d_growth_matrix(dz.double(), h.double(), producer, consumer)
    last = torch.channels_last
    wide = torch.full((dz.shape[0], dz.shape[1] + 2, *dz.shape[2:]), float("nan"), device=device)
    wide[:, 1:-1] = dz
    for g, x in [
        (dz.to(memory_format=last), h.to(memory_format=last)),
        (wide[:, 1:-1], h.to(memory_format=last)),
        (wide.to(memory_format=last)[:, 1:-1], h.transpose(2, 3).contiguous().transpose(2, 3)),
    ]:
        got = ops.conv2d_growth_matrix(g, x, producer, consumer, backend="triton")
        assert_close(got, expected, torch.float32, length(dz))
    half = reference.conv2d_growth_matrix(dz.bfloat16().double(), h.double(), producer, consumer)
    got = ops.conv2d_growth_matrix(dz.bfloat16(), h, producer, consumer, backend="triton")
    assert_close(got, half, torch.float32, length(dz))


def test_empty_tensors(device: torch.device) -> None:
    geometry = ConvGeometry(3, 1, 1)
    for n, o, i in [(0, 2, 3), (2, 0, 3), (2, 3, 0)]:
        dz, h = torch.randn(n, o, 4, 4, device=device), torch.randn(n, i, 4, 4, device=device)
        for backend in ("triton", "torch"):
            got = ops.conv2d_growth_matrix(dz, h, geometry, geometry, backend=backend)
            assert got.shape == (9 * o, 9 * i)
            assert not got.any()


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    dz, h, producer, consumer = draw("batch a little short", torch.float32, device)
    first, second = (ops.conv2d_growth_matrix(dz, h, producer, consumer, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


def test_opcheck(device: torch.device) -> None:
    from fastgrow.kernels import conv_growth  # noqa: F401

    dz, h = torch.randn(2, 3, 3, 3, device=device), torch.randn(2, 5, 3, 3, device=device)
    first, second = [2, 2, 1, 1, 0, 0, 1, 1], [2, 2, 1, 1, 1, 1, 1, 1]
    arguments = (dz, h, first, second, torch.zeros(12, 20, device=device), True, "float32")
    torch.library.opcheck(torch.ops.fastgrow.conv2d_growth_matrix.default, arguments)


sizes = st.tuples(st.integers(1, 3), st.integers(1, 3))
geometries = st.builds(
    ConvGeometry,
    sizes,
    sizes,
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.tuples(*[st.integers(1, 2)] * 2),
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(geometries, geometries, st.tuples(*[st.integers(1, 7)] * 2), st.sampled_from([1, 3, 31]))
def test_any_geometry(producer: ConvGeometry, consumer: ConvGeometry, size: tuple[int, int], batch: int) -> None:
    hidden = producer.output_size(size)
    out = consumer.output_size(hidden)
    if min(hidden) < 1 or min(out) < 1:
        return
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dz, h = torch.randn(batch, 3, *out, device=device), torch.randn(batch, 2, *size, device=device)
    got = ops.conv2d_growth_matrix(dz, h, producer, consumer, backend="triton")
    expected = reference.conv2d_growth_matrix(dz.double(), h.double(), producer, consumer)
    assert_close(got, expected, torch.float32, length(dz))


def test_work_is_one_product_per_offset_not_per_tap_pair() -> None:
    """3 x 3 on 3 x 3: 25 offsets on the whole map, not 81 tap pairs, whatever the size of the map."""
    from fastgrow.kernels.conv_growth import jobs_for, tile_for

    geometry = ConvGeometry(3, 1, 1)
    for size in (4, 8, 56):
        plan = Plan.of((64, 64, size, size), (64, 64, size, size), geometry, geometry)
        tile = tile_for(64, 64, 64, 16)
        jobs = jobs_for(plan, tile)
        assert sum(stop - start for *_, start, stop, _ in jobs.table) <= 25 * 64 * size * size
        assert (len(jobs.starts), jobs.starts[-1]) == (82, len(jobs.lists))
        assert set(jobs.lists) == set(range(len(jobs.table)))


def test_tiles() -> None:
    from fastgrow.kernels.conv_growth import tile_for

    large = tile_for(512, 512, 128, 16)
    assert (large.block_m, large.block_n, large.block_k, large.padded) == (128, 256, 64, 128)
    large = tile_for(512, 512, 128, 32)
    assert (large.block_m, large.block_n, large.block_k) == (128, 128, 16)
    assert tile_for(16, 3, 128, 32).block_m == tile_for(16, 3, 128, 32).block_n == 16
    assert tile_for(64, 64, 32, 16).block_k == 32
    assert tile_for(64, 64, 7, 16).padded == 0
    assert tile_for(64, 64, 500, 16).padded == 512
