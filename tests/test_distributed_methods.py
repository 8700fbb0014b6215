"""Every growth method and policy that reads gradients, under DDP: two gloo processes against one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from gloo import WORLD, found_by, joined
from tolerances import tolerance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import fastgrow as fg

BATCH = 12


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Softplus(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(rank: int | None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(BATCH, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (BATCH,), generator=generator)
    cut = slice(None) if rank is None else slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)
    return x[cut], y[cut]


HOWS: dict[str, Callable[[], fg.how.How]] = {
    "Firefly": lambda: fg.how.Firefly(),
    "Splitting": lambda: fg.how.Splitting(),
    "GradMaxOpt": lambda: fg.how.GradMaxOpt(),
    "GradMaxOpt incoming": lambda: fg.how.GradMaxOpt(form="incoming"),
    "TINY": lambda: fg.how.TINY(),
}
WHERES = {
    "FirstOrderGain": lambda: fg.where.FirstOrderGain(2),
    "SingularValues": lambda: fg.where.SingularValues(2),
}


def grown(name: str, rank: int | None) -> dict[str, Tensor]:
    x, y = data(rank)
    model = net()
    sites = fg.find_sites(model, x)
    called = model if rank is None else DDP(model)
    torch.manual_seed(8 if rank else 7)  # rank 0 draws for all
    fg.grow(called, {"2": 2}, HOWS[name](), sites=sites, closure=lambda: F.cross_entropy(called(x), y))
    return model.state_dict()


def placed(name: str, rank: int | None) -> dict[str, Tensor]:
    x, y = data(rank)
    model = net()
    called = model if rank is None else DDP(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(7)
    grower = fg.Grower(
        called,
        optimizer,
        sites=fg.find_sites(model, x, include="2"),
        when=fg.when.Every(1, times=1),
        where=WHERES[name](),
    )
    for _ in range(2):
        with grower.observe():
            F.cross_entropy(called(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
    return model.state_dict()


SCENARIOS: dict[str, Callable[[int | None], dict[str, Tensor]]] = {
    **{name: lambda rank, name=name: grown(name, rank) for name in HOWS},
    **{name: lambda rank, name=name: placed(name, rank) for name in WHERES},
}


def worker(rank: int, folder: str) -> None:
    results: dict[str, dict[str, Tensor] | str] = {}
    with joined(rank, folder) as path:
        for name, scenario in SCENARIOS.items():
            try:
                results[name] = scenario(rank)
            except fg.GrowthError as error:
                results[name] = str(error)
        torch.save(results, path / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[dict[str, dict[str, Tensor] | str]]]:
    yield from found_by(worker)


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_ranks_grow_what_one_process_grows(ranks: list[dict[str, dict[str, Tensor] | str]], name: str) -> None:
    one, two = (rank[name] for rank in ranks)
    assert isinstance(one, dict), one
    assert isinstance(two, dict), two
    # Directions move by the rounding over the singular values' relative gap; none here is below 1e-3.
    relative = tolerance(torch.float64, 64 * BATCH) / 1e-3
    for key, expected in SCENARIOS[name](None).items():
        assert torch.equal(one[key], two[key]), key
        assert one[key].shape == expected.shape, key
        error = float((one[key] - expected).abs().max())
        assert error <= relative * max(1.0, float(expected.abs().max())), key
