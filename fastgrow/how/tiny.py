"""TINY: GradMax in the metric of the function instead of the weights (Verbockhaven et al., TMLR 2024)."""

from __future__ import annotations

import torch

from ..arguments import choice, number
from ..blocks import has_blocks
from ..errors import GrowthError
from ..natural import NaturalDirections, natural_directions
from ..newborns import Newborns, Start
from ..site_view import SiteView
from ..sites import Site
from ..solve import Directions
from .base import How, refuse_dead, refuse_mixing
from .completion import completed

__all__ = ["TINY"]


class TINY(How):
    """New units that follow the part of the functional gradient no present weight can.

    Outgoing columns along the leading left singular vectors u_i of ``M_perp S^(-1/2)``: M whitened by the covariance
    S of what new units read, after the best update of the consumers' present weights has been taken from dL/dz
    (the paper's theorem: ``S^(-1/2) N = U diag(lambda) V^T``; its matrices are `fastgrow.natural`'s).

    amplitude=0 (default): GradMax's natural-gradient variant: incoming weights zero, columns u_i of norm `scale` times
    the mean norm of the present units' outgoing weights (as GradMax; norm="fixed": `scale`); the function stays.
    amplitude=a > 0: the paper's own start, incoming ``sqrt(a lambda_i) S^(-1/2) v_i``, outgoing
    ``-sqrt(a lambda_i) u_i``: a step of length a along the gradient in function space; the function changes, the
    loss by -a sum lambda_i^2 to first order. (The paper finds a by line search; here it is given.)
    project: take the present weights' share from the gradient first. What they leave may have a rank below the units
    asked for (0, where they could follow all of it: few samples, many weights). Units beyond it start at random:
    orthogonal outgoing columns of the same norm; with an amplitude random incoming weights of the present ones' mean
    norm and outgoing zeros, for a step along a gradient of zero is none. Random columns attain a plain gradient that is
    not known at birth: with any, the predicted gain is None (with measure_gain that of the gradient found).

    where.FirstOrderGain reads the same lambda_i. Costs one observed backward pass, a replay of every incoming
    weight and an n x n eigendecomposition. Raises `GrowthError` where GradMax does, for gates and heads, and for a
    ReLU that is a function call with amplitude=0.
    """

    needs_directions = True
    solves = True

    def __init__(self, scale: float = 0.5, norm: str = "mean", amplitude: float = 0.0, project: bool = True) -> None:
        self.scale = number("how.TINY", "scale", scale, above=0)
        self.norm = choice("how.TINY", "norm", norm, ("mean", "fixed"))
        self.amplitude = number("how.TINY", "amplitude", amplitude, least=0)
        self.project = bool(project)
        self.starts_at_zero = self.amplitude == 0

    def check(self, site: Site, units: int) -> None:
        if has_blocks(site) or site.stacked:
            raise GrowthError(
                f"site {site.name!r}: how.TINY whitens weights that meet in a plain middle, not gates, heads, "
                "grouped channels or stacks of matrices; use how.GradMax"
            )
        if self.amplitude:
            refuse_mixing(self, site)
            return
        refuse_dead(self, site, "how.TINY(amplitude=...), or how.GradMax (signed pairs)")

    def solve(self, view: SiteView) -> Directions:
        return natural_directions(view, self.project)

    def start(self, newborns: Newborns) -> Start:
        found, steps = newborns.directions, newborns.steps
        assert isinstance(found, NaturalDirections)
        known = min(steps, found.rank)
        random = steps - known
        left, right = found.left[:, :known], found.right[:, :known]
        if self.amplitude:
            size = (self.amplitude * found.values[:known]).sqrt()
            free = completed(newborns, right[:, :0], random, "producer") * newborns.mean_norm("producer")
            return Start(
                newborns.split(torch.cat([right * size, free], 1), "producer"),
                outgoing=newborns.split(torch.cat([left * -size, left.new_zeros(len(left), random)], 1), "consumer"),
                captured=found.captured,
                random=random,
            )
        target = newborns.outgoing_norm(self.scale, self.norm)
        return Start(
            outgoing=newborns.split(completed(newborns, left, random, "consumer") * target, "consumer"),
            captured=found.captured,
            # What random columns attain is not known here: M has been let go.
            attained=None if random else float(found.slopes[:known].square().sum()) * target**2,
            random=random,
        )
