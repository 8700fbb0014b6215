"""The norms that units pass one behind the other, between the layers of a site.

A norm that takes its statistics from the batch divides a channel by its own spread: channels at zero are divided by
sqrt(eps), 316-fold at 1e-5, once for each such norm on the way. The branches of a residual stream stand side by side:
each unit of a branch passes that branch's norm alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn
from torch.fx import Node

from .names import find_module
from .sites import Site, Sites, unwrap
from .sites.nodes import bind, module_of, plain_name
from .stages import axes_of, live, live_part

__all__ = ["amplification", "evaluation_factor"]

_KINDS = ("batch_norm", "instance_norm", "group_norm")  # each channel, or each new group, by itself


@dataclass(frozen=True, slots=True)
class _Passed:
    """One norm on the way. before: places of the norms passed right before it, -1 for a producer."""

    kind: str
    module: str
    eps: float | None  # as traced; None: the module says
    running: bool | None  # whether it keeps running statistics; None: the module says
    before: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Series:
    """The norms between a site's layers, in forward order. last: places before a consumer, -1 for a producer."""

    norms: tuple[_Passed, ...]
    last: frozenset[int]

    def widest(self, factor: Callable[[_Passed], tuple[float, float]]) -> tuple[float, float]:
        """The largest product of first factors over all paths, and the mean product of second ones over those paths.

        The first is what a gradient at zero is multiplied by, and a sum of paths is ruled by its largest part.
        """
        found = {-1: (1.0, 1.0, 1)}

        def largest(places: frozenset[int]) -> tuple[float, float, int]:
            ways = [found[place] for place in sorted(places)]
            top = max((way[0] for way in ways), default=1.0)
            ways = [way for way in ways if math.isclose(way[0], top, rel_tol=1e-9)]
            count = sum(way[2] for way in ways)
            return top, sum(way[1] * (way[2] / count) for way in ways) if count else 1.0, count

        for place, norm in enumerate(self.norms):
            product, other, count = largest(norm.before)
            first, second = factor(norm)
            found[place] = product * first, other * second, count
        return largest(self.last)[:2]


def amplification(model: nn.Module, sites: Sites, site: Site) -> float:
    """The product of 1 / sqrt(eps) over the norms in series that take a batch's statistics; 1.0 without any.

    That of the path with the largest, where paths differ: beside a norm an identity path adds next to nothing to the
    gradient of units at zero, and behind the norm their values have variance 1 after one step whatever reaches them
    otherwise.
    """
    return _series(sites, site).widest(lambda norm: (_amplifies(model, norm), 1.0))[0]


def evaluation_factor(model: nn.Module, sites: Sites, site: Site) -> float:
    """What takes a site's singular values to evaluation mode: the product of sqrt(eps / (running variance + eps)) over
    the norms in series, each its channels' mean; without a running variance that of new channels, 1."""
    return _series(sites, site).widest(lambda norm: (_amplifies(model, norm), _evaluated(model, norm)))[1]


def _eps(module: nn.Module | None, norm: _Passed) -> float:
    now = getattr(module, "eps", None)
    return now if isinstance(now, float) else norm.eps if norm.eps is not None else 1.0


def _own_statistics(module: nn.Module | None, norm: _Passed) -> bool:
    """Whether the forward pass takes the batch's own mean and variance, as the replay of a middle says it."""
    running = norm.running if norm.running is not None else getattr(module, "running_var", None) is not None
    return not running or module is None or module.training


def _amplifies(model: nn.Module, norm: _Passed) -> float:
    module = find_module(unwrap(model), norm.module)
    return _eps(module, norm) ** -0.5 if _own_statistics(module, norm) else 1.0


def _evaluated(model: nn.Module, norm: _Passed) -> float:
    module = find_module(unwrap(model), norm.module)
    if module is None or not _own_statistics(module, norm):
        return 1.0
    eps = _eps(module, norm)
    variance = getattr(module, "running_var", None)
    if variance is None:
        return (eps / (1.0 + eps)) ** 0.5
    variance = live_part(variance, live(axes_of(module).get("running_var", {})))
    return float((eps / (variance + eps)).sqrt().mean())


def _series(sites: Sites, site: Site) -> _Series:
    """The norms between a site's layers, read from the graph once."""
    if not any(norm.kind in _KINDS for norm in site.norms):
        return _Series((), frozenset((-1,)))
    if sites.graph is None or not site.middle:
        return _unfollowed(site)
    known = sites.graph.norm_series
    if site.name not in known:
        known[site.name] = _followed(sites, site)
    found: _Series = known[site.name]
    return found


def _followed(sites: Sites, site: Site) -> _Series:
    graph = sites.graph
    assert graph is not None
    inside = set(site.middle)
    gates = {gate.layer for gate in site.gates if gate.parts == 1}  # born at full size
    writers = set(site.producers) - gates or set(site.producers)
    starts = {call.node for call in graph.calls if call.name in writers}
    ends = {call.node for call in graph.calls if call.name in site.consumers}
    norms: list[_Passed] = []
    behind: dict[Node, frozenset[int]] = {}  # the last norms before a node on paths from a producer
    last: frozenset[int] = frozenset()
    for node in graph.trace.nodes:
        if node.name not in inside and node not in ends:
            continue
        before = frozenset[int]().union(*(behind.get(source, frozenset()) for source in node.all_input_nodes))
        if node in ends:
            last |= before
        if node in starts:
            before = frozenset((-1,))
        elif node in ends:  # behind it lie other units
            continue
        if plain_name(node) in _KINDS and before:
            norms.append(_passed(node, before))
            before = frozenset((len(norms) - 1,))
        behind[node] = before
    return _Series(tuple(norms), last)


def _passed(node: Node, before: frozenset[int]) -> _Passed:
    bound = bind(node)
    running = bound.get("running_var") is not None
    return _Passed(plain_name(node), module_of(node), float(bound["eps"]), running, before)


def _unfollowed(site: Site) -> _Series:
    """Without a graph: one producer and one consumer are taken for a chain; among several layers a unit passes one
    norm, and one more behind each depthwise layer."""
    norms = [_Passed(n.kind, n.module, None, None, frozenset((-1,))) for n in site.norms if n.kind in _KINDS]
    most = len(norms)
    if len(site.producers) > 1 or len(site.consumers) > 1:
        most = min(most, 1 + len({slot.layer for slot in site.slots_of("middle")}))
        if most == 1:
            return _Series(tuple(norms), frozenset(range(len(norms))))
    chain = tuple(replace(norm, before=frozenset((place - 1,))) for place, norm in enumerate(norms[:most]))
    return _Series(chain, frozenset((most - 1,)))
