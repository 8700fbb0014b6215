"""What policies and triggers read of sites behind norms is the same in training and in evaluation mode."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from where_cases import plain, spectra

import fastgrow as fg
from fastgrow import where


def net(norms: int) -> nn.Sequential:
    """A bottleneck of two units behind so many norms in series, wide layers without any behind it."""
    depthwise = [nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.BatchNorm2d(2), nn.ReLU()]
    return nn.Sequential(
        *(nn.Conv2d(3, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), *depthwise[: 3 * (norms - 1)]),
        *(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(288, 4)),
    ).double()


def settled(norms: int, seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Trained for 30 steps, its running statistics those of the batch."""
    torch.manual_seed(seed)
    model, x, y = net(norms), torch.randn(32, 3, 6, 6).double(), torch.randint(0, 4, (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        for _ in range(60):
            model(x)
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0  # further batches leave the statistics alone
    return model, x, y


def grown(model: nn.Module, x: Tensor, y: Tensor, policy: where.Where) -> fg.GrowthReport:
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    grower = fg.Grower(model, optimizer, example_inputs=x, when=fg.when.Every(1), where=policy)
    with grower.observe():
        F.cross_entropy(model(x), y).backward()
    report = grower.step()
    assert report is not None
    return report


def gains(report: fg.GrowthReport) -> dict[str, float]:
    return {name: said["gain"] for name, said in report.evidence["explanation"].items()}


@pytest.mark.parametrize("norms", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_whitened_gains_agree_in_both_modes(norms: int, seed: int) -> None:
    """They differ by the centring alone: of two means in 32 x 36 positions."""
    model, x, y = settled(norms, seed)
    found = [grown(model.train(mode), x, y, where.FirstOrderGain(2)) for mode in (True, False)]
    for name, gain in gains(found[0]).items():
        assert gain == pytest.approx(gains(found[1])[name], rel=0.02, abs=1e-12)
    assert [site.name for site in found[0].sites] == [site.name for site in found[1].sites]
    if norms == 2:
        assert [site.name for site in found[0].sites] == ["0"]  # the bottleneck, behind its norms


def test_a_factor_is_for_the_plain_spectrum_alone() -> None:
    spectrum = spectra({"l1": [3.0], "l2": [1.0]})
    evidence = plain({"l1": 8, "l2": 8}, natural=spectrum, directions=spectrum, norm_factor={"l1": 0.1})
    assert where.FirstOrderGain(1).units(evidence) == {"l1": 1}
    assert where.FirstOrderGain(1, whitened=False).units(evidence) == {"l2": 1}


@pytest.mark.parametrize("norms", [1, 2])
def test_singular_values_have_one_factor_for_each_norm_in_series(norms: int) -> None:
    model, x, y = settled(norms, 0)
    report = grown(model, x, y, where.SingularValues(2, cost="units"))
    factor = 1.0
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            variance = layer.get_buffer("running_var")
            factor *= float((layer.eps / (variance + layer.eps)).sqrt().mean())
    sites = fg.find_sites(model, x)
    with fg.observe(model, sites, growth=True, rank=2) as seen:
        F.cross_entropy(model(x), y).backward()
    values = seen.directions(2)["0"].values * factor
    best = report.evidence["explanation"]["0"]["best_gain_per_cost"]
    assert best == pytest.approx(float(values[0] ** 2), rel=1e-6)


@pytest.mark.parametrize("norms", [1, 2])
def test_gains_of_a_trigger_are_in_units_of_evaluation_mode(norms: int) -> None:
    model, x, y = settled(norms, 0)
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):  # of new channels: then both modes differ by the centring alone
            layer.get_buffer("running_var").fill_(1.0)
    read: list[dict[str, Any]] = []

    class Reading(fg.when.Gain):
        def gain(self, gains: Mapping[str, float]) -> bool:
            read.append(dict(gains))
            return False

    sites = fg.find_sites(model, x)
    for mode in (True, False):
        model.train(mode)
        grower = fg.Grower(model, None, sites=sites, when=Reading(0.1), where=where.Everywhere(units=2))
        model.zero_grad()
        with grower.observe():
            F.cross_entropy(model(x), y).backward()
        squares = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
        grower.step()
        read[-1] = {name: gain * squares for name, gain in read[-1].items()}  # the present ones differ by mode
    training, evaluation = read
    # the loss's own gradient is another one where present channels are normed by another variance
    assert 0.1 < training["0"] / evaluation["0"] < 10
