"""More units than the growth matrix has rank, under DistributedDataParallel: the network of one process, trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gloo import WORLD, assert_same_bits, assert_within, found_by, joined
from tolerances import tolerance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import fastgrow as fg

BATCH, OUTS, STEPS = 16, 3, 6


def squared(output: Tensor, y: Tensor) -> Tensor:
    return (output - F.one_hot(y, OUTS)).square().mean()


# Adam divides rounding by its own size where a gradient is zero but for rounding: along the sum of all logits, which no
# softmax sees. There SGD alone stays with one process.
SCENARIOS: dict[str, tuple[type[torch.optim.Optimizer], Any]] = {
    "adamw_squared_loss": (torch.optim.AdamW, squared),
    "sgd_cross_entropy": (torch.optim.SGD, F.cross_entropy),
}


def trained(scenario: str, rank: int | None) -> dict[str, Tensor]:
    optimizer_class, criterion = SCENARIOS[scenario]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(BATCH, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(0, OUTS, (BATCH,), generator=generator)
    chosen = slice(None) if rank is None else slice(rank, None, WORLD)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, OUTS)).double()
    called = model if rank is None else DDP(model)
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    grower = fg.Grower(
        called, optimizer, example_inputs=x, when=fg.when.Every(2, times=2), where=fg.where.Everywhere(units=8)
    )
    for _ in range(STEPS):
        with grower.observe():
            criterion(called(x[chosen]), y[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
    assert [report.sites[0].random_units for report in grower.history] == [8 - OUTS] * 2
    return model.state_dict()


def worker(rank: int, folder: str) -> None:
    with joined(rank, folder) as shared:
        torch.save({scenario: trained(scenario, rank) for scenario in SCENARIOS}, shared / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[dict[str, dict[str, Tensor]]]]:
    yield from found_by(worker)


def test_both_ranks_hold_the_same_bits(ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    assert_same_bits(ranks)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_ranks_train_what_one_process_trains(ranks: list[dict[str, dict[str, Tensor]]], scenario: str) -> None:
    # Singular vectors move by the rounding over the relative gap; no gap of these nets is below 1e-3.
    relative = tolerance(torch.float64, 64 * BATCH) / 1e-3
    assert_within(relative, ranks[0][scenario], trained(scenario, None))
