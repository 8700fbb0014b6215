"""A whole growth step: what it costs beyond a training step, ours beside the naive way and GroMo's."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import fastgrow as fg

from . import naive
from .measure import Timing, Variant, compare, peak_bytes
from .models import Case, cases, conv_chain, mlp
from .peers import gromo_installed, gromo_layers, gromo_model, gromo_step
from .rows import Row, Settings

__all__ = ["Trained", "grown", "prepared", "run", "step"]

_WIDE = 256  # the width from which the targets speak
_FRACTIONS = {"n/16": 1 / 16, "n/4": 1 / 4}
_WARMUP = 1
_GROWS_AT = 3  # the first step fills the optimizer's state, the second is the unarmed one


@dataclass
class Trained:
    """A model in its loop, one optimizer step old, with a Grower that grows on its third step."""

    case: Case
    model: nn.Module
    optimizer: torch.optim.SGD
    grower: fg.Grower


def prepared(case: Case, model: nn.Module, sites: fg.Sites, fraction: float) -> Trained:
    """A copy of the model after its first step; `step` is then an unarmed step, and after it an armed one."""
    own = copy.deepcopy(model)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.01, momentum=0.9)
    grower = fg.Grower(
        own,
        optimizer,
        sites=sites,
        when=fg.when.Every(_GROWS_AT),
        where=fg.where.Everywhere(fraction=fraction),
        how=fg.how.GradMax(),
    )
    trained = Trained(case, own, optimizer, grower)
    step(trained)
    return trained


def step(trained: Trained) -> None:
    """One training step of the loop that the README shows."""
    with trained.grower.observe():
        trained.case.loss(trained.model).backward()
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    trained.grower.step()


def armed(case: Case, model: nn.Module, sites: fg.Sites, fraction: float) -> Trained:
    """`prepared`, one step later: the next step grows."""
    trained = prepared(case, model, sites, fraction)
    step(trained)
    return trained


def grown(trained: Trained) -> None:
    """The armed step; makes sure that it grew."""
    step(trained)
    if not trained.grower.history:
        raise RuntimeError(f"{trained.case.name}: the armed step did not grow")


def naive_step(trained: Trained, units: dict[str, int], loss: Callable[[nn.Module], Tensor] | None = None) -> None:
    """The same step the naive way; loss: the case's, as torch.compile makes it."""
    with naive.auxiliary_layers(trained.model, trained.case.pairs) as layers:
        (loss or trained.case.loss)(trained.model).backward()
    trained.optimizer.step()
    naive.grow(trained.model, layers, units, trained.optimizer)
    trained.optimizer.zero_grad()


def run(settings: Settings) -> Iterator[Row]:
    for case in cases(settings):
        torch.manual_seed(0)
        model = case.build().to(settings.device)
        started = time.perf_counter()
        everywhere = fg.find_sites(model, case.x)
        found = (time.perf_counter() - started) * 1000
        for label, fraction in _FRACTIONS.items():
            for part in _parts(case, model):
                chain = fg.find_sites(model, case.x, include=[pair.producer for pair in part.pairs])
                yield from _case(settings, part, model, chain, label, fraction, found)
            if len(everywhere) > len(case.pairs):
                yield from _everywhere(settings, case, model, everywhere, label, fraction)
    if gromo_installed():
        yield from _gromo(settings)


def _parts(case: Case, model: nn.Module) -> list[Case]:
    """The sites that the naive way can grow: the wide ones, of the targets, and all where some are narrower."""
    wide = tuple(pair for pair in case.pairs if _width(model, pair) >= _WIDE)
    return [case] if len(wide) in (0, len(case.pairs)) else [replace(case, pairs=wide), case]


def _width(model: nn.Module, pair: naive.Pair) -> int:
    weight = model.get_submodule(pair.producer).weight
    assert isinstance(weight, Tensor)
    return len(weight)


def _units(model: nn.Module, sites: fg.Sites, fraction: float) -> dict[str, int]:
    return {name: max(1, int(fraction * width + 0.5)) for name, width in sites.widths(model).items()}


def _case(
    settings: Settings,
    case: Case,
    model: nn.Module,
    sites: fg.Sites,
    label: str,
    fraction: float,
    found: float,
) -> Iterator[Row]:
    units = _units(model, sites, fraction)
    parts: list[tuple[float, float]] = []
    variants = {
        "step": Variant(step, lambda _: prepared(case, model, sites, fraction)),
        "armed": Variant(lambda state: parts.append(_in_parts(state)), lambda _: armed(case, model, sites, fraction)),
    }
    if case.naive and label == "n/16":
        variants["naive"] = Variant(
            lambda state: naive_step(state, units),
            lambda _: prepared(case, model, sites, fraction),
            most=settings.times(case.naive),
        )
    if "naive" in variants and case.compiled:
        variants["naive, torch.compile"] = _compiled(variants["naive"], case, units)
    timings = compare(variants, settings.device, settings.times(settings.rounds), _WARMUP)
    cost = timings["armed"].minus(timings["step"])
    peak = peak_bytes(step, settings.device, partial(armed, case, model, sites, fraction))
    shape = f"{case.name}, {len(sites)} sites, {label}"
    observing, ending = (Timing(list(column)) for column in zip(*parts[_WARMUP:], strict=True))
    more = {
        "step_ms": timings["step"].p50,
        "armed_ms": timings["armed"].p50,
        "pass_and_solve_ms": observing.p50,
        "widen_ms": ending.p50,
        "find_sites_ms": found,
    }
    group = "wide" if min(sites.widths(model).values()) >= _WIDE else "narrow"
    yield settings.row("growth cost", shape, "training step", cost, timings["step"], peak=peak, group=group, **more)
    for name in ("naive", "naive, torch.compile"):
        if name in timings:
            other = timings[name].minus(timings["step"])
            yield settings.row("growth cost", shape, name, cost, other, peak=peak, group=group, **more)


def _compiled(plain: Variant, case: Case, units: dict[str, int]) -> Variant:
    """The naive step with its forward and backward pass compiled before the clock starts."""
    loss = torch.compile(case.loss)
    naive_step(plain.prepare(0), units, loss)
    return Variant(lambda state: naive_step(state, units, loss), plain.prepare, most=plain.most)


def _in_parts(trained: Trained) -> tuple[float, float]:
    """The armed step; ms of the observed passes with the solver, and of `Grower.step`."""
    started = time.perf_counter()
    with trained.grower.observe():
        trained.case.loss(trained.model).backward()
    observed = time.perf_counter()
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    stepping = time.perf_counter()
    trained.grower.step()
    return (observed - started) * 1000, (time.perf_counter() - stepping) * 1000


def _everywhere(
    settings: Settings, case: Case, model: nn.Module, sites: fg.Sites, label: str, fraction: float
) -> Iterator[Row]:
    """Residual streams and all: sites that the naive way cannot grow."""
    variants = {
        "step": Variant(step, lambda _: prepared(case, model, sites, fraction)),
        "armed": Variant(grown, lambda _: armed(case, model, sites, fraction)),
    }
    timings = compare(variants, settings.device, settings.times(min(settings.rounds, 3)))
    shape = f"{case.name}, all {len(sites)} sites, {label}"
    yield settings.row(
        "growth cost",
        shape,
        "training step",
        timings["armed"].minus(timings["step"]),
        timings["step"],
        group="streams",
        step_ms=timings["step"].p50,
        armed_ms=timings["armed"].p50,
    )


def _gromo(settings: Settings) -> Iterator[Row]:
    """One site each: GroMo cannot grow two of a chain in one step. Its cost is that beyond its own step."""
    device = settings.device
    if settings.quick:
        chains = [
            ("conv", "conv 4-4-4", conv_chain(4, 2, 4), (4, 4, 8, 8)),
            ("linear", "linear 8-8-8", mlp(8, 1, 8), (4, 8)),
        ]
    else:
        chains = [
            ("conv", "conv 64-64-64, 32x32, b32", conv_chain(64, 2, 64), (32, 64, 32, 32)),
            ("linear", "linear 2048-2048-2048, b512", mlp(2048, 1, 2048), (512, 2048)),
        ]
    for group, name, plain, shape in chains:
        plain = plain.to(device)
        x = torch.randn(shape, device=device)
        y = torch.randint(0, plain(x).shape[1], shape[:1], device=device)
        yield _gromo_case(settings, Case(name, nn.Sequential, x, y, ()), plain, group)


def _gromo_case(settings: Settings, case: Case, plain: nn.Sequential, group: str) -> Row:
    sites = fg.find_sites(plain, case.x, include=list(gromo_layers(gromo_model(plain, case.x))))
    units = list(_units(plain, sites, 1 / 16).values())

    def theirs(_: int) -> nn.Sequential:
        return gromo_model(copy.deepcopy(plain), case.x)

    most = settings.times(1)
    variants = {
        "step": Variant(step, lambda _: prepared(case, plain, sites, 1 / 16)),
        "armed": Variant(grown, lambda _: armed(case, plain, sites, 1 / 16)),
        "their step": Variant(lambda model: case.loss(model).backward(), theirs, most=most),
        "their growth": Variant(lambda model: gromo_step(model, case.loss, units), theirs, most=most),
    }
    timings = compare(variants, settings.device, settings.times(settings.rounds))
    return settings.row(
        "growth cost",
        f"{case.name}, {len(sites)} sites, n/16",
        "GroMo",
        timings["armed"].minus(timings["step"]),
        timings["their growth"].minus(timings["their step"]),
        group=group,
        step_ms=timings["step"].p50,
    )
