"""GradMax: new units whose gradient is as large as it can be (Evci et al., ICLR 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..arguments import choice, number
from ..cores import to_host
from ..errors import GrowthError
from ..newborns import Newborns, Start
from ..sites import Site
from ..solve import Directions
from .base import DEAD_AT_ZERO, How
from .completion import completed

__all__ = ["GradMax"]


class GradMax(How):
    """Incoming weights zero, outgoing weights along the leading left singular vectors of the growth matrix.

    ``M = E[dL/dz_{l+1} h_{l-1}^T]``; the new outgoing columns are u_1 ... u_k of M, scaled, so that
    ``dL/dW_l_new = W_{l+1}_new^T M`` is as large as orthogonal columns of those norms allow (eqs. 9-11).
    The function stays what it was (activations with f(0) = 0).

    scale, norm: the norm of each new outgoing column: "mean": `scale` times the mean norm of the present
    units' outgoing weights (the paper's experiments: 0.5 for images), sqrt(eps) times that for each batch norm in
    training mode, instance or group norm that the units pass in series (`Newborns.outgoing_norm`; App. C advises small
    weights there); "fixed": `scale` itself; "sigma": as "mean" in total, divided among the columns in proportion to
    their singular values. A unit that has a channel in each group of a grouped convolution, or in each member of a
    stack of matrices, takes these norms in each by itself: a stack of networks grows as each network alone.
    bias: count the gradient of the producers' biases as a column of M (the paper leaves it out); not of gated
    units and attention heads, nor in signed pairs of units that have a channel in each group or member: there the
    weights alone count.
    relu: what is done where ReLU's subgradient 0 at zero would leave the new units dead. "swap": activation
    modules are replaced by their `fastgrow.nn` twins, equal in the forward pass; "pairs": units come in
    twos, with the same small incoming weights and opposite outgoing ones; "auto": swap where the activation
    is a module, pairs where it is a function call; "epsilon": small incoming weights of norm `epsilon` times
    the mean norm of the present units' incoming weights (the paper's image runs: 1e-4), which changes the
    output a little; sqrt(eps) of that for each norm in series, which would blow it up (signed pairs' too).

    Costs one observed backward pass and a small SVD. Raises `GrowthError` where M is zero, where LayerNorm
    mixes the channels, where f(0) != 0, and for an odd number of units in pairs.
    """

    needs_directions = True
    starts_at_zero = True

    def __init__(
        self,
        scale: float = 0.5,
        norm: str = "mean",
        bias: bool = False,
        relu: str = "auto",
        epsilon: float = 1e-4,
    ) -> None:
        self.scale = number("how.GradMax", "scale", scale, above=0)
        self.norm = choice("how.GradMax", "norm", norm, ("mean", "fixed", "sigma"))
        self.bias = bool(bias)
        self.relu = choice("how.GradMax", "relu", relu, ("auto", "swap", "pairs", "epsilon"))
        self.epsilon = number("how.GradMax", "epsilon", epsilon, above=0)

    def signed(self, site: Site) -> bool:
        if site.gates:  # the activation is the gate's, which starts away from zero
            return False
        dead = [a for a in site.activations if a.kind in DEAD_AT_ZERO]
        if self.relu in ("pairs", "epsilon"):
            return bool(dead)
        return any(a.module is None for a in dead) and self.relu == "auto"

    def check(self, site: Site, units: int) -> None:
        if self.relu == "swap":
            functional = [a.kind for a in site.activations if a.kind in DEAD_AT_ZERO and a.module is None]
            if functional:
                raise GrowthError(
                    f"site {site.name!r}: {functional[0]} is called as a function, so relu='swap' has no module to "
                    "replace; use nn.ReLU in the model, or relu='auto' (signed pairs)"
                )
        dead = any(a.kind in DEAD_AT_ZERO for a in site.activations)
        if site.gates and dead and self.relu in ("pairs", "epsilon"):
            raise GrowthError(
                f"site {site.name!r}: relu={self.relu!r} gives units small incoming weights, but those of gated units "
                "are a random gate and zeros; use relu='auto'"
            )
        if self.signed(site) and self.relu != "epsilon" and (units // site.step) % 2:
            raise GrowthError(
                f"site {site.name!r}: {units} units were asked for, but behind a ReLU that is a function call they "
                "come as signed pairs: ask for an even number, or use nn.ReLU in the model"
            )

    def multiple(self, site: Site, width: int) -> int:
        paired = self.signed(site) and self.relu != "epsilon"
        return math.lcm(super().multiple(site, width), 2 * site.step if paired else 1)

    def rank(self, site: Site, units: int) -> int:
        steps = units // site.step
        return max(1, steps // 2) if self.signed(site) and self.relu != "epsilon" else steps

    def check_directions(self, found: Mapping[str, Directions]) -> None:
        largest = to_host([directions.values[:1] for directions in found.values()])
        for name, value in zip(found, largest, strict=True):
            if not value.count_nonzero():
                raise GrowthError(
                    f"site {name!r}: its growth matrix is zero, so no direction has a gradient; the loss does not "
                    "depend on these layers, or their gradients underflow (scale the loss)"
                )

    def start(self, newborns: Newborns) -> Start:
        found = newborns.directions
        assert found is not None
        if self.signed(newborns.site):
            return self._signed_start(newborns)
        steps = newborns.steps
        left, values = found.left[:, :steps], _values(found)[..., :steps]
        known = left.shape[1]
        random = steps - known
        norms = self._norms(newborns, values, random)
        attained = torch.linalg.vector_norm(values * norms[..., :known]) ** 2
        if random:
            left = completed(newborns, left, random, "consumer")
        outgoing = newborns.split(left * _entries(newborns, norms), "consumer")
        gates = getattr(found, "incoming", None)
        incoming = {} if gates is None else newborns.split(gates[:, :steps], "producer")
        return Start(incoming, outgoing=outgoing, captured=found.captured, attained=attained, random=random)

    def _norms(self, newborns: Newborns, values: Tensor, random: int) -> Tensor:
        """The norm of each new outgoing column, one of these values or a random one: (steps,), or (1,) for all alike;
        (channels, steps) or (channels, 1) where each channel has its own."""
        if values.dim() == 2:
            target = newborns.outgoing_part_norms(self.scale, self.norm).to(values)[:, None]
        else:
            target = values.new_ones(1) * newborns.outgoing_norm(self.scale, self.norm)
        if self.norm != "sigma":
            return target
        known = values / values.norm(dim=-1, keepdim=True) * target * values.shape[-1] ** 0.5
        return torch.cat([known, target.expand(*known.shape[:-1], random)], -1)

    def _signed_start(self, newborns: Newborns) -> Start:
        """w = +-epsilon v: both units of a pair see the same samples, their outputs cancel."""
        found = newborns.directions
        assert found is not None
        steps = newborns.steps
        pairs = self.relu != "epsilon"
        count = steps // 2 if pairs else steps
        known = min(count, len(found.values))
        values = _values(found)[..., :count]
        norms = self._norms(newborns, values, count - known)
        if values.dim() == 2:
            small = newborns.channels.into.spread(newborns.small_part_norms(self.epsilon)[:, None])
        else:
            small = newborns.small_norm(self.epsilon)
        left = completed(newborns, found.left[:, :known], count - known, "consumer") * _entries(newborns, norms)
        right = completed(newborns, found.right[:, :known], count - known, "producer") * small
        attained = torch.linalg.vector_norm(values * norms[..., :known]) ** 2
        if pairs:
            left = torch.stack([left, -left], 2).flatten(1)
            right = right.repeat_interleave(2, 1)
            attained = 2 * attained
        incoming, biases = newborns.split_incoming(right)
        return Start(
            incoming=incoming,
            outgoing=newborns.split(left, "consumer"),
            values=biases,
            captured=found.captured,
            attained=attained,
            random=(count - known) * (2 if pairs else 1),
        )


def _values(found: Directions) -> Tensor:
    """(k,): what a column of norm 1 attains; (channels, k) where units have separate channels."""
    parts: Tensor | None = getattr(found, "parts", None)
    return found.values if parts is None else parts


def _entries(newborns: Newborns, norms: Tensor) -> Tensor:
    """Norms of columns, or of their parts, as they multiply units' outgoing vectors."""
    return norms if norms.dim() == 1 else newborns.channels.out.spread(norms)
