"""Signed pairs: GradMax behind a ReLU that cannot be swapped.

With incoming weights w = +-epsilon v the new units see the samples with h . w > 0 only: the growth matrix
is solved again under that mask, for each pair, and the sign that attains more is taken. Batch norms and activations
with an upper end are not the same at every scale, so they are linearised at the w that the units will have.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .operators import LinearMap
from .site_data import SiteData, summed
from .solve import Directions, solve

__all__ = ["signed_pairs"]


def signed_pairs(
    data: SiteData, plain: Directions, size: Tensor | float, *, solver: Callable[..., list[Directions]] = solve
) -> Directions:
    """The plain directions, each turned to its better sign and its outgoing side solved under its own mask.

    size: the norm of w.
    left: the outgoing direction of each pair; right: the incoming one, signed; values: the norm of the
    gradient that a unit outgoing weight attains there.
    """
    candidates: list[tuple[Tensor, LinearMap]] = []
    for column in plain.right.T:
        for sign in (1.0, -1.0):
            candidates.append((sign * column, summed(data.maps(sign * size * column, live=True))))
    found = solver([mapping for _, mapping in candidates], 1, names=[data.site.name] * len(candidates))
    lefts, values, rights = [], [], []
    for pair in range(len(plain.values)):
        options = [2 * pair, 2 * pair + 1]
        best = max(options, key=lambda index: float(found[index].values[0]))
        lefts.append(found[best].left[:, 0])
        values.append(found[best].values[0])
        rights.append(candidates[best][0])
    captured = min(direction.captured for direction in found)
    return Directions(torch.stack(lefts, 1), torch.stack(values), torch.stack(rights, 1), captured)
