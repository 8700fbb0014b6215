"""Measured gains and NORTH's ranks under DistributedDataParallel: two gloo processes against one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from gloo import WORLD, assert_same_bits, assert_within, found_by, joined
from test_distributed import CpuSyncBatchNorm
from tolerances import tolerance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import fastgrow as fg

BATCH = 12
UNEVEN = 4
"""Samples on rank 0 where the ranks' batches differ in size."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2)
        self.f, self.out = nn.Linear(5 * 9, 6), nn.Linear(6, 3)
        self.skipped = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.c2(torch.tanh(self.c1(x)))).flatten(1)
        if self.skipped:
            return x[:, :3]
        return self.out(F.gelu(self.f(x)))


def net(rank: int | None, **options: bool) -> nn.Module:
    torch.manual_seed(0)
    model = Net().double()
    return model if rank is None else DDP(model, **options)


def data(rank: int | None, first: int = BATCH // WORLD) -> tuple[Tensor, Tensor]:
    """The batch, or a rank's part of it; first: samples on rank 0."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(BATCH, 2, 8, 8, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (BATCH,), generator=generator)
    cut = {None: slice(None), 0: slice(0, first), 1: slice(first, None)}[rank]
    return x[cut], y[cut]


def told(reports: list[fg.GrowthReport]) -> dict[str, Tensor]:
    """Every number of the reports but their time."""
    found: dict[str, float] = {}
    for number, report in enumerate(reports):
        found[f"{number}.loss_change"] = report.loss_change if report.loss_change is not None else -1.0
        found[f"{number}.measured"] = report.measured_gain if report.measured_gain is not None else -1.0
        found[f"{number}.parameters"] = report.parameters
        for site in report.sites:
            for what in ("old_width", "new_width", "captured", "predicted_gain", "measured_gain"):
                value = getattr(site, what)
                found[f"{number}.{site.name}.{what}"] = -1.0 if value is None else value
        for site_name, story in report.evidence.get("explanation", {}).items():
            for what in ("phi", "baseline"):
                if what in story:
                    found[f"{number}.{site_name}.{what}"] = story[what]
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}


def measured(how: fg.how.How, rank: int | None) -> dict[str, Tensor]:
    """One growth with its gain; rank 0 draws for all."""
    x, y = data(rank)
    model = net(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    F.cross_entropy(model(x), y).backward()
    kept = gradients(model)
    torch.manual_seed(8 if rank else 7)
    sites = fg.find_sites(model, x)
    report = fg.grow(
        model,
        {"c1": 2, "f": 2},
        how,
        sites=sites,
        optimizer=optimizer,
        closure=lambda: F.cross_entropy(model(x), y),
        measure_gain=True,
    )
    after = gradients(model)
    for name, gradient in kept.items():
        assert torch.equal(after[name][tuple(slice(0, n) for n in gradient.shape)], gradient), name
    assert report.measured_gain is not None
    assert all(site.measured_gain is not None for site in report.sites)
    return {**told([report]), **states(model)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those that a flatten leaves in their places."""
    named = [(name, p.grad) for name, p in model.named_parameters() if "f.weight" not in name]
    return {name: grad.clone() for name, grad in named if grad is not None}


def states(model: nn.Module) -> dict[str, Tensor]:
    inner = model.module if isinstance(model, DDP) else model
    return inner.state_dict()


def in_the_loop(rank: int | None) -> dict[str, Tensor]:
    """A Grower that measures every growth, training in between."""
    x, y = data(rank)
    model = net(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    grower = fg.Grower(
        model,
        optimizer,
        example_inputs=x,
        when=fg.when.Every(2),
        where=fg.where.Everywhere(units=1),
        measure_gain=True,
    )
    for _ in range(5):
        with grower.observe():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step(closure=lambda: F.cross_entropy(model(x), y))
    assert [report.step for report in grower.history] == [2, 4]
    return {**told(grower.history), **states(model)}


def by_north(read: str, closed: bool, rank: int | None) -> dict[str, Tensor]:
    """Ranks with batches of different sizes: every sample counts the same. Twice, so that the baseline is used."""
    x, y = data(rank, UNEVEN)
    model = net(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    epsilon = 0.2 if read == "activations" else 0.01
    where = fg.where.NORTH(gamma=0.5, epsilon=epsilon, read=read)  # type: ignore[arg-type]
    grower = fg.Grower(model, optimizer, example_inputs=x, when=fg.when.Every(1, times=2), where=where)
    for _ in range(2):
        if closed:
            grower.step(closure=lambda: F.cross_entropy(model(x), y))
        else:
            with grower.observe():
                F.cross_entropy(model(x), y).backward()
            optimizer.zero_grad()
            grower.step()
    assert len(grower.history) == 2
    baseline = {f"state.{k}": torch.tensor(v) for k, v in where.state_dict()["baseline"].items()}
    return {**told(grower.history), **states(model), **baseline}


class Bags(nn.Module):
    """A flat text; its own bags gate the head, so that replaying the middle reads the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.f1, self.f2 = nn.EmbeddingBag(11, 4), nn.Linear(4, 5), nn.Linear(5, 5)
        self.shift, self.out = nn.EmbeddingBag(11, 1), nn.Linear(5, 3)

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        x = torch.tanh(self.f1(self.embedding(text, offsets)))
        return self.out(torch.tanh(self.f2(x) * self.shift(text, offsets)))


class NormedBags(Bags):
    """Solved on rank 0 with the batches of all as one. gated: the middle reads the text."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.norm, self.gated = CpuSyncBatchNorm(5), gated

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        x = F.silu(self.norm(self.f1(self.embedding(text, offsets))))
        return self.out(torch.tanh(self.f2(x * self.shift(text, offsets) if self.gated else x)))


def bags_of(rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """As many bags on both ranks, 8 words on one and 30 on the other."""
    lengths = [2, 3, 3, 10, 12, 8]
    cut = {None: slice(None), 0: slice(0, 3), 1: slice(3, None)}[rank]
    text = torch.randint(0, 11, (sum(lengths),), generator=torch.Generator().manual_seed(5))
    text = torch.cat(text.split(lengths)[cut])
    offsets = torch.tensor([0, *lengths[cut][:-1]]).cumsum(0)
    return text, offsets, torch.tensor([0, 1, 2, 2, 1, 0])[cut]


def flat_texts(rank: int | None) -> dict[str, Tensor]:
    """A bag is a sample, a word is none."""
    text, offsets, y = bags_of(rank)
    torch.manual_seed(0)
    model = Bags().double()
    sites = fg.find_sites(model, (text, offsets), include=["f1", "f2"])
    called = model if rank is None else DDP(model)
    with fg.observe(called, sites, rank=2) as seen:
        F.cross_entropy(called(text, offsets), y).backward()
    assert seen.samples == 6
    found = {f"{name}.values": one.values for name, one in seen.directions(2).items()}
    nagn = {f"{name}.nagn": torch.tensor(seen.nagn[name], dtype=torch.float64) for name in ("f1", "f2", "out")}
    return {**found, **nagn}


def synced_bags(rank: int | None) -> dict[str, Tensor]:
    text, offsets, y = bags_of(rank)
    torch.manual_seed(0)
    model = NormedBags(False).double()
    sites = fg.find_sites(model, (text, offsets), include="f1")
    with mock.patch.object(DDP, "_passing_sync_batchnorm_handle"):  # it refuses the CPU
        called = model if rank is None else DDP(model)
        with fg.observe(called, sites, rank=2) as seen:
            F.cross_entropy(called(text, offsets), y).backward()
    return {"values": seen.directions(2)["f1"].values}


COMPARED: dict[str, Callable[[int | None], dict[str, Tensor]]] = {
    "gain of GradMax": lambda rank: measured(fg.how.GradMax(bias=True), rank),
    "gain of Random": lambda rank: measured(fg.how.Random(), rank),
    "gain of VarianceTransfer": lambda rank: measured(fg.how.VarianceTransfer(), rank),
    "gain of Firefly": lambda rank: measured(fg.how.Firefly(), rank),
    "gains in the loop": in_the_loop,
    "NORTH in the loop": lambda rank: by_north("activations", False, rank),
    "NORTH by a closure": lambda rank: by_north("activations", True, rank),
    "flat texts": flat_texts,
    "synchronised flat texts": synced_bags,
    "NORTH by weights": lambda rank: by_north("weights", False, rank),
}


def ran_on_one(rank: int) -> dict[str, Tensor]:
    """Rank 1 never calls a site's consumer: the ranks are those of rank 0's samples."""
    x, y = data(rank)
    model = net(rank, find_unused_parameters=True)
    sites = fg.find_sites(model, x)
    model.module.skipped = rank == 1
    where = fg.where.NORTH(gamma=0.5, epsilon=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    grower = fg.Grower(
        model, optimizer, sites=sites, when=fg.when.Every(1, times=1), where=where, how=fg.how.ZeroOutgoing()
    )
    with grower.observe():
        F.cross_entropy(model(x), y).backward()
    assert grower.step() is not None
    found = told(grower.history)
    own = net(None)
    part, labels = data(0)
    alone = fg.Grower(
        own,
        torch.optim.SGD(own.parameters(), lr=0.0),
        sites=fg.find_sites(own, part),
        when=fg.when.Every(1, times=1),
        where=fg.where.NORTH(gamma=0.5, epsilon=0.2),
        how=fg.how.ZeroOutgoing(),
    )
    alone.step(closure=lambda: F.cross_entropy(own(part), labels))
    assert torch.equal(found["0.f.phi"], told(alone.history)["0.f.phi"])
    return found


def never_ran(rank: int) -> dict[str, Tensor]:
    """No rank calls a consumer: an error on both."""
    x, y = data(rank)
    model = net(rank, find_unused_parameters=True)
    sites = fg.find_sites(model, x)
    model.module.skipped = True
    grower = fg.Grower(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        sites=sites,
        when=fg.when.Every(1, times=1),
        where=fg.where.NORTH(),
        how=fg.how.ZeroOutgoing(),
    )
    with grower.observe():
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(fg.GrowthError, match="no activation of site 'c2' was seen"):
        grower.step()
    return states(model)


def failing_closure(rank: int) -> dict[str, Tensor]:
    """A closure that fails on rank 1 only: before growth nothing changes, after it the growth stands; no rank waits."""
    x, y = data(rank)
    model = net(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sites = fg.find_sites(model, x)
    calls = 0

    def failing_at(call: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            if rank == 1 and calls == call:
                raise OSError("no batch")
            return F.cross_entropy(model(x), y)

        return closure

    error: type[Exception] = OSError if rank else fg.GrowthError
    message = "no batch" if rank else "rank 1 could not compute the closure's loss.*no batch"
    before = {name: value.clone() for name, value in states(model).items()}
    # calls: the loss before, the gradient after, three sites, all together
    for call, grown in ((1, 0), (2, 1), (4, 1)):
        grower = fg.Grower(
            model,
            optimizer,
            sites=sites,
            when=fg.when.Every(1),
            where=fg.where.Everywhere(units=1),
            how=fg.how.ZeroOutgoing(),
            measure_gain=True,
        )
        calls = 0
        with pytest.raises(error, match=message):
            grower.step(closure=failing_at(call))
        assert len(grower.history) == grown
        if not grown:
            for name, value in states(model).items():
                assert torch.equal(value, before[name])
    wanted = "no batch" if rank else "rank 1 could not grow.*no batch"
    for known in (sites, None):
        calls = 0
        with pytest.raises(error, match=wanted):
            fg.grow(model, {"f": 1}, sites=known, closure=failing_at(1))
    return states(model)


def texts_read_together(rank: int) -> dict[str, Tensor]:
    """Offsets of several ranks are those of no one text."""
    text, offsets, y = bags_of(rank)
    model = NormedBags(True).double()
    sites = fg.find_sites(model, (text, offsets), include="f1")
    with mock.patch.object(DDP, "_passing_sync_batchnorm_handle"):
        called = DDP(model)
        with (
            pytest.raises(fg.GrowthError, match="the model's input '(text|offsets)' was not seen"),
            fg.observe(called, sites, rank=2),
        ):
            F.cross_entropy(called(text, offsets), y).backward()
    return {}


def sharded(rank: int) -> dict[str, Tensor]:
    """Refused before anything has changed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x, y = data(rank)
    model = net(None)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    before = [id(parameter) for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(fg.GrowthError, match="measure_gain=True moves parameters in place, which fully_shard"):
        fg.grow(
            model,
            {"f": 1},
            sites=fg.find_sites(model, x),
            optimizer=optimizer,
            closure=lambda: F.cross_entropy(model(x), y),
            measure_gain=True,
        )
    assert [id(parameter) for parameter in model.parameters()] == before
    return {}


def worker(rank: int, folder: str) -> None:
    with joined(rank, folder) as path:
        results = {name: scenario(rank) for name, scenario in COMPARED.items()}
        results["ran on one"] = ran_on_one(rank)
        results["never ran"] = never_ran(rank)
        results["read together"] = texts_read_together(rank)
        results["sharded"] = sharded(rank)
        results["failing"] = failing_closure(rank)
        torch.save(results, path / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[dict[str, dict[str, Tensor]]]]:
    yield from found_by(worker)


def test_both_ranks_report_the_same_bits(ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    assert_same_bits(ranks)


@pytest.mark.parametrize("scenario", COMPARED)
def test_two_ranks_report_what_one_process_reports(ranks: list[dict[str, dict[str, Tensor]]], scenario: str) -> None:
    # Singular vectors move by the rounding over the relative gap; no gap of these nets is below 1e-3.
    relative = tolerance(torch.float64, 64 * BATCH) / 1e-3
    expected = COMPARED[scenario](None)
    found = ranks[0][scenario]
    assert found.keys() == expected.keys()
    assert_within(relative, found, expected)
