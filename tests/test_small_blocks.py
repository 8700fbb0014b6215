"""Rate adaptation of blocks that are born small: they wait, as those born zero do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastgrow.kernels import block_update_cpu
from fastgrow.kernels.launch import triton_missing
from optim_reference import Reference, grow
from tolerances import tolerance
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
import fastgrow.optim as fo

ABSENT = triton_missing(torch.empty(0))
triton = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
built = pytest.mark.skipif(block_update_cpu.missing() is not None, reason=str(block_update_cpu.missing()))
BACKENDS = ["torch", pytest.param("triton", marks=triton), pytest.param("cpu", marks=built)]
STAGES = {1: torch.tensor([0, 0, 0, 0, 1, 1])}


def born(size: float, method: str, backend: str) -> tuple[Any, nn.Parameter, Reference]:
    """A matrix with two columns more, of this root mean square relative to the old ones'."""
    torch.manual_seed(0)
    value = torch.randn(5, 4, dtype=torch.float64)
    options: dict[str, Any] = {"lr": 0.05, "rate_adaptation": True}
    options |= {} if method == "SGD" else {"betas": (0.8, 0.9), "eps": 1e-3}
    optimizer = getattr(fo, method)([nn.Parameter(value.clone())], backend=backend, **options)
    reference = Reference(method, [value], **options)
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.randn_like(value)
    optimizer.step()
    reference.step([parameter.grad])
    new = torch.randn(5, 2, dtype=torch.float64)
    old = parameter.detach()
    new *= size * old.square().mean().sqrt() / new.square().mean().sqrt()
    index = {1: torch.arange(4)}
    parameter = grow(optimizer, parameter, torch.cat([old, new], 1), index, STAGES)
    reference.grow(0, torch.cat([reference.all[0].value, new], 1), index, STAGES)
    return optimizer, parameter, reference


@pytest.mark.parametrize("method", ["SGD", "Adam"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-3, 0.03, 0.04, 0.5, 2.0])
def test_small_blocks_wait_and_others_follow_the_rule(size: float, backend: str, method: str) -> None:
    optimizer, parameter, reference = born(size, method, backend)
    rate = optimizer.stage_rates(parameter)[1]
    assert rate == pytest.approx(0.05 * (1.0 if size < 1 / 32 else size * 0.5**0.5), rel=1e-9)  # of 10 entries to 20
    assert optimizer.state[parameter]["waiting"] == [0.0, float(size < 1 / 32)]
    for _ in range(5):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        reference.step([parameter.grad])
    error = (parameter.detach() - reference.all[0].value).abs().max()
    assert float(error) <= tolerance(torch.float64, 128) * float(parameter.detach().abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_block_is_told_by_its_first_step(backend: str) -> None:
    """Without a look at its rates before: the kernels' path decides on the device."""
    optimizer, parameter, reference = born(1e-3, "SGD", backend)
    parameter.grad = torch.randn_like(parameter)
    before = parameter.detach().clone()
    optimizer.step()
    torch.testing.assert_close(parameter.detach()[:, 4:], before[:, 4:] - 0.05 * parameter.grad[:, 4:])
    assert optimizer.state_dict()["state"][0]["waiting"] == [0.0, 1.0]
    del reference


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_block_follows_the_rule_once_it_is_as_large_as_the_seed(backend: str) -> None:
    optimizer, parameter, _ = born(1e-3, "SGD", backend)
    with torch.no_grad():
        parameter[:, 4:] = 3.0
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    norms = [parameter.detach()[:, part].norm() for part in (slice(4), slice(4, 6))]
    assert optimizer.stage_rates(parameter)[1] == pytest.approx(0.05 * float(norms[1] / norms[0]))
    with torch.no_grad():
        parameter[:, 4:] = 1e-6  # once followed, the rule holds whatever becomes of the block
    assert optimizer.stage_rates(parameter)[1] < 1e-6


HOWS: list[fg.how.How] = [fg.how.GradMax(), fg.how.GradMax(relu="pairs"), fg.how.Random(), fg.how.Firefly(steps=5)]


@pytest.mark.parametrize("how", HOWS, ids=["GradMax", "pairs", "Random", "Firefly"])
def test_units_behind_a_batch_norm_learn_under_rate_adaptation(how: fg.how.How) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    x, y = torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))
    optimizer = fo.SGD(model.parameters(), lr=0.1, momentum=0.9, rate_adaptation=True)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    train(5)
    fg.grow(model, {"0": 2}, how, sites=fg.find_sites(model, x), optimizer=optimizer, closure=loss)
    weight = model[3].get_parameter("weight")
    assert optimizer.stage_rates(weight)[1] == 0.1
    train(40)
    norms = weight.detach().transpose(0, 1).flatten(1).norm(dim=1)
    assert float(norms[8:].mean()) > 0.05 * float(norms[:8].mean())
