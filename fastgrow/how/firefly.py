"""Firefly: new units by minimising the loss itself, best candidates kept (Wu et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import choice, number, whole
from ..errors import GrowthError
from ..newborns import Newborns, Start
from ..rehearsal import Grown, Rehearsal
from ..sites import Site
from ..units import gather, names_of, scatter_
from .base import How, refuse_mixing
from .splitting import split_start

__all__ = ["Firefly"]


class Firefly(How):
    """New units are tried in the network and trained alone, by Adam on the loss, before they are added.

    variant="opt": Firefly-Opt of the GradMax paper (section 4.2): incoming, outgoing weights and biases of the new
    units take `steps` of Adam on the loss; after each, incoming vectors, with their biases, are scaled back to norm
    `scale` times the mean norm of the present units' incoming weights, outgoing ones to norm epsilon. (Biases left free
    grow until the new units' first step throws the training off course.)
    variant="full": the candidates are a split of every present unit, ``theta +- delta`` with half its outgoing weights
    each, and ``extra * units`` new ones (rounded up). All deltas (norm at most split_epsilon times the mean norm of the
    incoming weights) and new weights are trained together as above; then each candidate is judged by the decrease of
    the loss that it brings, the gradient along the way from nothing to its trained state, averaged at `samples` points
    (the paper's integrated Taylor estimate); the best `units` of a site stay.

    rate: of Adam, relative to the size of the entries. Blocks between the new units of two neighbouring sites stay
    zero. The function changes by about epsilon (and split_epsilon^2): both are small numbers, not zero.

    Costs `steps` (variant "full": steps + samples) calls of the closure, each a forward and a backward pass of the
    grown network. Raises `GrowthError` without a closure, where the loss or a gradient is not finite, where norms mix
    the channels, and with variant="full" for gates, heads and groups.
    """

    needs_closure = True
    fills_room = False

    def __init__(
        self,
        variant: str = "opt",
        steps: int = 100,
        rate: float = 0.1,
        scale: float = 0.5,
        epsilon: float = 1e-4,
        split_epsilon: float = 1e-2,
        extra: float = 1.0,
        samples: int = 3,
    ) -> None:
        self.variant = choice("how.Firefly", "variant", variant, ("opt", "full"))
        self.steps = whole("how.Firefly", "steps", steps)
        self.rate = number("how.Firefly", "rate", rate, above=0)
        self.scale = number("how.Firefly", "scale", scale, above=0)
        self.epsilon = number("how.Firefly", "epsilon", epsilon, above=0)
        self.split_epsilon = number("how.Firefly", "split_epsilon", split_epsilon, above=0)
        self.extra = number("how.Firefly", "extra", extra, least=0)
        self.samples = whole("how.Firefly", "samples", samples)
        self.rewrites = variant == "full"

    def check(self, site: Site, units: int) -> None:
        refuse_mixing(self, site)
        if self.variant == "full" and (site.gates or site.multiple > site.step):
            raise GrowthError(
                f"site {site.name!r}: how.Firefly(variant='full') splits units one by one, not gates, heads or groups "
                "of channels; use variant='opt'"
            )

    def rehearse(self, rehearsal: Rehearsal) -> dict[str, Start]:
        counts, starts = {}, {}
        candidates = []
        for name, units in rehearsal.units.items():
            candidate = self._candidates(rehearsal, name, units)
            candidates.append(candidate)
            counts[name] = (len(candidate.split) + candidate.fresh) * candidate.site.step
            starts[name] = candidate.start(rehearsal.newborns(name, counts[name]))
        with rehearsal.grown(counts, starts) as grown:
            tried = [_Tried(candidate, grown) for candidate in candidates]
            for step in range(1, self.steps + 1):
                self._move(rehearsal, tried, step)
            if self.variant == "full":
                self._judge(rehearsal, tried)
        return {one.site.name: self._chosen(rehearsal, one) for one in tried}

    def _candidates(self, rehearsal: Rehearsal, name: str, units: int) -> _Candidates:
        site = rehearsal.sites[name]
        newborns = rehearsal.newborns(name, units)
        steps = units // site.step
        width = newborns.sizes[site.axis]
        present = float(newborns.mean_norm("producer"))
        full = self.variant == "full"
        fresh = -int(-self.extra * steps // 1) if full else steps
        if full and width + fresh < steps:
            raise GrowthError(
                f"site {name!r}: {steps} units were asked for, but there are {width + fresh} candidates; raise extra"
            )
        return _Candidates(
            site,
            newborns.sizes,
            torch.arange(width) if full else torch.zeros(0, dtype=torch.int64),
            fresh,
            self.scale * present,
            self.epsilon,
            self.split_epsilon * present,
        )

    def _move(self, rehearsal: Rehearsal, tried: list[_Tried], step: int) -> None:
        """One step of Adam on everything that is new, then back to the norms."""
        gradients = rehearsal.gradients(_leaves(tried))
        for one in tried:
            one.move(gradients, self.rate, step)
        for one in tried:
            one.write()

    def _judge(self, rehearsal: Rehearsal, tried: list[_Tried]) -> None:
        """Each candidate's share of the loss's decrease on the way from nothing to its trained state."""
        leaves = _leaves(tried)
        for point in range(self.samples):
            share = (point + 0.5) / self.samples
            for one in tried:
                one.write(share)
            gradients = rehearsal.gradients(leaves)
            for one in tried:
                one.score += one.decrease(gradients) / self.samples

    def _chosen(self, rehearsal: Rehearsal, one: _Tried) -> Start:
        units = rehearsal.units[one.site.name]
        newborns = rehearsal.newborns(one.site.name, units)
        splits = len(one.candidates.split)
        if self.variant == "opt":
            best = torch.arange(splits, splits + one.candidates.fresh)
        else:
            best = one.score.argsort(stable=True)[: newborns.steps].sort().values.cpu()
        split = best[best < splits]
        fresh = best[best >= splits] - splits
        count = len(split)
        start = split_start(newborns, one.candidates.split[split], one.delta[:, split]) if count else Start()
        incoming = one.incoming.new_zeros(one.incoming.shape[0], newborns.steps)
        outgoing = one.outgoing.new_zeros(one.outgoing.shape[0], newborns.steps)
        incoming[:, :count], incoming[:, count:] = -one.delta[:, split], one.incoming[:, fresh]
        outgoing[:, count:] = one.outgoing[:, fresh]
        start.incoming = newborns.split(incoming, "producer")
        start.outgoing = newborns.split(outgoing, "consumer")
        if one.bias is not None:
            bias = one.bias.new_zeros(one.bias.shape[0], newborns.steps)
            bias[:, count:] = one.bias[:, fresh]
            start.values.update(newborns.split_bias(bias))
        if self.rewrites:
            sources = torch.full((newborns.steps,), -1)
            sources[:count] = one.candidates.split[split]
            start.sources = sources
        return start


@dataclass
class _Candidates:
    """split: present units that are split, each with a copy; fresh: new units behind them."""

    site: Site
    sizes: Mapping[int, int]
    split: Tensor
    fresh: int
    incoming_norm: float
    outgoing_norm: float
    split_norm: float

    def start(self, newborns: Newborns) -> Start:
        """Silent candidates; `_Tried` writes their weights."""
        if not len(self.split):
            return Start()
        sources = torch.cat([self.split, torch.full((self.fresh,), -1)])
        return Start(sources=sources)


class _Tried:
    """One site's candidates in the network that is grown on trial: their weights, as columns, and Adam's state."""

    def __init__(self, candidates: _Candidates, grown: Grown) -> None:
        self.candidates, self.grown = candidates, grown
        self.site = site = candidates.site
        width, splits = candidates.sizes[site.axis], len(candidates.split)
        self.old = candidates.split
        self.copies = torch.arange(width, width + splits)
        self.new = torch.arange(width + splits, width + splits + candidates.fresh)
        self.names = [
            name
            for role in ("producer", "consumer", "bias")
            for name in names_of(site, role)
            if grown.tensors[name].requires_grad
        ]
        # Of the units before anything moves.
        self.theta = self._get("producer", self.old)
        self.delta = torch.randn_like(self.theta)
        self.delta *= 0.1 * candidates.split_norm / self.delta.norm(dim=0).clamp(min=1e-30)
        self.incoming = _scaled(torch.randn_like(self._get("producer", self.new)), candidates.incoming_norm)
        self.outgoing = _scaled(torch.randn_like(self._get("consumer", self.new)), candidates.outgoing_norm)
        self.bias = self._get("bias", self.new) if names_of(site, "bias") else None
        self.score = torch.zeros(splits + candidates.fresh)
        self._state: dict[str, tuple[Tensor, Tensor]] = {}
        self.write()

    def _get(self, role: str, units: Tensor, tensors: dict[str, Tensor] | None = None) -> Tensor:
        source = self.grown.tensors if tensors is None else tensors
        return gather(self.site, source, self.grown.sizes, role, units, self.grown.axes)

    def _put(self, role: str, units: Tensor, vectors: Tensor) -> None:
        scatter_(self.site, self.grown.tensors, self.grown.sizes, role, units, vectors, self.grown.axes)

    def write(self, share: float = 1.0) -> None:
        """The candidates' weights into the network, at this share of the way from nothing."""
        if len(self.old):
            self._put("producer", self.old, self.theta + share * self.delta)
            self._put("producer", self.copies, self.theta - share * self.delta)
        if len(self.new):
            self._put("producer", self.new, self.incoming)
            self._put("consumer", self.new, share * self.outgoing)
            if self.bias is not None:
                self._put("bias", self.new, self.bias)

    def _slopes(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        frozen = {
            name: torch.zeros_like(self.grown.tensors[name])
            for role in ("producer", "consumer", "bias")
            for name in names_of(self.site, role)
            if name not in gradients
        }
        known = {**gradients, **frozen}
        slopes = {
            "incoming": self._get("producer", self.new, known),
            "outgoing": self._get("consumer", self.new, known),
        }
        if len(self.old):
            slopes["delta"] = self._get("producer", self.old, known) - self._get("producer", self.copies, known)
        if self.bias is not None:
            slopes["bias"] = self._get("bias", self.new, known)
        return slopes

    def move(self, gradients: dict[str, Tensor], rate: float, step: int) -> None:
        limits = self.candidates
        sizes = {
            "incoming": limits.incoming_norm / max(1, self.incoming.shape[0]) ** 0.5,
            "outgoing": limits.outgoing_norm / max(1, self.outgoing.shape[0]) ** 0.5,
            "delta": limits.split_norm / max(1, self.delta.shape[0]) ** 0.5,
            "bias": limits.incoming_norm / max(1, self.incoming.shape[0]) ** 0.5,
        }
        for name, slope in self._slopes(gradients).items():
            first, second = self._state.setdefault(name, (torch.zeros_like(slope), torch.zeros_like(slope)))
            first.lerp_(slope, 0.1)
            second.lerp_(slope.square(), 0.001)
            size = (second / (1 - 0.999**step)).sqrt() + torch.finfo(slope.dtype).tiny
            moved = getattr(self, name) - rate * sizes[name] / (1 - 0.9**step) * first / size
            setattr(self, name, moved)
        whole = self.incoming if self.bias is None else torch.cat([self.incoming, self.bias])
        whole = _scaled(whole, limits.incoming_norm)
        if self.bias is not None:
            whole, self.bias = whole.split([len(self.incoming), len(self.bias)])
        self.incoming = whole
        self.outgoing = _scaled(self.outgoing, limits.outgoing_norm)
        self.delta = self.delta * (limits.split_norm / self.delta.norm(dim=0).clamp(min=limits.split_norm))

    def decrease(self, gradients: dict[str, Tensor]) -> Tensor:
        """(candidates,): the first-order change of the loss that each brings here; negative is good."""
        slopes = self._slopes(gradients)
        changes = [(slopes["outgoing"] * self.outgoing).sum(0)]
        if len(self.old):
            changes.insert(0, (slopes["delta"] * self.delta).sum(0))
        return torch.cat(changes).float().cpu()


def _leaves(tried: Iterable[_Tried]) -> dict[str, Tensor]:
    """What the candidates of all sites stand in."""
    return {name: one.grown.tensors[name] for one in tried for name in one.names}


def _scaled(columns: Tensor, norm: float) -> Tensor:
    return columns * (norm / columns.norm(dim=0).clamp(min=torch.finfo(columns.dtype).tiny))
