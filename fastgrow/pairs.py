"""Signed pairs: GradMax behind a ReLU that cannot be swapped.

With incoming weights w = +-epsilon v the new units see the samples with h . w > 0 only: the growth matrix
is solved again under that mask, for each pair, and the sign that attains more is taken. Batch norms and activations
with an upper end are not the same at every scale, so they are linearised at the w that the units will have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .operators import LinearMap, SumMap
from .replay import Capture, Replay, ReplayMap
from .sites import Site, Sites
from .solve import Directions, solve

__all__ = ["signed_pairs"]


def signed_pairs(
    model: nn.Module,
    sites: Sites,
    site: Site,
    captures: Sequence[Capture],
    weights: Sequence[float],
    plain: Directions,
    size: float,
    *,
    bias: bool = False,
    solver: Callable[..., list[Directions]] = solve,
) -> Directions:
    """The plain directions, each turned to its better sign and its outgoing side solved under its own mask.

    size: the norm of w.
    left: the outgoing direction of each pair; right: the incoming one, signed; values: the norm of the
    gradient that a unit outgoing weight attains there.
    """
    candidates: list[tuple[Tensor, LinearMap]] = []
    for column in plain.right.T:
        for sign in (1.0, -1.0):
            base = sign * size * column
            maps = [
                ReplayMap(Replay(model, sites, site, capture, live=True), weight, bias=bias, base=base)
                for capture, weight in zip(captures, weights, strict=True)
            ]
            candidates.append((sign * column, maps[0] if len(maps) == 1 else SumMap(maps)))
    found = solver([mapping for _, mapping in candidates], 1, names=[site.name] * len(candidates))
    lefts, values, rights = [], [], []
    for pair in range(len(plain.values)):
        options = [2 * pair, 2 * pair + 1]
        best = max(options, key=lambda index: float(found[index].values[0]))
        lefts.append(found[best].left[:, 0])
        values.append(found[best].values[0])
        rights.append(candidates[best][0])
    captured = min(direction.captured for direction in found)
    return Directions(torch.stack(lefts, 1), torch.stack(values), torch.stack(rights, 1), captured)
