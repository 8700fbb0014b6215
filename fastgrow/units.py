"""Per-unit vectors of a site's weights, out of the layers' tensors and back into them.

A unit's vector runs through the site's producers (or consumers) in order: of each, the unit's weights in
the canonical layout, (rows of one unit, in, *kernel) or (out, columns of one unit, *kernel), flattened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .layout import Leaf, Sizes, whole_unit_positions
from .sites import Site, Slot

__all__ = ["gather", "names_of", "scatter_"]

Axes = Mapping[str, Mapping[int, Tensor]]
"""Tensor name -> dimension -> the positions that are meant, where not all of them are."""


def names_of(site: Site, role: str) -> list[str]:
    """The tensors that hold the units' vectors of one role."""
    return [slot.tensor for slot in _slots(site, role)]


def _slots(site: Site, role: str) -> list[Slot]:
    if role == "producer":
        return [site.weight(name, role) for name in site.producers]
    if role == "consumer":
        return [site.weight(name, role) for name in site.consumers]
    return list(site.slots_of(role))


def _parts(
    site: Site, tensors: Mapping[str, Tensor], sizes: Sizes, role: str, units: Tensor, axes: Axes
) -> Iterator[tuple[Tensor, tuple[Tensor, ...], Slot]]:
    """(tensor, grid of the units' entries, where the units lie) of each layer."""
    for slot in _slots(site, role):
        tensor = tensors[slot.tensor]
        chosen = dict(axes.get(slot.tensor, {}))
        chosen[slot.dim] = whole_unit_positions(slot.layout, site.axis, sizes)[units].reshape(-1)
        index = [chosen.get(dim, torch.arange(tensor.shape[dim], device="cpu")) for dim in range(tensor.dim())]
        grid = tuple(
            positions.to(tensor.device).reshape([-1 if at == dim else 1 for at in range(len(index))])
            for dim, positions in enumerate(index)
        )
        yield tensor, grid, slot


def _canonical(piece: Tensor, slot: Slot, count: int) -> Tensor:
    """A layer's entries of some units -> (units, entries of one)."""
    if slot.role == "consumer":
        piece = slot.canonical(piece)  # (out, columns, *kernel)
        return piece.reshape(piece.shape[0], count, -1, *piece.shape[2:]).movedim(1, 0).reshape(count, -1)
    piece = slot.canonical(piece) if slot.role == "producer" else piece.movedim(slot.dim, 0)  # (rows, in, *kernel)
    return piece.reshape(count, -1)


def gather(
    site: Site,
    tensors: Mapping[str, Tensor],
    sizes: Sizes,
    role: str,
    units: Tensor | None = None,
    axes: Axes | None = None,
) -> Tensor:
    """(length, units): the vectors of some units (all by default). role: "producer", "consumer" or "bias"."""
    slots = _slots(site, role)
    if units is None and not axes and all(isinstance(slot.layout, Leaf) for slot in slots):
        whole = [_canonical(tensors[slot.tensor].detach(), slot, sizes[site.axis]) for slot in slots]
        return (torch.cat(whole, 1) if len(whole) > 1 else whole[0]).T
    units = torch.arange(sizes[site.axis], device="cpu") if units is None else units
    if not len(units):
        return gather(site, tensors, sizes, role, torch.zeros(1, dtype=torch.int64, device="cpu"), axes)[:, :0]
    pieces = [
        _canonical(tensor.detach()[grid], slot, len(units))
        for tensor, grid, slot in _parts(site, tensors, sizes, role, units, axes or {})
    ]
    return torch.cat(pieces, 1).T


def scatter_(
    site: Site,
    tensors: Mapping[str, Tensor],
    sizes: Sizes,
    role: str,
    units: Tensor,
    vectors: Tensor,
    axes: Axes | None = None,
) -> None:
    """The inverse of `gather`, in place."""
    offset, count = 0, len(units)
    if not count:
        return
    for tensor, grid, slot in _parts(site, tensors, sizes, role, units, axes or {}):
        shape = list(torch.broadcast_shapes(*[positions.shape for positions in grid]))
        length = math.prod(shape) // count
        piece = vectors[offset : offset + length].T.to(tensor.dtype)  # (units, entries of one)
        offset += length
        if role == "bias":
            rest = [extent for dim, extent in enumerate(shape) if dim != slot.dim]
            piece = piece.reshape(shape[slot.dim], *rest).movedim(0, slot.dim)
        else:
            first, second, *kernel = (shape[dim] for dim in slot.order(len(shape)))
            if role == "consumer":
                piece = piece.reshape(count, first, second // count, *kernel).movedim(1, 0)
            piece = slot.own(piece.reshape(first, second, *kernel))
        with torch.no_grad():
            tensor[grid] = piece
