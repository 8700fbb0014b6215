"""Where the units of a growing axis lie along one dimension of a tensor.

A dimension is seldom the bare axis: behind a flatten it is channels x height x width, behind ``cat``
several axes one after the other, in a fused qkv weight three times heads x head size. A `Layout` says
which, independent of sizes, so that it stays true while the network grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Concat",
    "Layout",
    "Leaf",
    "Product",
    "Sizes",
    "axes_of",
    "index_map",
    "new_positions",
    "restricted_size",
    "run_start",
    "size",
    "unit_positions",
    "whole_unit_positions",
]

Sizes = Mapping[int, int]
"""Axis number -> its size."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One axis."""

    axis: int


@dataclass(frozen=True, slots=True)
class Product:
    """Axes nested row-major: the last one is contiguous (channels x height x width)."""

    parts: tuple[Layout, ...]


@dataclass(frozen=True, slots=True)
class Concat:
    """Axes one after the other (``torch.cat``, a fused qkv)."""

    parts: tuple[Layout, ...]


Layout = Leaf | Product | Concat


def size(layout: Layout, sizes: Sizes) -> int:
    """Length of a dimension of this layout."""
    match layout:
        case Leaf(axis):
            return sizes[axis]
        case Product(parts):
            return math.prod(size(part, sizes) for part in parts)
        case Concat(parts):
            return sum(size(part, sizes) for part in parts)


def axes_of(layout: Layout) -> Iterator[int]:
    """Every axis of a layout, in order, repeated as often as it occurs."""
    if isinstance(layout, Leaf):
        yield layout.axis
    else:
        for part in layout.parts:
            yield from axes_of(part)


def index_map(layout: Layout, old: Sizes, new: Sizes) -> Tensor:
    """Where each old position of a dimension lies once its axes have grown: (old length,) int64.

    New units are appended at the end of their axis, so an axis inside a product or a concatenation
    gains positions in the middle of the dimension.
    """
    match layout:
        case Leaf(axis):
            if new[axis] < old[axis]:
                raise ValueError(f"axis {axis} would shrink from {old[axis]} to {new[axis]}")
            return torch.arange(old[axis], device="cpu")
        case Product(parts):
            result = torch.zeros(1, dtype=torch.int64, device="cpu")
            for part in parts:
                inner = index_map(part, old, new)
                result = (result[:, None] * size(part, new) + inner[None, :]).reshape(-1)
            return result
        case Concat(parts):
            pieces, offset = [], 0
            for part in parts:
                pieces.append(index_map(part, old, new) + offset)
                offset += size(part, new)
            return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64, device="cpu")


def new_positions(layout: Layout, old: Sizes, new: Sizes) -> Tensor:
    """The positions of the grown dimension that hold no old value, ascending: int64."""
    if isinstance(layout, Leaf):
        return torch.arange(old[layout.axis], new[layout.axis], device="cpu")
    fresh = torch.ones(size(layout, new), dtype=torch.bool, device="cpu")
    fresh[index_map(layout, old, new)] = False
    return fresh.nonzero().squeeze(1)


def run_start(positions: Tensor) -> int | None:
    """The first of positions that follow one another, on the CPU; None for any others, 0 for none."""
    values = positions.numpy()
    if not values.size:
        return 0
    start = int(values[0])
    # As bytes: for runs of a few units numpy's own reductions take thrice the time.
    return start if values.tobytes() == np.arange(start, start + values.size, dtype=values.dtype).tobytes() else None


def restricted_size(layout: Layout, axis: int, sizes: Sizes) -> int:
    """Length of the part of a dimension that belongs to one axis: other pieces of a ``cat`` left out."""
    match layout:
        case Leaf(own):
            return sizes[own]
        case Product(parts):
            return math.prod(restricted_size(part, axis, sizes) for part in parts)
        case Concat(parts):
            carrying = [part for part in parts if axis in axes_of(part)] or parts
            return sum(restricted_size(part, axis, sizes) for part in carrying)


def _unit_labels(layout: Layout, axis: int, sizes: Sizes) -> Tensor:
    """The unit that each position of the restricted dimension belongs to."""
    if axis not in axes_of(layout):
        return torch.full((size(layout, sizes),), -1, device="cpu")
    match layout:
        case Leaf(own):
            return torch.arange(sizes[own], device="cpu")
        case Product(parts):
            labels = torch.full((1,), -1, device="cpu")
            for part in parts:
                inner = _unit_labels(part, axis, sizes)
                labels = torch.maximum(labels[:, None], inner[None, :]).reshape(-1)
            return labels
        case Concat(parts):
            return torch.cat([_unit_labels(part, axis, sizes) for part in parts if axis in axes_of(part)])


def unit_positions(layout: Layout, axis: int, sizes: Sizes) -> Tensor:
    """(units, positions of one unit) int64: where each unit lies in the restricted dimension."""
    if layout == Leaf(axis):
        return torch.arange(sizes[axis], device="cpu")[:, None]
    labels = _unit_labels(layout, axis, sizes)
    order = torch.argsort(labels, stable=True)
    return order.reshape(sizes[axis], -1)


def whole_unit_positions(layout: Layout, axis: int, sizes: Sizes) -> Tensor:
    """(units, positions of one unit) int64: where each unit lies in the whole dimension."""
    if layout == Leaf(axis):
        return torch.arange(sizes[axis], device="cpu")[:, None]
    own = new_positions(layout, {**sizes, axis: 0}, sizes)
    return own[unit_positions(layout, axis, sizes)]
