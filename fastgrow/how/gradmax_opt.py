"""GradMaxOpt: the gradient of the new weights maximised by steps instead of a decomposition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import choice, number, whole
from ..errors import GrowthError
from ..layout import unit_positions
from ..members import Side
from ..newborns import Newborns, Start
from ..replay import ReplayMap, consumer_gradient
from ..site_view import SiteView, for_parts
from ..sites import Site, tensors_of
from ..solve import Directions
from ..units import gather
from .base import How, refuse_dead, refuse_mixing

__all__ = ["GradMaxOpt"]


class GradMaxOpt(How):
    """Adam on the squared gradient norm of the new weights, from a random start (GradMax paper, eq. 11).

    form="outgoing": incoming weights zero, ``max ||W_out^T M||_F^2`` over outgoing weights of norm c; only products
    with M are used, M is never formed. GradMax solves the same in closed form and attains at least as much where one
    unit is added, and among orthogonal columns.
    form="incoming" (the inverse, end of section 3): outgoing weights zero, ``max ||dL/dW_out||_F^2`` over incoming
    weights of norm c, through the middle as it is; the only form for activations with f(0) != 0, and safe behind
    batch norm.

    steps, rate: of Adam (betas 0.9, 0.999); the paper gives no rate. scale, norm: c, as in GradMax: "mean": `scale`
    times the mean norm of the present units' weights on that side; "fixed": `scale` itself. After each step the
    weights are scaled back to c: project="columns": every unit to norm c (as GradMax's units have); "matrix": the
    whole matrix to sqrt(units) c (the paper's words; units may then turn into copies of one another).
    tangent: take the gradient's part along the constraint only (ours). Without, as in the paper, the part that points
    outwards never vanishes, Adam's scaling turns it away from the optimum, and the ascent ends near a vector of signs:
    90 to 95 % of the attainable norm in small cases, where with it the optimum is reached.

    In grouped convolutions and stacks of matrices each group or member is optimised by itself, at its own c.
    Keeps the function (form "outgoing": for f(0) = 0). Costs one observed backward pass and 2 * steps products with M,
    or `steps` replays of the middle. Raises `GrowthError` where GradMax does, for gates and heads, and for a
    ReLU that is a function call with form="outgoing".
    """

    needs_directions = True
    solves = True
    fills_room = False

    def __init__(
        self,
        form: str = "outgoing",
        steps: int = 100,
        rate: float = 1e-2,
        scale: float = 0.5,
        norm: str = "mean",
        project: str = "columns",
        tangent: bool = False,
    ) -> None:
        self.form = choice("how.GradMaxOpt", "form", form, ("outgoing", "incoming"))
        self.steps = whole("how.GradMaxOpt", "steps", steps)
        self.rate = number("how.GradMaxOpt", "rate", rate, above=0)
        self.scale = number("how.GradMaxOpt", "scale", scale, above=0)
        self.norm = choice("how.GradMaxOpt", "norm", norm, ("mean", "fixed"))
        self.project = choice("how.GradMaxOpt", "project", project, ("columns", "matrix"))
        self.tangent = bool(tangent)
        self.starts_at_zero = self.reads_growth = form == "outgoing"
        self.learns_first = "producer" if form == "outgoing" else "consumer"

    def check(self, site: Site, units: int) -> None:
        if site.gates or site.heads:
            raise GrowthError(
                f"site {site.name!r}: how.GradMaxOpt optimises weights that meet in a plain middle, not gates and "
                "heads; use how.GradMax"
            )
        if self.form == "incoming":
            refuse_mixing(self, site)
            return
        refuse_dead(self, site, "how.GradMaxOpt(form='incoming'), or how.GradMax (signed pairs)")

    @for_parts
    def solve(self, view: SiteView) -> Directions:
        newborns = Newborns(view.model, view.sites, view.site, view.rank * view.site.step)
        sphere = _Sphere.of(newborns, self)
        if self.form == "outgoing":
            return self._solve_outgoing(view, sphere)
        return self._solve_incoming(view, sphere)

    def _solve_outgoing(self, view: SiteView, sphere: _Sphere) -> Directions:
        growth = view.growth
        start = torch.randn(growth.shape[0], view.rank, dtype=growth.dtype).to(growth.device)

        def slope(columns: Tensor) -> Tensor:
            return growth.unit_matmat(growth.unit_rmatmat(columns))

        left = self._ascend(start, sphere, slope)
        pulled = growth.rmatmat(left)
        return Directions(left, pulled.norm(dim=0), pulled)

    def _solve_incoming(self, view: SiteView, sphere: _Sphere) -> Directions:
        parts, largest = _outgoing_gradients(view)
        present = gather(view.site, tensors_of(view.model), view.sites.sizes(view.model), "producer")
        start = torch.randn(present.shape[0], view.rank, dtype=largest.dtype).to(present.device)

        def slope(columns: Tensor) -> Tensor:
            with torch.enable_grad():
                free = columns.detach().requires_grad_()
                return torch.autograd.grad(parts(free).sum(), free)[0]

        right = self._ascend(start, sphere, slope)
        values = parts(right).sqrt() * largest
        return Directions(right.new_zeros(0, view.rank), values, right)

    def _ascend(self, columns: Tensor, sphere: _Sphere, slope: Callable[[Tensor], Tensor]) -> Tensor:
        """Adam, uphill, scaled back after each step."""
        columns = sphere.projected(columns)
        first, second = torch.zeros_like(columns), torch.zeros_like(columns)
        for step in range(1, self.steps + 1):
            gradient = slope(columns)
            if self.tangent:
                gradient = sphere.along(gradient, columns)
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.001)
            size = (second / (1 - 0.999**step)).sqrt() + 1e-30
            columns = sphere.projected(columns + self.rate / (1 - 0.9**step) * first / size)
        return columns

    def start(self, newborns: Newborns) -> Start:
        found = newborns.directions
        assert found is not None
        site, steps = newborns.site, newborns.steps
        if found.values.shape[0] < steps:
            raise GrowthError(
                f"site {site.name!r}: {steps} units were asked for, {found.values.shape[0]} were solved for; observe "
                "with that rank"
            )
        attained = float(found.values.square().sum())
        if attained == 0.0:
            raise GrowthError(
                f"site {site.name!r}: no gradient reaches the new weights; the loss does not depend on these layers, "
                "or their gradients underflow (scale the loss)"
            )
        if self.form == "outgoing":
            return Start(outgoing=newborns.split(found.left, "consumer"), attained=attained)
        return Start(newborns.split(found.right, "producer"), attained=attained)


@dataclass(frozen=True)
class _Sphere:
    """The constraint: every column (or the whole matrix) of norm c, of a separate site in each channel by itself."""

    target: Tensor | float  # c; (channels, 1) where each channel has its own
    whole: bool  # the matrix, not its columns
    side: Side | None  # where the channels lie

    @classmethod
    def of(cls, newborns: Newborns, how: GradMaxOpt) -> _Sphere:
        outgoing = how.form == "outgoing"
        if newborns.site.separate:
            norms = newborns.outgoing_part_norms if outgoing else newborns.incoming_part_norms
            target = norms(how.scale, how.norm)[:, None]
            return cls(target, how.project == "matrix", newborns.side("consumer" if outgoing else "producer"))
        if outgoing:
            size = newborns.outgoing_norm(how.scale, how.norm)
        else:
            size = how.scale if how.norm == "fixed" else how.scale * newborns.mean_norm("producer")
        return cls(size, how.project == "matrix", None)

    def _sums(self, entries: Tensor) -> Tensor:
        """Sums of (n, k) over each column, or all columns, kept so that they broadcast; (channels, k) of separate."""
        sums = entries.sum(0, keepdim=True) if self.side is None else self.side.parts(entries).sum(1)
        return sums.sum(1, keepdim=True) if self.whole else sums

    def _spread(self, parts: Tensor) -> Tensor:
        return parts if self.side is None else self.side.spread(parts)

    def projected(self, columns: Tensor) -> Tensor:
        size = self.target * columns.shape[1] ** 0.5 if self.whole else self.target
        return columns * self._spread(size / self._sums(columns.square()).sqrt()).to(columns.dtype)

    def along(self, gradient: Tensor, columns: Tensor) -> Tensor:
        """The gradient's part that keeps the norms."""
        return gradient - self._spread(self._sums(gradient * columns) / self._sums(columns.square())) * columns


def _outgoing_gradients(view: SiteView) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """From incoming vectors (n, r) to each unit's squared gradient norm (r,) at its outgoing weights; their unit.

    Gradients are in units of the largest entry of dL/dz, so that squares neither vanish nor overflow.
    """
    site = view.site
    replays = [view.replay(capture, live=True) for capture in view.captures]
    maps = [ReplayMap(replay, 1.0) for replay in replays]
    largest = torch.stack([g.abs().amax() for c in view.captures for g in c.gradients.values()]).amax().double()
    scale = float(largest) or 1.0

    def squares(columns: Tensor) -> Tensor:
        units = columns.shape[1]
        found: dict[str, Tensor] = {}
        for replay, mapping, weight in zip(replays, maps, view.weights, strict=True):
            images = replay.forward(mapping.rows(columns), units)
            for node, (call, turn) in replay.consumers.items():
                dz = replay.capture.gradients[call.name, turn].to(replay.dtype) * (weight / scale)
                gradient = consumer_gradient(node, call, images[node], dz)
                found[call.name] = found[call.name] + gradient if call.name in found else gradient
        total = columns.new_zeros(units)
        for name, gradient in found.items():
            layout = site.weight(name, "consumer").layout
            own = unit_positions(layout, site.axis, {**replays[0].sizes, site.axis: units})
            total = total + gradient.square().transpose(0, 1).flatten(1).sum(1)[own].sum(1)
        return total

    return squares, largest.to(replays[0].dtype)
