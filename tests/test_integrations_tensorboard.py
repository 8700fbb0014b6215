"""TensorBoard scalars of a growing run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow.integrations.tensorboard import GrowthWriter

X = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(2))


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 3),
    )


class Recorder:
    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.setdefault(tag, []).append((step, float(value)))


def run(writer: object) -> fg.Grower:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    grower = fg.Grower(
        model,
        optimizer,
        example_inputs=X,
        when=fg.when.Every(2, times=2),
        where=fg.where.NAGN(threshold=0.0, max_new=2),
    )
    log = GrowthWriter(writer, grower)
    for _ in range(5):
        with grower.observe():
            F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
        log.write()
    return grower


def test_scalars_are_those_of_the_history() -> None:
    recorder = Recorder()
    grower = run(recorder)
    assert len(grower.history) == 2
    for site in grower.sites:
        points = recorder.scalars[f"fastgrow/width/{site.name}"]
        grown = [
            (report.step, entry.new_width)
            for report in grower.history
            for entry in report.sites
            if entry.name == site.name
        ]
        assert points == [(1, 4.0), *grown]
    assert recorder.scalars["fastgrow/parameters"] == [(r.step, r.parameters) for r in grower.history]
    assert recorder.scalars["fastgrow/growth_ms"] == [(r.step, 1e3 * r.seconds) for r in grower.history]
    nagn = {f"fastgrow/nagn_after_norm/{name}" for name in grower.history[0].evidence["nagn_after_norm"]}
    assert len(nagn) == 3
    assert nagn <= recorder.scalars.keys()
    assert any(tag.startswith("fastgrow/predicted_gain/") for tag in recorder.scalars)


def test_a_history_that_began_earlier_is_written_from_its_start() -> None:
    grower = run(Recorder())
    late = Recorder()
    log = GrowthWriter(late, grower)
    log.write()
    log.write()
    for entry in grower.history[0].sites:
        assert late.scalars[f"fastgrow/width/{entry.name}"][0] == (0, float(entry.old_width))
    assert len(late.scalars["fastgrow/parameters"]) == 2


def test_a_summary_writer(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        grower = run(writer)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("fastgrow/parameters")] == [r.step for r in grower.history]


# -- finalized models ----------------------------------------------------------------------------------
