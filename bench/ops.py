"""Growth matrices, sums of squares and activation backward passes against what plain torch offers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from fastgrow.kernels import conv_growth_aten
from fastgrow.kernels.geometry import Plan
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

import fastgrow as fg
from fastgrow.ops import ConvGeometry

from .measure import Timing, compare_ops, copies_beyond_cache, peak_bytes
from .rows import Row, Settings

__all__ = ["auxiliary_gradient", "run", "unfolded"]


def unfolded(dz: Tensor, h: Tensor, producer: ConvGeometry, consumer: ConvGeometry) -> Tensor:
    """The exact growth matrix in plain torch: the consumer's weight gradient for the unfolded input."""
    hidden = producer.output_size((h.shape[2], h.shape[3]))
    columns = F.unfold(h, producer.kernel_size, producer.dilation, producer.padding, producer.stride)
    columns = columns.view(h.shape[0], -1, *hidden)
    size = (dz.shape[1], columns.shape[1], *consumer.kernel_size)
    gradient = conv2d_weight(columns, size, dz, consumer.stride, consumer.padding, consumer.dilation)
    return gradient.permute(0, 2, 3, 1).reshape(-1, columns.shape[1])


def auxiliary_gradient(dz: Tensor, h: Tensor, producer: ConvGeometry, consumer: ConvGeometry) -> Tensor:
    """The library's weight gradient of the inexact auxiliary convolution, kernel s1 (k2 - 1) + k1."""
    along = [(producer.along(i), consumer.along(i)) for i in (0, 1)]
    side = [one[1] * (two[0] - 1) + one[0] for one, two in along]
    stride = [one[1] * two[1] for one, two in along]
    padding = [one[1] * two[2] + one[2] for one, two in along]
    return conv2d_weight(h, (dz.shape[1], h.shape[1], *side), dz, stride, padding)


def run(settings: Settings) -> Iterator[Row]:
    convolutions: Any = torch.backends.cudnn
    before = convolutions.conv.fp32_precision
    convolutions.conv.fp32_precision = "ieee"  # the baselines compute what ours computes
    try:
        floors = _Floors(settings)
        yield from floors.rows
        yield from _conv(settings, floors)
        yield from _linear(settings, floors)
        yield from _sums(settings, floors)
        yield from _activation(settings, floors)
    finally:
        convolutions.conv.fp32_precision = before


class _Floors:
    """What the device can do at best: bytes a second of a copy, FLOPs a second of a large matmul; measured once."""

    def __init__(self, settings: Settings) -> None:
        size = 1 << 16 if settings.quick else 1 << 26
        source = _drawn(size, torch.float32, settings.device, 0)
        target = torch.empty_like(source)
        copied = compare_ops({"copy": target.copy_}, [(source,)], settings.device, settings.times(9))["copy"]
        self.bandwidth = 2.0 * source.numel() * source.element_size() / copied.p20 * 1e3
        shape = f"copy of {size} float32"
        self.rows = [settings.row("floor", shape, "none", copied, gb_per_s=self.bandwidth / 1e9)]
        self.rate: dict[torch.dtype, float] = {}
        for dtype in _dtypes(settings):
            timing, flops = _matmul(settings, dtype)
            # float32 by tf32x3 on a GPU: three products for one.
            self.rate[dtype] = flops / timing.p20 * 1e3 / (3 if settings.cuda and dtype == torch.float32 else 1)
            name = str(dtype).removeprefix("torch.")
            self.rows.append(settings.row("floor", f"matmul, {name}", "none", timing, tflops=flops / timing.p20 / 1e9))

    def reached(self, timing: Timing, *, moved: float = 0.0, flops: float = 0.0, dtype: torch.dtype) -> dict[str, Any]:
        """A kernel's roofline: its bytes and FLOPs, and the per cent of the nearer floor that it reaches."""
        at_best = max(moved / self.bandwidth, flops / self.rate[dtype])
        bound = "matmul peak" if flops / self.rate[dtype] >= moved / self.bandwidth else "copy bandwidth"
        return {
            "mbytes": moved / 1e6,
            "gflops": flops / 1e9 if flops else None,
            "per_cent": 100 * at_best / timing.p50 * 1e3,
            "of": bound,
        }


def _dtypes(settings: Settings) -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16] if settings.cuda else [torch.float32]


def _conv(settings: Settings, floors: _Floors) -> Iterator[Row]:
    same = ConvGeometry(3, 1, 1)
    batch = 32
    kinds = [(same, same, size, width) for size, width in ((56, 64), (28, 128), (14, 256), (7, 512))]
    kinds += [
        (ConvGeometry(3, 2, 1), same, 28, 128),
        (ConvGeometry(1), same, 14, 256),
        (same, ConvGeometry(1), 14, 256),
    ]
    if settings.quick:
        batch, kinds = 2, [(same, same, 6, 4), (ConvGeometry(3, 2, 1), same, 7, 4)]
    for producer, consumer, size, width in kinds:
        for dtype in _dtypes(settings):
            yield from _conv_case(settings, floors, producer, consumer, size, width, batch, dtype)


def _conv_case(
    settings: Settings,
    floors: _Floors,
    producer: ConvGeometry,
    consumer: ConvGeometry,
    size: int,
    width: int,
    batch: int,
    dtype: torch.dtype,
) -> Iterator[Row]:
    device = settings.device
    hidden = producer.output_size((size, size))
    out = consumer.output_size(hidden)

    def make(number: int) -> tuple[Tensor, Tensor, ConvGeometry, ConvGeometry]:
        torch.manual_seed(number)
        dz = torch.randn(batch, width, *out, device=device, dtype=dtype)
        h = torch.randn(batch, width, size, size, device=device, dtype=dtype)
        return dz, h, producer, consumer

    inputs = copies_beyond_cache(make, device)
    functions: dict[str, Callable[..., object]] = {
        "ours": fg.ops.conv2d_growth_matrix,
        "unfold + weight gradient": unfolded,
        "weight gradient of the auxiliary conv": auxiliary_gradient,
    }
    timings = compare_ops(functions, inputs, device, settings.times(5))
    k1, k2 = producer.along(0)[0], consumer.along(0)[0]
    name = "bf16" if dtype == torch.bfloat16 else "float32"
    stride = "" if producer.along(0)[1] == 1 else f" stride {producer.along(0)[1]}"
    shape = f"{size}x{size}, {width} channels, b{batch}, {k1}x{k1}{stride} -> {k2}x{k2}, {name}"
    peaks = {label: peak_bytes(partial(f, *inputs[0]), device) for label, f in functions.items()}
    group = "large map" if size >= 28 else "small map"
    # The least that is exact without a border: one product for each distance between two taps.
    along = [(producer.along(i), consumer.along(i)) for i in (0, 1)]
    taps = math.prod(one[1] * (two[0] - 1) + one[0] for one, two in along)
    moved = sum(t.numel() * t.element_size() for t in inputs[0][:2]) + 4.0 * (width * k1 * k2) ** 2
    flops = 2.0 * batch * math.prod(out) * taps * width**2
    more = floors.reached(timings["ours"], moved=moved, flops=flops, dtype=dtype)
    for label in list(functions)[1:]:
        yield settings.row(
            "conv growth matrix",
            shape,
            label,
            timings["ours"],
            timings[label],
            peak=peaks["ours"],
            baseline_peak=peaks[label],
            group=group,
            **more,
        )
    if not settings.cuda:
        yield from _ways(settings, shape, inputs)
    else:
        flops = 2.0 * batch * math.prod(hidden) * (width * k2**2) * (width * k1**2)
        kernel = compare_ops({"ours": lambda *a: fg.ops.conv2d_growth_matrix(*a, backend="triton")}, inputs, device, 9)[
            "ours"
        ]
        reached = flops / kernel.p50 / 1e9
        at_peak = flops / floors.rate[dtype] * 1e3
        yield settings.row("implicit GEMM kernel", shape, "matmul peak", kernel, at_peak, tflops=reached)


def _ways(settings: Settings, shape: str, inputs: Sequence[tuple[Any, ...]]) -> Iterator[Row]:
    """Every way by library calls, beside what the cost model that chooses among them predicts."""
    dz, h, producer, consumer = inputs[0]
    plan = Plan.of(dz.shape, h.shape, producer, consumer)
    predicted = conv_growth_aten.costs(plan)
    functions: dict[str, Callable[..., object]] = {
        way: lambda dz, h, *_, way=way: conv_growth_aten.growth_matrix(dz, h, plan, way) for way in predicted
    }
    timings = compare_ops(functions, inputs, settings.device, settings.times(3))
    chosen = conv_growth_aten.choose(plan)
    for way, cost in predicted.items():
        row = settings.row(
            "conv growth matrix, by way", f"{shape}: {way}", "the way chosen", timings[way], timings[chosen]
        )
        row.more = {"predicted_ms": 1e3 * cost, "chosen": way == chosen}
        yield row


def _matmul(settings: Settings, dtype: torch.dtype) -> tuple[Timing, float]:
    """A large matmul and its FLOPs; on a GPU float32 by tf32."""
    side = 64 if settings.quick else 8192 if settings.cuda else 2048
    products: Any = torch.backends.cuda
    before = products.matmul.fp32_precision
    products.matmul.fp32_precision = "tf32"
    try:
        pair = tuple(torch.randn(side, side, device=settings.device, dtype=dtype) for _ in range(2))
        timing = compare_ops({"matmul": torch.matmul}, [pair], settings.device, settings.times(9))["matmul"]
    finally:
        products.matmul.fp32_precision = before
    return timing, 2.0 * side**3


def _linear(settings: Settings, floors: _Floors) -> Iterator[Row]:
    samples, width = (8, 16) if settings.quick else (512, 2048)

    def make(number: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(number)
        return tuple(torch.randn(samples, width, device=settings.device) for _ in range(2))  # type: ignore[return-value]

    inputs = copies_beyond_cache(make, settings.device)
    timings = compare_ops(
        {"ours": fg.ops.linear_growth_matrix, "matmul": lambda dz, h: dz.mT @ h},
        inputs,
        settings.device,
        settings.times(7),
    )
    yield settings.row(
        "linear growth matrix",
        f"{samples} x {width} -> {width}",
        "one matmul",
        timings["ours"],
        timings["matmul"],
        peak=peak_bytes(lambda: fg.ops.linear_growth_matrix(*inputs[0]), settings.device),
        **floors.reached(
            timings["ours"],
            moved=4.0 * (2 * samples * width + width**2),
            flops=2.0 * samples * width**2,
            dtype=torch.float32,
        ),
    )


def _sums(settings: Settings, floors: _Floors) -> Iterator[Row]:
    device = settings.device
    sizes = [1 << 12] if settings.quick else [1 << 16, 1 << 20, 32 * 64 * 56 * 56]
    if settings.cuda:
        sizes = [1 << 20, 32 * 64 * 56 * 56, 1 << 28]
    for dtype in _dtypes(settings):
        for size in sizes:
            yield from _sum(settings, floors, size, dtype)
    layers = [_drawn(1 << 10 if settings.quick else 1 << 18, torch.float32, device, i) for i in range(20)]
    theirs = "torch._foreach_norm"
    functions: dict[str, Callable[..., object]] = {
        "ours": lambda *tensors: fg.ops.sums_of_squares(tensors),
        theirs: lambda *tensors: torch._foreach_norm(tensors),
    }
    timings = compare_ops(functions, [tuple(layers)], device, settings.times(15))
    shape = f"20 x {layers[0].numel()} elements"
    yield settings.row("sums of squares of 20", shape, theirs, timings["ours"], timings[theirs])


def _sum(settings: Settings, floors: _Floors, size: int, dtype: torch.dtype) -> Iterator[Row]:
    device, norm = settings.device, "torch.linalg.vector_norm"
    inputs = copies_beyond_cache(lambda seed: (_drawn(size, dtype, device, seed),), device)
    functions: dict[str, Callable[..., object]] = {
        "ours": fg.ops.sum_of_squares,
        norm: torch.linalg.vector_norm,
    }
    if settings.cuda:
        functions["copy"] = torch.empty_like(inputs[0][0]).copy_
    timings = compare_ops(functions, inputs, device, settings.times(15))
    shape = f"{size} elements, {str(dtype).removeprefix('torch.')}"
    peak = peak_bytes(partial(fg.ops.sum_of_squares, *inputs[0]), device)
    group = "large" if size >= 1 << 20 else "small"
    more = floors.reached(timings["ours"], moved=float(size * inputs[0][0].element_size()), dtype=dtype)
    yield settings.row("sum of squares", shape, norm, timings["ours"], timings[norm], peak=peak, group=group, **more)
    if "copy" in timings:
        # A copy moves every byte twice, a sum reads it once. Launches hide the bandwidth of small ones.
        group, half = "large" if size >= 1 << 22 else "small", timings["copy"].p50 / 2
        yield settings.row("sum of squares", shape, "copy bandwidth", timings["ours"], half, peak=peak, group=group)


def _drawn(size: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(size, device=device).to(dtype)


def _activation(settings: Settings, floors: _Floors) -> Iterator[Row]:
    """The backward pass of an activation with the sum of squares of its result, fused and in two calls."""
    side = 4 if settings.quick else 56
    plain: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "relu": lambda g, x: torch.ops.aten.threshold_backward(g, x, 0),
        "gelu": lambda g, x: torch.ops.aten.gelu_backward(g, x),
        "silu": lambda g, x: torch.ops.aten.silu_backward(g, x),
    }
    for kind, backward in plain.items():
        for dtype in _dtypes(settings):
            yield from _activation_case(settings, floors, kind, backward, (32, 64, side, side), dtype)


def _activation_case(
    settings: Settings,
    floors: _Floors,
    kind: Any,
    backward: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Iterator[Row]:
    device = settings.device
    inputs = copies_beyond_cache(lambda _: tuple(torch.randn(shape, device=device).to(dtype) for _ in range(2)), device)
    fused = partial(fg.ops.activation_backward, activation=kind)
    functions: dict[str, Callable[..., object]] = {
        "ours": fused,
        "alone": backward,
        "unfused": lambda g, x: torch.linalg.vector_norm(backward(g, x)).square(),
    }
    timings = compare_ops(functions, inputs, device, settings.times(9))
    text = f"{kind}, {'x'.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"
    peak = peak_bytes(partial(fused, *inputs[0]), device)
    moved = 3.0 * inputs[0][0].numel() * inputs[0][0].element_size()
    more = floors.reached(timings["ours"], moved=moved, dtype=dtype)
    for label, name in (("unfused", "backward, then norm"), ("alone", "backward alone")):
        yield settings.row("activation backward + sum", text, name, timings["ours"], timings[label], peak=peak, **more)
