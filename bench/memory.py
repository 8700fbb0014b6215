"""The most memory a growth step holds at once, against a training step of the same model and batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import fastgrow as fg

from .growth import Trained, armed, naive_step, prepared, step
from .measure import peak_bytes
from .models import Case, cases
from .rows import Row, Settings

__all__ = ["run"]


def run(settings: Settings) -> Iterator[Row]:
    for case in cases(settings):
        torch.manual_seed(0)
        model = case.build().to(settings.device)
        sites = fg.find_sites(model, case.x, include=[pair.producer for pair in case.pairs])
        for label, fraction in (("n/16", 1 / 16), ("n/4", 1 / 4)):
            training = _peak(partial(prepared, case, model, sites, fraction), step, settings)
            growing = _peak(partial(armed, case, model, sites, fraction), step, settings)
            shape = f"{case.name}, {len(sites)} sites, {label}"
            yield settings.row("peak memory", shape, "training step", peak=growing, baseline_peak=training)
            training, growing = (
                _peak(partial(_grown_once, case, model, sites, fraction, more), step, settings) for more in (1, 2)
            )
            shape = f"{shape}, second growth"
            yield settings.row("peak memory", shape, "training step", peak=growing, baseline_peak=training)
        if case.naive and settings.cuda:  # on a CPU its SVDs would take the whole run
            units = {name: max(1, width // 16) for name, width in sites.widths(model).items()}
            growing = _peak(partial(armed, case, model, sites, 1 / 16), step, settings)
            theirs = _peak(partial(prepared, case, model, sites, 1 / 16), partial(naive_step, units=units), settings)
            shape = f"{case.name}, {len(sites)} sites, n/16"
            yield settings.row("peak memory", shape, "naive", peak=growing, baseline_peak=theirs)


def _grown_once(case: Case, model: nn.Module, sites: fg.Sites, fraction: float, more: int) -> Trained:
    """So many steps after the first growth, which solved at the end of its block: the third will grow again."""
    trained = armed(case, model, sites, fraction)
    for _ in range(1 + more):
        step(trained)
    return trained


def _peak(make: Callable[[], Trained], run: Callable[[Trained], object], settings: Settings) -> int:
    """Bytes of model, optimizer state and batch, and what the step adds to them."""
    held = 0

    def prepare() -> Trained:
        nonlocal held
        trained = make()
        held = _held(trained)
        return trained

    return peak_bytes(run, settings.device, prepare) + held


def _held(trained: Trained) -> int:
    model: nn.Module = trained.model
    state = [v for entry in trained.optimizer.state.values() for v in entry.values()]
    return _bytes((*model.parameters(), *model.buffers(), *state, trained.case.x, trained.case.y))


def _bytes(values: Iterable[object]) -> int:
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in values if isinstance(v, Tensor)}
    return sum(storages.values())
