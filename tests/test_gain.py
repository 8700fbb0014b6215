"""Gains measured beside those predicted, by hand and by brute force; ranks for where.NORTH from the Grower."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from nets import Plain, Residual, image_batch, small
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow.where import effective_dimension


def _setup(model: nn.Module) -> tuple[nn.Module, Tensor, Tensor, fg.Sites]:
    model = model.double()
    x, y = image_batch()
    return model, x, y, fg.find_sites(model, x)


def _grown(
    rate: float, model: nn.Module, units: dict[str, int], how: fg.how.How
) -> tuple[fg.GrowthReport, nn.Module, Tensor, Tensor]:
    model, x, y, sites = _setup(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    report = fg.grow(
        model,
        units,
        how,
        sites=sites,
        optimizer=optimizer,
        closure=lambda: F.cross_entropy(model(x), y),
        measure_gain=True,
    )
    return report, model, x, y


def test_one_site_is_measured_as_by_hand() -> None:
    torch.manual_seed(0)
    report, model, x, y = _grown(0.1, Plain(), {"fc1": 2}, fg.how.GradMax())
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.fc1.weight[7:] -= 0.1 * model.fc1.weight.grad[7:]
        moved.fc1.bias[7:] -= 0.1 * model.fc1.bias.grad[7:]
        moved.fc2.weight[:, 7:] -= 0.1 * model.fc2.weight.grad[:, 7:]
    by_hand = (loss - F.cross_entropy(moved(x), y)).item()
    assert by_hand > 0
    assert report.sites[0].measured_gain == pytest.approx(by_hand, rel=1e-9)
    assert report.measured_gain == report.sites[0].measured_gain
    assert report.loss_change == pytest.approx(0.0, abs=1e-12)


def test_prediction_and_measurement_meet_for_small_steps() -> None:
    """GradMax with bias=True predicts all that the new entries' gradient holds; the rest is the curvature's."""
    for rate, tolerance in ((1e-2, 0.2), (1e-6, 1e-4)):
        torch.manual_seed(0)
        report, *_ = _grown(rate, Plain(), {"conv2": 1, "fc1": 1}, fg.how.GradMax(bias=True))
        for site in report.sites:
            assert site.measured_gain == pytest.approx(site.predicted_gain, rel=tolerance)
        assert report.predicted_gain == sum(site.predicted_gain for site in report.sites)  # type: ignore[misc]
        # Both sites' entries at once: what lies between their new units counts once.
        assert report.measured_gain == pytest.approx(report.predicted_gain, rel=tolerance)


@pytest.mark.parametrize("how", [fg.how.Random(), fg.how.ZeroOutgoing(), fg.how.Net2Net()])
def test_methods_that_predict_nothing_get_the_gradients_prediction(how: fg.how.How) -> None:
    torch.manual_seed(0)
    report, *_ = _grown(1e-6, Plain(), {"fc1": 2}, how)
    (site,) = report.sites
    assert site.predicted_gain > 0  # type: ignore[operator]
    assert site.measured_gain == pytest.approx(site.predicted_gain, rel=1e-4)


def test_growth_that_changes_the_function_says_by_how_much() -> None:
    torch.manual_seed(0)
    model, x, y, sites = _setup(Plain())
    before = F.cross_entropy(model(x), y).item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = fg.grow(
        model,
        {"fc1": 2},
        fg.how.VarianceTransfer(),
        sites=sites,
        optimizer=optimizer,
        closure=lambda: F.cross_entropy(model(x), y),
        measure_gain=True,
    )
    assert report.loss_change == pytest.approx(F.cross_entropy(model(x), y).item() - before, rel=1e-9)
    assert report.loss_change != 0


def test_nothing_but_the_report_changes() -> None:
    """Batch norm, dropout, gradients and the random numbers after it are those of a growth without measuring."""
    found = []
    for measure in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.LazyLinear(3)
        )
        x, y = image_batch(dtype=torch.float32)
        model(x)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        F.cross_entropy(model(x), y).backward()
        kept = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        sites = fg.find_sites(model, x)
        report = fg.grow(
            model,
            {"0": 1},
            sites=sites,
            optimizer=optimizer,
            closure=lambda: F.cross_entropy(model(x), y),  # noqa: B023
            measure_gain=measure,
        )
        assert (report.measured_gain is not None) == measure
        for name, parameter in model.named_parameters():
            old = kept[name]
            grad = parameter.grad
            assert grad is not None
            assert torch.equal(grad[tuple(slice(0, n) for n in old.shape)], old) or name.startswith("5")
        found.append((model.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())
    assert torch.equal(found[0][1], found[1][1])


def test_the_grower_measures_every_growth() -> None:
    torch.manual_seed(0)
    model = Residual()
    x, y = image_batch(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    grower = fg.Grower(
        model,
        optimizer,
        example_inputs=x,
        when=fg.when.Every(2),
        where=fg.where.Everywhere(units=1),
        measure_gain=True,
    )
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(model(x), y)

    for _ in range(4):
        with grower.observe():
            closure().backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step(closure=closure)
    assert len(grower.history) == 2
    # 4 training steps; each growth: measured, before, after, three sites, together.
    assert calls == 4 + 2 * (1 + 1 + 1 + 3 + 1)
    for report in grower.history:
        assert report.measured_gain is not None
        assert report.loss_change == pytest.approx(0.0, abs=1e-5)
        assert all(site.measured_gain is not None and site.captured is not None for site in report.sites)
    state = grower.state_dict()
    again = fg.Grower(model, optimizer, sites=grower.sites, when=fg.when.Every(2), where=fg.where.Everywhere(units=1))
    again.load_state_dict(state)
    assert again.history == grower.history
    table = fg.report(grower.history)
    assert f"{grower.history[0].sites[0].measured_gain:.4g}" in table


def test_what_measuring_needs_is_said() -> None:
    model, x, y, sites = _setup(Plain())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = fg.Grower(
        model,
        optimizer,
        sites=sites,
        when=fg.when.Every(1),
        where=fg.where.Everywhere(units=1),
        how=fg.how.Random(),
        measure_gain=True,
    )
    widths = sites.widths(model)
    with pytest.raises(fg.GrowthError, match=r"closure="):
        grower.step()
    assert sites.widths(model) == widths
    with pytest.raises(fg.GrowthError, match="optimizer="):
        fg.grow(model, {"fc1": 1}, sites=sites, closure=lambda: F.cross_entropy(model(x), y), measure_gain=True)
    assert sites.widths(model) == widths


# -- where.NORTH reads ranks --------------------------------------------------------------------------------


def _features(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    relu = torch.relu
    first = relu(model.bn0(model.stem(x)))
    inner = relu(model.bn1(model.a1(first)))
    second = relu(first + model.bn2(model.a2(inner)))
    last = relu(model.down(second) + model.b1(second))
    return {"stem": first, "a1": inner, "down": last.mean((2, 3))}  # the head reads the pooled map


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("how", [fg.how.GradMax(), fg.how.ZeroOutgoing()])
def test_north_grows_in_a_loop(closed: bool, how: fg.how.How) -> None:
    torch.manual_seed(0)
    model = Residual()
    x, y = image_batch(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    where = fg.where.NORTH(gamma=0.5, epsilon=0.05)
    grower = fg.Grower(model, optimizer, example_inputs=x, when=fg.when.Every(1), where=where, how=how)
    wanted = {name: effective_dimension(h, 0.05) for name, h in _features(copy.deepcopy(model), x).items()}
    if closed:
        report = grower.step(closure=lambda: F.cross_entropy(model(x), y))
    else:
        with grower.observe():
            F.cross_entropy(model(x), y).backward()
        report = grower.step()
    assert report is not None
    story = report.evidence["explanation"]
    widths = {"stem": 4, "a1": 3, "down": 6}
    assert {name: round(story[name]["phi"] * width) for name, width in widths.items()} == wanted
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_north_reads_weights_without_a_pass() -> None:
    model = Residual()
    x, _ = image_batch(dtype=torch.float32)
    with torch.no_grad():
        model.a1.weight[1] = 2 * model.a1.weight[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    where = fg.where.NORTH(gamma=0.1, epsilon=1e-4, read="weights", baseline=1.0)
    how = fg.how.ZeroOutgoing()
    grower = fg.Grower(model, optimizer, example_inputs=x, when=fg.when.Every(1), where=where, how=how)
    report = grower.step()
    assert report is not None
    story = report.evidence["explanation"]
    assert {name: story[name]["phi"] for name in story} == pytest.approx({"stem": 1.0, "a1": 2 / 3, "down": 4 / 6})


def test_north_counts_a_flattened_map_by_channel() -> None:
    model, x, y, sites = _setup(Plain())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    where = fg.where.NORTH(gamma=0.5, epsilon=0.05)
    grower = fg.Grower(model, optimizer, sites=sites, when=fg.when.Every(1), where=where)
    with grower.observe():
        F.cross_entropy(model(x), y).backward()
    report = grower.step()
    assert report is not None
    with torch.no_grad():
        fresh = copy.deepcopy(model)
        h = torch.tanh(fresh.conv2(torch.relu(fresh.conv1(x))))
    assert report.evidence["explanation"]["conv2"]["phi"] * 5 == effective_dimension(h[:, :5], 0.05)


# -- other policies that read what was observed -------------------------------------------------------------


def test_one_pool_over_sites_of_different_widths() -> None:
    """Each site is observed to a rank of its own; the pool takes what there is."""
    model, x, y, sites = _setup(Plain())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    where = fg.where.SingularValues(budget={"parameters": 150})
    grower = fg.Grower(model, optimizer, sites=sites, when=fg.when.Every(1), where=where)
    before = sum(p.numel() for p in model.parameters())
    with grower.observe():
        F.cross_entropy(model(x), y).backward()
    report = grower.step()
    assert report is not None
    assert before < report.parameters <= before + 150


def test_a_gain_that_arms_has_seen_what_the_policy_reads() -> None:
    torch.manual_seed(0)
    model = Residual()
    x, y = image_batch(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    where = fg.where.NAGN(monotone=False, read="before_norm", threshold=0.0)
    grower = fg.Grower(model, optimizer, example_inputs=x, when=fg.when.Gain(1e-9), where=where)
    with grower.observe():
        F.cross_entropy(model(x), y).backward()
    assert grower.armed
    assert grower.step() is not None


class Scaler:
    """A loss scale as a GradScaler has it, without its device."""

    def get_scale(self) -> float:
        return 1024.0


@pytest.mark.parametrize(
    ("scale", "factor", "accumulation", "reduction", "batches"),
    [(Scaler(), 1024.0, 1, "mean", 1), (1.0, 1.0, 4, "mean", 1), (0.25, 0.25, 4, "mean", 1), (1.0, 1.0, 2, "sum", 3)],
    ids=["scaler", "accumulated", "divided", "sums"],
)
def test_gains_do_not_move_with_scale_reduction_and_accumulation(
    scale: object, factor: float, accumulation: int, reduction: str, batches: int
) -> None:
    model, x, y = small()
    read: list[dict[str, float]] = []

    class Reading(fg.when.Gain):
        def gain(self, gains: Mapping[str, float]) -> bool:
            read.append(dict(gains))
            return False

    def first(accumulation: int, reduction: str, factor: float, **options: object) -> dict[str, float]:
        options["accumulation"], options["loss_reduction"] = accumulation, reduction
        grower = fg.Grower(
            model,
            None,
            sites=fg.find_sites(model, x),
            when=Reading(0.1),
            where=fg.where.Everywhere(units=2),
            **options,  # type: ignore[arg-type]
        )
        read.clear()
        while not read:
            model.zero_grad()
            for part in range(accumulation):
                rows = slice(part * 16 // accumulation, (part + 1) * 16 // accumulation)
                with grower.observe():
                    (F.mse_loss(model(x[rows]), y[rows], reduction=reduction) * factor).backward()
            grower.step()
        return read[0]

    plain = first(1, "mean", 1.0)
    assert first(accumulation, reduction, factor, loss_scale=scale, batches=batches) == pytest.approx(plain, rel=1e-10)
