"""Gains are of the learning rate that the new units themselves are trained at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg

RATES = {"0": 0.1, "2": 0.3, "4": 1.0}


def one(model: nn.Sequential) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def groups(model: nn.Sequential) -> Any:
    """The last layer's group first."""
    named = reversed(RATES.items())
    return torch.optim.SGD([{"params": model.get_submodule(name).parameters(), "lr": rate} for name, rate in named])


def several(model: nn.Sequential) -> Any:
    named = reversed(RATES.items())
    return [torch.optim.SGD(model.get_submodule(name).parameters(), lr=rate) for name, rate in named]


def nobody(model: nn.Sequential) -> Any:
    """The grown layers train with no optimizer that was given."""
    return torch.optim.SGD(model[4].parameters(), lr=1.0)


def net() -> tuple[nn.Sequential, Tensor, Tensor, fg.Sites]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = torch.randn(16, 4).double(), torch.randn(16, 1).double()
    return model, x, y, fg.find_sites(model, x)


def grown(build: Callable[[nn.Sequential], Any], how: fg.how.How, scale: float = 1.0, **options: Any) -> Any:
    model, x, y, sites = net()
    optimizer = build(model)
    for each in optimizer if isinstance(optimizer, list) else [optimizer]:
        for group in each.param_groups:
            group["lr"] *= scale
    report = fg.grow(
        model, {"0": 2}, how, sites=sites, optimizer=optimizer, closure=lambda: F.mse_loss(model(x), y), **options
    )
    F.mse_loss(model(x), y).backward()
    return report, model, (x, y)


@pytest.mark.parametrize("build", [one, groups, several])
def test_the_prediction_is_of_the_group_that_learns_first(build: Callable[[nn.Sequential], Any]) -> None:
    report, model, _ = grown(build, fg.how.GradMax(bias=True))
    squares = sum(p.grad[8:].square().sum() for p in model[0].parameters())
    assert report.predicted_gain == pytest.approx(0.1 * float(squares), rel=1e-9)
    report, model, _ = grown(build, fg.how.GradMaxOpt(form="incoming", steps=5))
    rate = 0.1 if build is one else 0.3
    assert report.predicted_gain == pytest.approx(rate * float(model[2].weight.grad[:, 8:].square().sum()), rel=1e-6)


@pytest.mark.parametrize("build", [groups, several])
def test_each_tensor_is_measured_at_its_own_rate(build: Callable[[nn.Sequential], Any]) -> None:
    report, model, (x, y) = grown(build, fg.how.Net2Net(), scale=1e-4, measure_gain=True)
    loss = F.mse_loss(model(x), y)
    first, second = (RATES[name] * 1e-4 for name in ("0", "2"))
    into = sum(first * float(p.grad[8:].square().sum()) for p in model[0].parameters())
    out = second * float(model[2].weight.grad[:, 8:].square().sum())
    assert report.predicted_gain == pytest.approx(into + out, rel=1e-9)
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[8:] -= first * parameter.grad[8:]
        model[2].weight[:, 8:] -= second * model[2].weight.grad[:, 8:]
    assert report.measured_gain == pytest.approx(float(loss - F.mse_loss(model(x), y)), rel=1e-6)


def test_what_no_optimizer_trains_gains_nothing() -> None:
    report, *_ = grown(nobody, fg.how.GradMax())
    assert report.predicted_gain is None
    report, *_ = grown(nobody, fg.how.GradMax(), measure_gain=True)
    assert (report.predicted_gain, report.measured_gain) == (0.0, 0.0)


def test_groups_without_a_rate_predict_nothing_and_measure_nothing() -> None:
    def unrated(model: nn.Sequential) -> Any:
        optimizer = one(model)
        optimizer.param_groups[0]["lr"] = None
        return optimizer

    model, x, y, sites = net()
    report = fg.grow(model, {"0": 2}, sites=sites, optimizer=unrated(model), closure=lambda: F.mse_loss(model(x), y))
    assert report.predicted_gain is None
    for optimizer in (unrated(model), None):
        with pytest.raises(fg.GrowthError, match="whose param groups have lr"):
            fg.grow(
                model,
                {"0": 2},
                sites=sites,
                optimizer=optimizer,
                closure=lambda: F.mse_loss(model(x), y),
                measure_gain=True,
            )


def test_an_inserted_layer_gains_at_the_rate_of_the_group_it_joins() -> None:
    model, x, y, _ = net()
    report = fg.insert_layer(
        model, "0", units=2, example_inputs=x, optimizer=groups(model), closure=lambda: F.mse_loss(model(x), y)
    )
    F.mse_loss(model(x), y).backward()
    new = model.get_submodule(report.sites[0].name)
    assert report.predicted_gain == pytest.approx(0.1 * float(new.weight.grad.square().sum()), rel=1e-6)
