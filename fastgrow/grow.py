"""`fg.grow`: new units for the sites named, without changing what the network computes."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .cuda_graphs import check_not_captured
from .distributed import replicas_of, together
from .edits import EditBuilder, Edits
from .errors import GrowthError
from .how import GradMax, How, Newborns, Start
from .integrations.config import follow_configs
from .nn import original
from .observe import Observation, observe
from .plan import check_units
from .rehearsal import Rehearsal, checked_loss, preserved
from .sites import Sites, unwrap
from .stages import clear
from .trial import find_sites
from .widen import widen

__all__ = ["GrowthReport", "SiteGrowth", "finalize", "grow", "grow_observed"]


@dataclass
class SiteGrowth:
    """What happened at one site.

    captured: the solver's estimate of the captured norm. predicted_gain: learning rate times the attained
    squared gradient, the first-order decrease of the loss at the next step; None without an optimizer
    or where the method attains none that it knows. measured_gain: the decrease seen at the next step, for a loop
    that compares its losses to fill in; None as the report comes.
    """

    name: str
    old_width: int
    new_width: int
    captured: float | None = None
    predicted_gain: float | None = None
    measured_gain: float | None = None
    random_units: int = 0


@dataclass
class GrowthReport:
    """What one growth did.

    swapped: activation modules replaced by their `fastgrow.nn` twins. seconds: of observing, solving
    and widening. parameters: of the network after growth. step: the Grower's step. evidence: what the
    policy saw and computed, for plots.
    """

    sites: list[SiteGrowth]
    method: str
    seconds: float
    parameters: int
    swapped: list[str] = field(default_factory=list)
    step: int | None = None
    evidence: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        grown = ", ".join(f"{site.name} {site.old_width} -> {site.new_width}" for site in self.sites)
        return f"{self.method}: {grown} ({self.parameters} parameters, {1000 * self.seconds:.1f} ms)"


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def grow(
    model: nn.Module,
    units: Mapping[str, int],
    how: How | None = None,
    *,
    sites: Sites | None = None,
    optimizer: Any = None,
    also: Iterable[nn.Module] = (),
    closure: Callable[[], Tensor] | None = None,
    seen: Observation | None = None,
) -> GrowthReport:
    """Add units to the sites named, all or nothing.

    units: {site name: units}, in the site's own count (channels; attention: heads), a multiple of
    ``site.multiple``. how: `fastgrow.how`, GradMax by default. optimizer: one or a list; every optimizer
    of torch.optim is carried through. also: EMA copies and AveragedModels that must follow.
    closure: returns the loss of a batch, not yet backpropagated; needed by methods that read gradients,
    called once (twice without `sites`: they are found from the inputs that it gives the model; more often by
    methods that try the loss, as they say). ``.grad``s,
    buffers, RNG state and modes are left as they were found. seen: an `Observation` to use instead.

    Returns a `GrowthReport`. Raises `GrowthError`, with everything as it was, for sites that are unknown or
    cannot grow, for units that are no positive multiple, and for gradients that are not finite; exceptions
    of the closure pass unchanged.
    """
    how = how if how is not None else GradMax()
    check_not_captured(model)
    if sites is None:
        if closure is None:
            raise GrowthError("grow needs sites= (from find_sites), or a closure= from whose call they can be found")
        sites = find_sites(model, _inputs_of(model, closure))
    started = time.perf_counter()
    wanted = _checked(model, sites, units, how)
    if how.needs_directions and seen is None:
        if closure is None:
            raise GrowthError(f"{how.name} reads gradients: give closure=, a function that returns the loss")
        seen = observe_closure(model, observe(model, sites, nagn=False, **observing(sites, wanted, how)), closure)
    report = grow_observed(model, sites, wanted, how, seen, _as_list(optimizer), list(also), closure)
    report.seconds = time.perf_counter() - started
    return report


def grow_observed(
    model: nn.Module,
    sites: Sites,
    units: Mapping[str, int],
    how: How,
    seen: Observation | None,
    optimizers: list[Any],
    also: list[nn.Module],
    closure: Callable[[], Tensor] | None = None,
) -> GrowthReport:
    """Grow from an observation that was made already (what `grow` and the Grower share)."""
    started = time.perf_counter()
    check_not_captured(model)
    replicas = replicas_of(model)
    if replicas is not None:
        replicas.check_renewable()
        units = replicas.first(dict(units))
    wanted = _checked(model, sites, units, how)
    if how.rewrites:  # in forward order, so that each site sees the fan-in it will have
        wanted = {site.name: wanted[site.name] for site in sites if site.name in wanted}
    with torch.no_grad(), together(replicas):
        how.check_optimizers(optimizers)
        if how.needs_closure:
            if closure is None:
                raise GrowthError(
                    f"{how.name} needs the loss again: give closure=, a function that returns the loss "
                    "(grower.step(closure=...) in a loop)"
                )
            starts, edits = _rehearsed(model, sites, wanted, how, closure)
        else:
            starts, edits = _started(model, sites, wanted, how, seen)
    if replicas is not None:  # what is drawn at random is drawn on one rank
        parts = [part for edit in edits.tensors for part in (edit.fresh, edit.scale, edit.shift)]
        replicas.share_([part for part in parts if isinstance(part, Tensor)])
    before = sites.widths(model)
    widen(
        unwrap(model),
        edits.tensors,
        attributes=edits.attributes,
        swaps=edits.swaps,
        optimizers=optimizers,
        also=also,
    )
    if replicas is not None:
        replicas.renew()
    how.settle(model, optimizers)
    follow_configs(unwrap(model))
    rate = optimizers[0].param_groups[0]["lr"] if optimizers else None
    grown = [
        SiteGrowth(
            name,
            before[name],
            before[name] + count,
            starts[name].captured,
            None if rate is None or starts[name].attained is None else float(rate) * float(starts[name].attained or 0),
            random_units=starts[name].random,
        )
        for name, count in wanted.items()
    ]
    total = sum(parameter.numel() for parameter in unwrap(model).parameters())
    return GrowthReport(grown, how.name, time.perf_counter() - started, total, [swap.name for swap in edits.swaps])


def _started(
    model: nn.Module, sites: Sites, units: Mapping[str, int], how: How, seen: Observation | None
) -> tuple[dict[str, Start], Edits]:
    builder = EditBuilder(model, sites, units, how.rewrites)
    starts: dict[str, Start] = {}
    for name, count in units.items():
        site = sites[name]
        newborns = builder.newborns(site)
        if how.needs_directions:
            assert seen is not None
            rank = how.rank(site, count)
            newborns.directions = (
                seen.solution(how.name, name, rank) if how.solves else seen.site_directions(name, rank)
            )
        starts[name] = how.start(newborns)
        builder.add(site, starts[name])
    return starts, builder.edits([name for name in units if how.swaps(sites[name])])


def _rehearsed(
    model: nn.Module, sites: Sites, units: Mapping[str, int], how: How, closure: Callable[[], Tensor]
) -> tuple[dict[str, Start], Edits]:
    def build(units: Mapping[str, int], starts: Mapping[str, Start]) -> Edits:
        builder = EditBuilder(model, sites, units, how.rewrites)
        for name in units:
            builder.add(sites[name], starts[name])
        return builder.edits([name for name in units if how.swaps(sites[name])])

    def newborns(name: str, count: int) -> Newborns:
        return Newborns(model, sites, sites[name], count)

    starts = how.rehearse(Rehearsal(model, sites, units, closure, build, newborns))
    return starts, build(units, starts)


def _checked(model: nn.Module, sites: Sites, units: Mapping[str, int], how: How) -> dict[str, int]:
    if not isinstance(units, Mapping):
        raise GrowthError(f"units={units!r} was given; wanted a mapping {{site name: units}}")
    return {name: check_units(model, sites, name, count, how) for name, count in units.items()}


def observe_closure(model: nn.Module, watching: observe, closure: Callable[[], Tensor]) -> Observation:
    """One call of the closure under an observer; nothing of the model changes."""
    with preserved(model), torch.enable_grad(), watching as seen:
        loss = checked_loss(closure)
        seen.backward(loss)
    return seen


def observing(sites: Sites, units: Mapping[str, int], how: How) -> dict[str, Any]:
    """The arguments of `observe` for growing so many units by this method."""
    ranks = {name: how.rank(sites[name], count) for name, count in units.items()}
    return {
        "growth": [name for name, rank in ranks.items() if rank],
        "rank": ranks,
        "bias": bool(getattr(how, "bias", False)),
        "signed": [name for name in ranks if how.signed(sites[name])],
        "solvers": {how.name: how.solve} if how.solves else {},
        "unmapped": list(ranks) if how.solves and not how.reads_growth else [],
    }


def _inputs_of(model: nn.Module, closure: Callable[[], Tensor]) -> Any:
    """The arguments that the closure's own call gives the model."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = unwrap(model).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        with preserved(model), torch.no_grad():
            closure()
    finally:
        hook.remove()
    if not calls:
        raise GrowthError("the closure never called the model, so its sites cannot be found; give sites=")
    args, kwargs = calls[0]
    if not kwargs:
        return args
    names = list(inspect.signature(unwrap(model).forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def finalize(model: nn.Module) -> nn.Module:
    """Give the model back as plain torch: activations are torch's own again, nothing of fastgrow stays.

    For ONNX, export and deployment; the forward pass does not change. Returns the model.
    """
    for module in list(unwrap(model).modules()):
        for child_name, child in list(module.named_children()):
            plain = original(child)
            if plain is not None:
                setattr(module, child_name, plain)
    clear(unwrap(model))
    return model
