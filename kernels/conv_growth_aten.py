"""The exact convolution growth matrix by ATen calls: three ways, and the cost model that chooses among them.

"offsets": one weight gradient of the auxiliary convolution gives C[o,i,u] for all offsets u at once;
M[(o,a),(i,b)] = C[o,i,u(a,b)] less the positions on the hidden map's zero border (rows + columns - corners).
"cells": one GEMM per segment of offsets (see `geometry`), summed per tap pair: best on tiny maps.
"unfold": im2col of the producer's input, then the consumer's weight gradient: fewest calls, most work.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Axis, Interval, Plan

__all__ = ["Way", "choose", "costs", "growth_matrix"]

Way = Literal["offsets", "cells", "unfold"]

# Measured on two AVX-512 cores in float32; only their ratios matter for the choice.
_CONV_RATE = 2.0e11  # FLOP/s of a weight gradient
_GEMM_RATE = 1.2e11  # FLOP/s of a GEMM of a few hundred rows
_COPY_RATE = 2.5e9  # bytes/s into fresh memory: page faults dominate
_CALL = 8.0e-6  # seconds per ATen call on small tensors


@lru_cache(maxsize=512)
def costs(plan: Plan) -> dict[Way, float]:
    """Predicted seconds of each way on two CPU cores, float32."""
    y, x = plan.y, plan.x
    pair = 2.0 * plan.batch * plan.rows * plan.columns  # FLOPs per position and tap pair
    channels = plan.rows + plan.columns
    matrix = 4.0 * plan.shape[0] * plan.shape[1] / _COPY_RATE

    offsets = pair * y.taps * x.taps * y.out * x.out / _CONV_RATE + matrix + 6 * _CALL
    for thin, wide in ((y, x), (x, y)):
        for _, (start, stop) in _strips(thin):
            size = (stop - start) * wide.out
            offsets += pair * wide.taps * size / _GEMM_RATE + 4 * plan.batch * size * channels / _COPY_RATE
            offsets += 10 * _CALL
        per_slice = plan.rows * plan.columns * wide.consumer[0] * wide.producer[0]
        offsets += len(thin.excluded) * (2 * _CALL + 4 * per_slice / _COPY_RATE)
    offsets += len(y.excluded) * len(x.excluded) * 6 * _CALL

    cells = matrix + 4 * plan.batch * (plan.rows * y.out * x.out + plan.columns * y.input * x.input) / _COPY_RATE
    for row, column in product(y.segments, x.segments):
        size = (row.stop - row.start) * (column.stop - column.start)
        cells += pair * size / _GEMM_RATE + 4 * plan.batch * size * channels / (2 * _COPY_RATE) + 4 * _CALL
    patterns = len(set(y.ranges.values())) * len(set(x.ranges.values()))
    cells += patterns * (2 * _CALL + 4 * plan.rows * plan.columns / _COPY_RATE)

    patches = 4.0 * plan.batch * plan.columns * plan.column_taps * y.hidden * x.hidden
    unfold = pair * plan.row_taps * plan.column_taps * y.out * x.out / _CONV_RATE
    unfold += patches / _COPY_RATE + matrix + 6 * _CALL
    return {"offsets": offsets, "cells": cells, "unfold": unfold}


def choose(plan: Plan) -> Way:
    """The way with the least predicted cost."""
    predicted = costs(plan)
    return min(predicted, key=lambda way: predicted[way])


def growth_matrix(dz: Tensor, h: Tensor, plan: Plan, way: Way | None = None) -> Tensor:
    """M for (N, O, Ho, Wo) and (N, I, H, W) of one float dtype: a new (O kh2 kw2, I kh1 kw1) tensor."""
    if plan.batch == 0 or plan.rows == 0 or plan.columns == 0:
        return dz.new_zeros(plan.shape)
    way = way or choose(plan)
    if way == "offsets":
        return _by_offsets(dz, h, plan)
    return _by_cells(dz, h, plan) if way == "cells" else _by_unfolding(dz, h, plan)


def _weight_gradient(dz: Tensor, h: Tensor, y: tuple[int, int, int, int], x: tuple[int, int, int, int]) -> Tensor:
    """(O, I, ky, kx) weight gradient of a convolution with (kernel, stride, padding, dilation) y and x."""
    weight = h.new_empty(dz.shape[1], h.shape[1], y[0], x[0])
    _, stride, padding, dilation = ([a, b] for a, b in zip(y, x, strict=True))
    mask = [False, True, False]
    return torch.ops.aten.convolution_backward(dz, h, weight, None, stride, padding, dilation, False, [0, 0], 1, mask)[
        1
    ]


def _by_unfolding(dz: Tensor, h: Tensor, plan: Plan) -> Tensor:
    kernel, stride, padding, dilation = zip(plan.y.producer, plan.x.producer, strict=True)
    patches = F.unfold(h, kernel, dilation, padding, stride).unflatten(2, (plan.y.hidden, plan.x.hidden))
    weight = _weight_gradient(dz, patches, plan.y.consumer, plan.x.consumer)  # (O, I kh1 kw1, kh2, kw2)
    return weight.permute(0, 2, 3, 1).reshape(plan.shape)


def _correlation(dz: Tensor, h: Tensor, plan: Plan) -> Tensor:
    """C[o, i, u]: (O, I, taps, taps), every offset, the hidden map's border counted in."""
    axes = (plan.y, plan.x)
    natural = [(a.input + 2 * a.pad - a.grain * (a.taps - 1) - 1) // a.step + 1 for a in axes]
    padding = [a.pad for a in axes]
    if natural != [a.out for a in axes]:
        spans = [a.step * (a.out - 1) + a.grain * (a.taps - 1) + 1 for a in axes]
        ends = [span - a.pad - a.input for span, a in zip(spans, axes, strict=True)]
        h, padding = F.pad(h, (plan.x.pad, ends[1], plan.y.pad, ends[0])), [0, 0]
    y, x = ((a.taps, a.step, p, a.grain) for a, p in zip(axes, padding, strict=True))
    return _weight_gradient(dz, h, y, x)


@lru_cache(maxsize=64)
def _expansion(plan: Plan, device: torch.device) -> Tensor:
    """Where each element of a row block of M, (kh2, kw2, I, kh1, kw1), lies in a row (I, taps, taps) of C."""
    y, x = (
        torch.tensor([[axis.tap(a, b) for b in range(axis.producer[0])] for a in range(axis.consumer[0])], device="cpu")
        for axis in (plan.y, plan.x)
    )
    column = torch.arange(plan.columns, device="cpu")[None, None, :, None, None] * plan.y.taps
    index = (column + y[:, None, None, :, None]) * plan.x.taps + x[None, :, None, None, :]
    return index.reshape(-1).to(device)


def _by_offsets(dz: Tensor, h: Tensor, plan: Plan) -> Tensor:
    y, x = plan.y, plan.x
    correlation = _correlation(dz, h, plan).contiguous().view(plan.rows, -1)
    matrix = correlation.index_select(1, _expansion(plan, dz.device))
    taps = matrix.view(plan.rows, y.consumer[0], x.consumer[0], plan.columns, y.producer[0], x.producer[0])
    for (start, stop), tap, uses in _grouped(y):
        strip = _strip(dz[:, :, start:stop], _rows(h, y, tap, start, stop, dim=2), x)
        for a, b in uses:
            taps[:, a, :, :, b, :] -= _expanded(strip, x)
    turned_dz, turned_h = dz.transpose(2, 3), h.transpose(2, 3)
    for (start, stop), tap, uses in _grouped(x):
        strip = _strip(turned_dz[:, :, start:stop], _rows(turned_h, x, tap, start, stop, dim=2), y)
        for a, b in uses:
            taps[:, :, a, :, :, b] -= _expanded(strip, y)
    for ((y0, y1), y_tap, y_uses), ((x0, x1), x_tap, x_uses) in product(_grouped(y), _grouped(x)):
        patch = _rows(_rows(h, y, y_tap, y0, y1, dim=2), x, x_tap, x0, x1, dim=3)
        corner = torch.einsum("nohw,nihw->oi", dz[:, :, y0:y1, x0:x1], patch)
        for (ay, by), (ax, bx) in product(y_uses, x_uses):
            taps[:, ay, ax, :, by, bx] += corner
    return matrix.view(plan.shape)


def _strips(axis: Axis) -> set[tuple[int, Interval]]:
    return {(axis.tap(a, b), interval) for a, b, interval in axis.excluded}


def _grouped(axis: Axis) -> Iterator[tuple[Interval, int, list[tuple[int, int]]]]:
    """Each distinct piece of border once, with the tap pairs that must lose it."""
    groups: dict[tuple[Interval, int], list[tuple[int, int]]] = {}
    for a, b, interval in axis.excluded:
        groups.setdefault((interval, axis.tap(a, b)), []).append((a, b))
    for (interval, tap), uses in groups.items():
        yield interval, tap, uses


def _rows(h: Tensor, axis: Axis, tap: int, start: int, stop: int, dim: int) -> Tensor:
    """The input positions that the output positions start..stop meet under this offset."""
    first = axis.step * start + axis.shift(tap)
    index = [slice(None)] * h.dim()
    index[dim] = slice(first, first + axis.step * (stop - start - 1) + 1, axis.step)
    return h[tuple(index)]


def _strip(dz: Tensor, h: Tensor, axis: Axis) -> Tensor:
    """Correlation along `axis`, summed over dimension 2: (N, O, r, Wo), (N, I, r, W) -> (taps, O, I).

    With position outermost in memory every offset's operand is a window of one buffer: one bmm, no im2col.
    """
    n, columns, r, size = h.shape
    span = axis.step * (axis.out - 1) + axis.grain * (axis.taps - 1) + 1
    buffer = h.new_zeros(span, r, n, columns)
    stop = min(span, axis.pad + size)
    buffer[axis.pad : stop] = h[..., : max(0, stop - axis.pad)].permute(3, 2, 0, 1)
    place = r * n * columns
    windows = buffer.as_strided(
        (axis.taps, axis.out, r * n, columns), (axis.grain * place, axis.step * place, columns, 1)
    )
    left = dz.permute(1, 3, 2, 0).reshape(dz.shape[1], -1)
    return torch.bmm(left.expand(axis.taps, *left.shape), windows.reshape(axis.taps, -1, columns))


def _expanded(strip: Tensor, axis: Axis) -> Tensor:
    """(taps, O, I) -> (O, a, I, b), a view."""
    _, rows, columns = strip.shape
    block = rows * columns
    a, b = (stride // axis.grain * block for stride in axis.strides)
    return strip.as_strided((rows, axis.consumer[0], columns, axis.producer[0]), (columns, a, 1, b))


def _by_cells(dz: Tensor, h: Tensor, plan: Plan) -> Tensor:
    y, x = plan.y, plan.x
    dz, h = (t.permute(2, 3, 0, 1).contiguous() for t in (dz, h))  # (position, position, N, C)
    blocks = {}
    for (i, row), (j, column) in product(enumerate(y.segments), enumerate(x.segments)):
        left = dz[row.start : row.stop, column.start : column.stop].reshape(-1, plan.rows)
        patch = _rows(h, y, row.tap, row.start, row.stop, dim=0)
        patch = _rows(patch, x, column.tap, column.start, column.stop, dim=1)
        blocks[i, j] = left.T @ patch.reshape(-1, plan.columns)
    y_patterns, x_patterns = (sorted(set(axis.ranges.values())) for axis in (y, x))
    sums = []
    for (y0, y1), (x0, x1) in product(y_patterns, x_patterns):
        parts = [blocks[cell] for cell in product(range(y0, y1), range(x0, x1))]
        sums.append(sum(parts[1:], parts[0]) if parts else dz.new_zeros(plan.rows, plan.columns))
    table = torch.stack(sums, dim=2).view(plan.rows, -1)  # (O, I patterns)
    where = [
        torch.tensor(
            [[patterns.index(axis.ranges[a, b]) for b in range(axis.producer[0])] for a in range(axis.consumer[0])],
            device="cpu",
        )
        for axis, patterns in ((y, y_patterns), (x, x_patterns))
    ]
    pattern = where[0][:, None, None, :, None] * len(x_patterns) + where[1][None, :, None, None, :]
    index = torch.arange(plan.columns, device="cpu")[None, None, :, None, None] * len(sums) + pattern
    return table.index_select(1, index.reshape(-1).to(dz.device)).view(plan.shape)
