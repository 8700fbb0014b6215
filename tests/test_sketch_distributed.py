"""Sketches under DistributedDataParallel: the first batch chooses Omega for all ranks, the sums are reduced once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from gloo import WORLD, assert_same_bits, found_by, joined
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import fastgrow as fg

BATCHES, SAMPLES = 5, 12


def made() -> nn.Module:
    torch.manual_seed(0)
    widths = [96, 128, 96, 6]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(SAMPLES, 96, dtype=torch.float64, generator=generator),
            torch.randint(0, 6, (SAMPLES,), generator=generator),
        )
        for _ in range(BATCHES)
    ]


def sketched(rank: int, reduction: str = "mean", count: int = BATCHES, overflow: bool = False) -> dict[str, Tensor]:
    """Every rank sees half of each batch; one block holds the loop."""

    class Scaler:
        def get_scale(self) -> float:
            return 1.0

    model = made()
    sites = fg.find_sites(model, data()[0][0])
    ddp = DDP(model)
    batches = [(x[rank::WORLD], y[rank::WORLD]) for x, y in data()[:count]]
    scaling = {"loss_scale": Scaler()} if overflow else {}
    with fg.observe(ddp, sites, growth="sketch", rank=2, loss_reduction=reduction, **scaling) as seen:
        if overflow:
            factor = torch.inf if rank == 1 else 1.0
            (F.cross_entropy(ddp(batches[0][0]), batches[0][1]) * factor).backward()
        for x, y in batches:
            F.cross_entropy(ddp(x), y, reduction=reduction).backward()
    result = {f"{n}.{i}": t for n, one in seen.directions(2).items() for i, t in enumerate(one)}
    dropped = {"dropped": torch.tensor(seen.dropped), "samples": torch.tensor(seen.samples)}
    return {**result, **dropped}


def grown(rank: int) -> dict[str, Tensor]:
    """By a Grower, whose blocks are the steps; the model trains on."""
    model = made()
    ddp = DDP(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = fg.Grower(
        ddp,
        optimizer,
        example_inputs=data()[0][0],
        when=fg.when.Milestones([4]),
        where=fg.where.Everywhere(units=2),
        batches=4,
        growth="sketch",
    )
    for x, y in data():
        with grower.observe():
            F.cross_entropy(ddp(x[rank::WORLD]), y[rank::WORLD]).backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
    assert [report.step for report in grower.history] == [4]
    return model.state_dict()


def worker(rank: int, folder: str) -> None:
    with joined(rank, folder) as path:
        results = {
            "mean": sketched(rank),
            "sum": sketched(rank, "sum"),
            "one": sketched(rank, count=1),
            "overflow": sketched(rank, overflow=True),
            "grown": grown(rank),
        }
        torch.save(results, path / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[dict[str, dict[str, Tensor]]]]:
    yield from found_by(worker)


def truth(reduction: str, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    model = made()
    sites = fg.find_sites(model, batches[0][0])
    with fg.observe(model, sites, rank=96, loss_reduction=reduction) as seen:
        for x, y in batches:
            F.cross_entropy(model(x), y, reduction=reduction).backward()
    return {name: one.left * one.values @ one.right.T for name, one in seen.directions(6).items()}


def test_both_ranks_hold_the_same_bits(ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    assert_same_bits(ranks)
    assert ranks[0]["grown"]["0.weight"].shape[0] == 130


@pytest.mark.parametrize("scenario", ["mean", "sum", "one", "overflow"])
def test_two_ranks_find_the_directions_of_the_whole(ranks: list[dict[str, dict[str, Tensor]]], scenario: str) -> None:
    reduction = "sum" if scenario == "sum" else "mean"
    seen = ranks[0][scenario]
    batches = data()[: 1 if scenario == "one" else BATCHES]
    assert int(seen["dropped"]) == (1 if scenario == "overflow" else 0)
    exact = truth(reduction, batches)
    # all but the batch that chose Omega; for a sum the others stand for it
    later = truth(reduction, batches[1:] if len(batches) > 1 else batches)
    share = BATCHES / (BATCHES - 1) if scenario == "sum" else 1.0
    for name, whole in exact.items():
        left, values = seen[f"{name}.0"], seen[f"{name}.1"]
        matrix = whole if min(whole.shape) < 40 else later[name] * share
        best = torch.linalg.svdvals(matrix)[:2]
        if scenario == "overflow":  # one rank's half of the first batch is counted again
            assert (left.T @ whole).norm() > 0.9 * torch.linalg.svdvals(whole)[:2].norm()
            continue
        assert (left.T @ matrix).norm() > 0.98 * best.norm(), name
        torch.testing.assert_close(values, best, rtol=0.05, atol=0.0)
