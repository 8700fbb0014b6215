"""The loop: a trigger arms, the next observation measures, the step after it grows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from nets import Plain, Residual, image_batch
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg


def run(grower: fg.Grower, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> list[int]:
    """Ordinary training steps; the ones on which the model grew."""
    grown = []
    (optimizer,) = grower.optimizers
    for _ in range(steps):
        with grower.observe():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if grower.step() is not None:
            grown.append(grower.steps)
    return grown


def setup(model: nn.Module | None = None, **options: object) -> tuple[fg.Grower, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = model or Residual()
    x, y = image_batch(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options.setdefault("where", fg.where.Everywhere(units=1))
    return fg.Grower(model, optimizer, example_inputs=x, **options), model, x, y  # type: ignore[arg-type]


def test_growth_comes_on_the_very_steps() -> None:
    grower, model, x, y = setup(when=fg.when.Every(4, start=3, times=2))
    assert run(grower, model, x, y, 12) == [3, 7]
    assert [report.step for report in grower.history] == [3, 7]
    assert grower.sites.widths(model) == {"stem": 6, "a1": 5, "down": 8}
    assert all(site.captured is not None and site.captured >= 0.999 for r in grower.history for site in r.sites)
    assert all(site.predicted_gain > 0 for r in grower.history for site in r.sites)  # type: ignore[operator]
    assert [s.old_width for s in grower.history[1].sites] == [s.new_width for s in grower.history[0].sites]


def test_a_metric_arms_and_the_next_measured_step_grows() -> None:
    grower, model, x, y = setup(when=fg.when.Plateau(window=1, min_gain=3e-3, stop_gain=0.0))
    assert run(grower, model, x, y, 2) == []
    assert grower.step(metric=0.5) is None
    assert grower.steps == 2
    assert not grower.armed
    assert grower.step(metric=0.5) is None  # no gain: armed, and not yet measured
    assert grower.armed
    assert run(grower, model, x, y, 1) == [3]
    assert not grower.armed


def test_unarmed_observation_sets_no_hook() -> None:
    grower, model, x, y = setup(when=fg.when.Every(5))
    with grower.observe():
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        F.cross_entropy(model(x), y).backward()


def test_a_closure_grows_at_once() -> None:
    grower, model, x, y = setup(when=fg.when.Milestones([1]))
    report = grower.step(closure=lambda: F.cross_entropy(model(x), y))
    assert report is not None
    assert report.step == 1


def test_methods_without_gradients_need_no_observation() -> None:
    grower, model, *_ = setup(when=fg.when.Every(2), how=fg.how.ZeroOutgoing())
    for _ in range(2):
        report = grower.step()
    assert report is not None
    assert model.stem.out_channels == 5


def test_nagn_chooses_and_explains() -> None:
    layers: list[nn.Module] = []
    widths = [2, 8, 2, 8, 8]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    grower, model, x, y = setup(model, when=fg.when.Every(3), where=fg.where.NAGN(monotone=False))
    run(grower, model, x, y, 3)
    (report,) = grower.history
    assert "3" in {site.name for site in report.sites}  # the planted bottleneck
    assert set(report.evidence["explanation"]) == {site.name for site in grower.sites}
    assert set(report.evidence["nagn_after_norm"]) == set(grower.sites.layers)


def test_caps_of_the_whole_network_hold_exactly() -> None:
    cap = 700
    where = fg.where.Everywhere(units=2, max_parameters=cap)
    grower, model, x, y = setup(when=fg.when.Every(1), where=where)
    run(grower, model, x, y, 6)
    count = sum(p.numel() for p in model.parameters())
    assert grower.history
    assert grower.history[-1].parameters == count <= cap


def test_micro_batches_equal_the_whole_batch() -> None:
    results = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = Plain().double()
        x, y = image_batch()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        grower = fg.Grower(
            model,
            optimizer,
            example_inputs=x,
            when=fg.when.Every(1),
            where=fg.where.Everywhere(units=1),
            accumulation=parts,
            how=fg.how.GradMax(norm="fixed", scale=1.0),
        )
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with grower.observe():
                F.cross_entropy(model(xs), ys).backward()
        optimizer.step()
        assert grower.step() is not None
        results.append(model.conv2.weight.detach()[:, -1])
    assert abs(F.cosine_similarity(results[0].flatten(), results[1].flatten(), dim=0).item()) > 0.9999


def test_an_overflowed_batch_is_dropped_under_a_scaler_and_the_growth_waits() -> None:
    class Scaler:
        def get_scale(self) -> float:
            return 4.0

    grower, model, x, y = setup(when=fg.when.Every(1, times=1), loss_scale=Scaler())
    with grower.observe():
        (F.cross_entropy(model(x), y) * float("inf")).backward()
    assert grower.step() is None
    assert grower.armed
    model.zero_grad()
    with grower.observe():
        (4.0 * F.cross_entropy(model(x), y)).backward()
    assert grower.step() is not None


def test_a_failed_growth_disarms_and_keeps_the_policy() -> None:
    grower, model, x, y = setup(when=fg.when.Every(1, times=1), where=fg.where.RoundRobin(units=1))
    before = grower.where.state_dict()

    class Failing(fg.how.GradMax):
        def start(self, newborns: object) -> object:  # type: ignore[override]
            raise fg.GrowthError("no")

    grower.how = Failing()
    widths = grower.sites.widths(model)
    with pytest.raises(fg.GrowthError, match="no"):
        run(grower, model, x, y, 1)
    assert grower.where.state_dict() == before
    assert grower.sites.widths(model) == widths
    assert not grower.history


def test_state_goes_on_where_it_stood() -> None:
    torch.manual_seed(0)
    grower, model, x, y = setup(when=fg.when.Every(4, times=2))
    run(grower, model, x, y, 5)
    other, *_ = setup(Residual(), when=fg.when.Every(4, times=2))
    other.load_state_dict(grower.state_dict())
    assert other.steps == 5
    assert [str(r) for r in other.history] == [str(r) for r in grower.history]
    assert not other.armed


def test_a_measurement_waits_for_its_growth_when_a_step_is_left_out() -> None:
    """A GradScaler skips a step, its batch was observed all the same: what was measured is not thrown away."""
    grower, model, x, y = setup(when=fg.when.Every(5, times=1), batches=3)
    seen: list[int] = []
    _grow = grower._grow

    def growing(closure: Any) -> Any:
        seen.append(grower._seen.samples)  # type: ignore[union-attr]
        return _grow(closure)

    grower._grow = growing  # type: ignore[method-assign]
    run(grower, model, x, y, 2)
    with grower.observe():
        F.cross_entropy(model(x), y).backward()
    assert run(grower, model, x, y, 3) == [5]
    assert seen == [3 * len(x)]


def before_batches(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it was saved before the Grower knew `batches` and measured gains."""
    old = {name: value for name, value in state.items() if name not in ("due", "asked")}
    measured = ("measured_gain", "loss_change")
    old["history"] = [
        {
            **{name: value for name, value in report.items() if name not in measured},
            "sites": [{name: v for name, v in site.items() if name not in measured} for site in report["sites"]],
        }
        for report in state["history"]
    ]
    return {**old, "armed": bool(state["due"])}


def test_a_state_from_before_batches_is_read_exactly() -> None:
    grower, model, x, y = setup(when=fg.when.Every(3, times=2))
    for _ in range(8):
        other, *_ = setup(when=fg.when.Every(3, times=2))
        other.load_state_dict(before_batches(grower.state_dict()))
        assert other.state_dict() == grower.state_dict()
        run(grower, model, x, y, 1)
    assert [report.step for report in grower.history] == [3, 6]


def test_what_a_metric_had_armed_before_batches_grows_on_the_next_step() -> None:
    grower, model, x, y = setup(when=fg.when.Plateau(window=1, min_gain=3e-3, stop_gain=0.0))
    run(grower, model, x, y, 2)
    grower.step(metric=0.5)
    grower.step(metric=0.5)
    other, model, x, y = setup(when=fg.when.Plateau(window=1, min_gain=3e-3, stop_gain=0.0))
    other.load_state_dict(before_batches(grower.state_dict()))
    assert run(other, model, x, y, 3) == [3]


def test_a_state_that_is_refused_changes_nothing() -> None:
    grower, model, x, y = setup(when=fg.when.Every(2), where=fg.where.Everywhere(units=1))
    run(grower, model, x, y, 5)
    other, *_ = setup(when=fg.when.Every(2), where=fg.where.RoundRobin(units=1))
    before = other.state_dict()
    with pytest.raises(fg.GrowthError, match="where.RoundRobin"):
        other.load_state_dict(grower.state_dict())
    lacking = {name: value for name, value in grower.state_dict().items() if name not in ("due", "when")}
    with pytest.raises(fg.GrowthError, match="the state lacks due, when"):
        other.load_state_dict(lacking)
    assert other.state_dict() == before


def test_what_it_needs_is_said() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(fg.GrowthError, match="example_inputs"):
        fg.Grower(model, optimizer, when=fg.when.Every(1))
    with pytest.raises(fg.GrowthError, match="nothing in the model can grow.*output"):
        fg.Grower(model, optimizer, example_inputs=torch.randn(2, 3), when=fg.when.Every(1))


def test_sites_are_found_once_however_often_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    exports = []
    export = torch.export.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        exports.append(args)
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 4)
    grower = fg.Grower(
        model, optimizer, example_inputs=x, when=fg.when.Every(1, times=3), where=fg.where.Everywhere(units=1)
    )
    for _ in range(4):
        with grower.observe():
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
    assert [report.sites[0].new_width for report in grower.history] == [7, 8, 9]
    assert len(exports) == 1
