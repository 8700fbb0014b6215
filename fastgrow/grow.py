"""`fg.grow`: new units for the sites named, without changing what the network computes."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import as_list, copies_of, instance
from .closures import checked_loss, inputs_of, preserved, undrawn_on_failure
from .cores import to_host
from .cuda_graphs import check_not_captured
from .distributed import Replicas, replicas_of, together
from .edits import EditBuilder, Edits, build_edits
from .errors import GrowthError
from .gain import GainMeter, check_closure, check_measurable
from .growth_report import GrowthReport, SiteGrowth
from .how import GradMax, How
from .insertions import forget
from .integrations.config import follow_configs
from .newborns import Newborns, Start
from .nn import Beside, MultiheadAttention, original
from .observation import Observation
from .observe import observe
from .optimizer_state import check_trained, rates_of
from .plan import check_units, checked_units
from .rehearsal import Rehearsal
from .reserve import check_method, fitted, release
from .room import has_room, live_parameters
from .sharded import Renewals, gathered, wrapped_modules
from .sites import Site, Sites, tensors_of, unwrap
from .solve import Directions
from .stages import clear, newest_stage
from .surroundings import as_called, set_aside
from .trial import find_sites
from .widen import widen

__all__ = [
    "finalize",
    "grow",
    "grow_observed",
    "observe_closure",
    "observing",
    "wanted_units",
]


def grow(
    model: nn.Module,
    units: Mapping[str, int],
    how: How | None = None,
    *,
    sites: Sites | None = None,
    optimizer: Any = None,
    also: nn.Module | Iterable[nn.Module] = (),
    closure: Callable[[], Tensor] | None = None,
    seen: Observation | None = None,
    measure_gain: bool = False,
) -> GrowthReport:
    """Add units to the sites named, all or nothing.

    units: {site name: units}, in the site's own count (channels; attention: heads), a multiple of
    ``site.multiple``. how: `fastgrow.how`, GradMax by default. optimizer: one or a list; every optimizer
    of torch.optim is carried through. also: EMA copies and AveragedModels that must follow.
    closure: returns the loss of a batch, not yet backpropagated; needed by methods that read gradients,
    called once (more often by methods that try the loss, as they say; without `sites` once more before, up to where it
    calls the model: they are found from the inputs that it gives). A backward pass that it makes on its way, an
    adversarial batch's, does not count. ``.grad``s, buffers, RNG state and modes are left as they were found. seen: an
    `Observation` to use instead.
    Under DistributedDataParallel or ``fully_shard`` all ranks make the same call; of a sharded model one site after
    the other is gathered, grown and sharded again.
    measure_gain: fill in `measured_gain`, the decrease of the closure's loss by the new units' first step
    (`fastgrow.gain.GainMeter`): needs closure and optimizer, costs 3 more calls of the closure for one site, n + 3 for
    n, not counted in `seconds`. All but the first come after the growth, which stands if the closure raises there:
    its exception passes unchanged, in the place of the report (``sites.widths(model)`` has the new widths; a Grower
    keeps the report in its history).

    Returns a `GrowthReport`; for ``units={}`` an empty one, without calling the closure. Raises `GrowthError`, with
    everything as it was, the RNG state too, for sites that are unknown or cannot grow, for units that are no positive
    multiple, and for a loss or gradients that are not finite; exceptions of the closure pass unchanged.
    """
    how = GradMax() if how is None else instance("grow", "how", how, How)
    if sites is not None:
        instance("grow", "sites", sites, Sites)
    elif closure is None:
        raise GrowthError("grow needs sites= (from find_sites), or a closure= from whose call they can be found")
    optimizers, copies = as_list(optimizer), copies_of(also)
    if measure_gain:
        check_closure(closure)
        check_measurable(model, optimizers)
    units = _agreed(model, units)
    if not units:
        return _nothing_grown(model, how, optimizers, copies)
    if sites is None:
        assert closure is not None
        sites = find_sites(model, inputs_of(model, closure))
    wanted = wanted_units(model, sites, units, how)
    meter = GainMeter(model, sites, optimizers, closure) if measure_gain else None
    started = time.perf_counter()
    if how.needs_directions and seen is None:
        if closure is None:
            raise GrowthError(f"{how.name} reads gradients: give closure=, a function that returns the loss")
        seen = observe_closure(model, observe(model, sites, nagn=False, **observing(sites, wanted, how)), closure)
    report = grow_observed(model, sites, wanted, how, seen, optimizers, copies, closure)
    report.seconds = time.perf_counter() - started
    if meter is not None:
        meter.fill(report)
    return report


def grow_observed(
    model: nn.Module,
    sites: Sites,
    wanted: Mapping[str, int],
    how: How,
    seen: Observation | None,
    optimizers: list[Any],
    also: list[nn.Module],
    closure: Callable[[], Tensor] | None = None,
    round_to: int = 1,
) -> GrowthReport:
    """Grow from an observation that was made already (what `grow` and the Grower share).

    wanted: from `wanted_units`. round_to: tensors that become larger do so to a multiple of it along the sites grown;
    what is left over is room.
    """
    started = time.perf_counter()
    if how.rewrites:  # in forward order, so that each site sees the fan-in it will have
        wanted = {site.name: wanted[site.name] for site in sites if site.name in wanted}
    before = sites.widths(model)
    closure = closure and as_called(closure)
    with set_aside(), undrawn_on_failure(model):
        if wrapped_modules(model):
            starts, swapped = _grown_by_site(model, sites, wanted, how, seen, optimizers, also)
        else:
            starts, swapped = _grown_together(model, sites, wanted, how, seen, optimizers, also, closure, round_to)
    how.settle(model, optimizers)
    follow_configs(unwrap(model))
    gains = _predicted_gains(model, sites, how, starts, optimizers)
    grown = [
        SiteGrowth(
            name,
            before[name],
            before[name] + count,
            starts[name].captured,
            gains.get(name),
            random_units=starts[name].random,
        )
        for name, count in wanted.items()
    ]
    total = live_parameters(model)
    return GrowthReport(grown, how.name, time.perf_counter() - started, total, swapped)


def _predicted_gains(
    model: nn.Module, sites: Sites, how: How, starts: Mapping[str, Start], optimizers: list[Any]
) -> dict[str, float]:
    """Site name -> learning rate x attained squared gradient, where both are known."""
    if not optimizers:
        return {}
    rates, tensors = rates_of(optimizers), tensors_of(unwrap(model))
    known: dict[str, Tensor | float] = {}
    slowest: dict[str, float] = {}
    for name, start in starts.items():
        slots = sites[name].slots_of(how.learns_first)
        learning = [tensors[slot.tensor] for slot in slots]
        found = [rates.get(id(tensor)) if tensor.requires_grad else None for tensor in learning]
        if start.attained is not None and None not in found:
            known[name], slowest[name] = start.attained, min(rate for rate in found if rate is not None)
    waiting = {name: value for name, value in known.items() if isinstance(value, Tensor)}
    known |= zip(waiting, to_host(list(waiting.values())), strict=True)
    return {name: slowest[name] * float(value) for name, value in known.items()}


def _grown_together(
    model: nn.Module,
    sites: Sites,
    wanted: Mapping[str, int],
    how: How,
    seen: Observation | None,
    optimizers: list[Any],
    also: list[nn.Module],
    closure: Callable[[], Tensor] | None,
    round_to: int,
) -> tuple[dict[str, Start], list[str]]:
    """All sites in one transaction; how they started, and the activations replaced."""
    replicas = replicas_of(model)
    with torch.no_grad():
        with together(replicas):
            check_trained(unwrap(model), optimizers)
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
        _share(replicas, edits)
        edits = fitted(model, sites, edits, wanted, round_to)
    before = [id(parameter) for parameter in unwrap(model).parameters()] if replicas is not None else []
    _carried_out(unwrap(model), edits, optimizers, also)
    if replicas is not None and before != [id(parameter) for parameter in unwrap(model).parameters()]:
        replicas.renew()
    return starts, [swap.name for swap in edits.swaps]


def _grown_by_site(
    model: nn.Module,
    sites: Sites,
    wanted: Mapping[str, int],
    how: How,
    seen: Observation | None,
    optimizers: list[Any],
    also: list[nn.Module],
) -> tuple[dict[str, Start], list[str]]:
    """A sharded model: one site after the other, so that no other site's parameters are gathered; all or none."""
    if how.needs_closure:
        raise GrowthError(
            f"how.{how.name} tries growth on the model itself, which fully_shard has sharded; use a method that does "
            "not need the loss again (how.GradMax), or grow before fully_shard"
        )
    how.check_optimizers(optimizers)
    inner, replicas = unwrap(model), replicas_of(model)
    seed, stage = sites.sizes(inner), newest_stage(inner) + 1
    starts: dict[str, Start] = {}
    swapped: list[str] = []
    with torch.no_grad(), contextlib.ExitStack() as undone:
        found = _directions(sites, wanted, how, seen)
        for name, count in wanted.items() if not how.rewrites else ():
            with _gathered(inner, sites[name]), together(replicas):
                starts[name] = _start(Newborns(inner, sites, sites[name], count), how, found)
        for name, count in wanted.items():
            site = sites[name]
            with _gathered(inner, site), together(replicas):
                builder = EditBuilder(inner, sites, {name: count}, how.rewrites, seed)
                if how.rewrites:
                    starts[name] = _start(builder.newborns(site), how, found)
                builder.add(site, starts[name])
                edits = builder.edits([name] if how.swaps(site) else [])
            _share(replicas, edits)
            undone.callback(_carried_out(inner, edits, optimizers, also, stage))
            swapped += [swap.name for swap in edits.swaps]
        undone.pop_all()
    return starts, swapped


def _carried_out(
    model: nn.Module, edits: Edits, optimizers: list[Any], also: list[nn.Module], stage: int | None = None
) -> Callable[[], None]:
    """`widen`; returns what takes it back."""
    return widen(
        model,
        edits.tensors,
        attributes=edits.attributes,
        swaps=edits.swaps,
        optimizers=optimizers,
        also=also,
        stage=stage,
    )


def _gathered(model: nn.Module, site: Site) -> contextlib.AbstractContextManager[None]:
    return gathered(model, [slot.tensor for slot in site.slots])


def _share(replicas: Replicas | None, edits: Edits) -> None:
    """What is drawn at random is drawn on one rank."""
    if replicas is not None:
        replicas.share_([values for edit in edits.tensors for values in edit.values])


def _directions(sites: Sites, units: Mapping[str, int], how: How, seen: Observation | None) -> dict[str, Directions]:
    """What each site's units begin from, where the method wants directions."""
    if not how.needs_directions:
        return {}
    assert seen is not None
    ranks = {name: how.rank(sites[name], count) for name, count in units.items()}
    found = {
        name: seen.solution(how.name, name, rank) if how.solves else seen.site_directions(name, rank)
        for name, rank in ranks.items()
    }
    how.check_directions(found)
    return found


def _start(newborns: Newborns, how: How, found: Mapping[str, Directions]) -> Start:
    """How one site's units begin."""
    newborns.directions = found.get(newborns.site.name)
    return how.start(newborns)


def _started(
    model: nn.Module, sites: Sites, units: Mapping[str, int], how: How, seen: Observation | None
) -> tuple[dict[str, Start], Edits]:
    builder = EditBuilder(model, sites, units, how.rewrites)
    found = _directions(sites, units, how, seen)
    starts: dict[str, Start] = {}
    for name in units:
        site = sites[name]
        starts[name] = _start(builder.newborns(site), how, found)
        builder.add(site, starts[name])
    return starts, builder.edits([name for name in units if how.swaps(sites[name])])


def _rehearsed(
    model: nn.Module, sites: Sites, units: Mapping[str, int], how: How, closure: Callable[[], Tensor]
) -> tuple[dict[str, Start], Edits]:
    def build(units: Mapping[str, int], starts: Mapping[str, Start]) -> Edits:
        swapping = [name for name in units if how.swaps(sites[name])]
        return build_edits(model, sites, units, starts, swapping, rewriting=how.rewrites)

    def newborns(name: str, count: int) -> Newborns:
        return Newborns(model, sites, sites[name], count)

    starts = how.rehearse(Rehearsal(model, sites, units, closure, build, newborns))
    return starts, build(units, starts)


def _agreed(model: nn.Module, units: Mapping[str, int]) -> Mapping[str, int]:
    """The units asked for; the first rank's under DistributedDataParallel or FSDP2."""
    checked_units(units)
    replicas = replicas_of(model)
    return units if replicas is None else replicas.first(dict(units))


def _nothing_grown(model: nn.Module, how: How, optimizers: list[Any], also: list[nn.Module]) -> GrowthReport:
    """No units at no site: nothing is observed and the closure is not called; what was given must be right all the
    same."""
    started = time.perf_counter()
    check_trained(unwrap(model), optimizers)
    how.check_optimizers(optimizers)
    widen(unwrap(model), (), optimizers=optimizers, also=also)
    return GrowthReport([], how.name, time.perf_counter() - started, live_parameters(model))


def wanted_units(model: nn.Module, sites: Sites, units: Mapping[str, int], how: How) -> dict[str, int]:
    """Units of each site, checked; of a model on several ranks they must be the same on all."""
    checked_units(units)
    check_not_captured(model)
    replicas = replicas_of(model)
    if replicas is not None:
        replicas.check_renewable()
    if not how.fills_room and has_room(model):
        check_method(how)
    widths = sites.widths(model)
    return {name: check_units(sites, widths, name, count, how) for name, count in units.items()}


def observe_closure(model: nn.Module, watching: observe, closure: Callable[[], Tensor]) -> Observation:
    """One call of the closure under an observer; nothing of the model changes."""
    closure = as_called(closure)
    with (
        set_aside(),
        preserved(model),
        torch.enable_grad(),
        watching.of_closure() as seen,
        together(replicas_of(model)),
    ):
        seen.backward(checked_loss(closure), last=True)
    return seen


def observing(sites: Sites, units: Mapping[str, int], how: How) -> dict[str, Any]:
    """The arguments of `observe` for growing so many units by this method."""
    ranks = {name: how.rank(sites[name], count) for name, count in units.items()}
    return {
        "growth": [name for name, rank in ranks.items() if rank],
        "rank": ranks,
        "bias": bool(getattr(how, "bias", False)),
        "signed": {name: float(getattr(how, "epsilon", 1.0)) for name in ranks if how.signed(sites[name])},
        "solvers": {how.name: how.solve} if how.solves else {},
        "unmapped": list(ranks) if how.solves and not how.reads_growth else [],
    }


def finalize(model: nn.Module) -> nn.Module:
    """Give the model back as plain torch: activations are torch's own again, and so is attention where it can be.

    Layers that were inserted stay, as the model's own, under the names they have.
    Room that was reserved and not filled is cut off (`release`).
    For ONNX, export and deployment; the forward pass does not change. Returns the model. Nothing of fastgrow stays, but
    for attention modules with more heads than ``embed_dim / head_dim``: torch's own class has no head size of its own,
    so they remain `fastgrow.nn.MultiheadAttention`, and a warning names them. Their exports are plain torch.
    """
    release(model)
    kept = [name for name, m in unwrap(model).named_modules() if isinstance(m, MultiheadAttention) and not m.fits_torch]
    if kept:
        warnings.warn(
            f"{', '.join(kept)}: torch.nn.MultiheadAttention cannot have this many heads of this size, so "
            "fastgrow.nn.MultiheadAttention stays; export the model (torch.export, ONNX) to run it without fastgrow",
            stacklevel=2,
        )
    renewals = Renewals([unwrap(model)])
    for module in list(unwrap(model).modules()):
        for child_name, child in list(module.named_children()):
            plain = child.as_graph() if isinstance(child, Beside) else original(child)
            if plain is not None:
                for container, key, value in renewals.follow(child, plain):
                    container[key] = value
                setattr(module, child_name, plain)
    clear(unwrap(model))
    forget(unwrap(model))
    return model
