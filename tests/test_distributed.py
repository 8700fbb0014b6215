"""DistributedDataParallel: two gloo processes grow the network that one process grows on the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gloo import WORLD, assert_same_bits, assert_within, found_by, joined
from tolerances import tolerance
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import fastgrow as fg
from fastgrow.checkpoint import load, save
from fastgrow.distributed import replicas_of

STEPS = 3
BATCH = 12


class Net(nn.Module):
    """A module's ReLU, a function's ReLU, a flatten: plain maps, signed pairs, conv -> linear."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(2, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.c2 = nn.Conv2d(4, 4, 3, stride=2)
        self.f = nn.Linear(4 * 9, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.c2(self.relu(self.c1(x))))
        return self.out(F.relu(self.f(x.flatten(1))))


class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return SumOverRanks.forward(ctx, gradient)


class CpuSyncBatchNorm(nn.SyncBatchNorm):
    """torch's refuses tensors on the CPU; this one does what it does there."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
            )
        over = [dim for dim in range(input.dim()) if dim != 1]
        count = WORLD * input.numel() / input.shape[1]
        sums = torch.stack([input.sum(over), input.square().sum(over)])
        mean, square = SumOverRanks.apply(sums) / count
        shape = (1, -1, *[1] * (input.dim() - 2))
        normed = (input - mean.view(shape)) * (square - mean.square() + self.eps).rsqrt().view(shape)
        return normed * self.weight.view(shape) + self.bias.view(shape)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.norm, self.relu = nn.Conv2d(2, 4, 3), CpuSyncBatchNorm(4), nn.ReLU()
        self.c2, self.out = nn.Conv2d(4, 4, 3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.c2(self.relu(self.norm(self.c1(x))))).flatten(1))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def data(shape: tuple[int, ...] = (2, 8, 8)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(BATCH, *shape, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (BATCH,), generator=generator)


def part(rank: int | None) -> slice:
    return slice(None) if rank is None else slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def wrapped(model: nn.Module, rank: int | None, **options: Any) -> nn.Module:
    return model if rank is None else DDP(model, **options)


def train(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, steps: int = STEPS) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def grown_by_gradmax(rank: int | None) -> dict[str, Tensor]:
    x, y = (tensor[part(rank)] for tensor in data())
    model = made(Net)
    sites = fg.find_sites(model, x)
    called = wrapped(model, rank, bucket_cap_mb=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(called, optimizer, x, y)
    fg.grow(
        called,
        {"c1": 2, "c2": 2, "f": 2},
        sites=sites,
        optimizer=optimizer,
        closure=lambda: F.cross_entropy(called(x), y),
    )
    train(called, optimizer, x, y)
    momenta = {f"momentum.{name}": optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    return {**model.state_dict(), **momenta}


def grown_by_the_loop(rank: int | None) -> dict[str, Tensor]:
    """Sites and units chosen by NAGN, growth on the second step."""
    x, y = (tensor[part(rank)] for tensor in data())
    model = made(Net)
    called = wrapped(model, rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grower = fg.Grower(
        called,
        optimizer,
        example_inputs=x,
        when=fg.when.Every(2, times=1),
        where=fg.where.NAGN(threshold=0.0, max_new=2),
    )
    for _ in range(STEPS):
        with grower.observe():
            F.cross_entropy(called(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
    assert len(grower.history) == 1
    assert grower.model is called
    return model.state_dict()


def gates(rank: int | None) -> dict[str, Tensor]:
    """Solved on rank 0 with the tensors of all; the gates are random."""
    x, y = (tensor[part(rank)] for tensor in data((5,)))
    model = made(Gated)
    sites = fg.find_sites(model, x)
    called = wrapped(model, rank)
    torch.manual_seed(7 if not rank else 8)
    fg.grow(called, {sites[0].name: 2}, sites=sites, closure=lambda: F.cross_entropy(called(x), y))
    return model.state_dict()


def observed(rank: int | None) -> dict[str, Tensor]:
    """Ranks with batches of different sizes: every sample counts the same."""
    cut = {None: slice(None), 0: slice(0, 4), 1: slice(4, None)}[rank]
    x, y = (tensor[cut] for tensor in data())
    model = made(Net)
    sites = fg.find_sites(model, x)
    called = wrapped(model, rank)
    with fg.observe(called, sites, rank=2) as seen:
        F.cross_entropy(called(x), y).backward()
    assert seen.samples == BATCH
    found = {f"{name}.values": one.values for name, one in seen.directions(2).items()}
    nagn = {f"{name}.nagn": torch.tensor(value) for name, value in seen.nagn.items()}
    return {**found, **nagn}


def synced(rank: int | None) -> dict[str, Tensor]:
    """A batch norm over all ranks: new channels are centred over the whole batch."""
    x, y = (tensor[part(rank)] for tensor in data())
    model = made(Normed)
    sites = fg.find_sites(model, x)
    with mock.patch.object(DDP, "_passing_sync_batchnorm_handle"):  # it refuses the CPU
        called = wrapped(model, rank)
        fg.grow(called, {"c1": 2}, sites=sites, closure=lambda: F.cross_entropy(called(x), y))
    return {name: value for name, value in model.state_dict().items() if "running" not in name}


COMPARED: dict[str, Callable[[int | None], dict[str, Tensor]]] = {
    "gradmax": grown_by_gradmax,
    "loop": grown_by_the_loop,
    "observed": observed,
    "gates": gates,
    "synced": synced,
}


def random_growth(rank: int) -> dict[str, Tensor]:
    """What is drawn at random is the same on both ranks, and the wrapper is the same object, renewed."""
    x, y = (tensor[part(rank)] for tensor in data())
    model = made(Net)
    calls: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP does not read annotations that are strings
        calls.append(1)
        return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

    ddp = DDP(model, find_unused_parameters=True, bucket_cap_mb=2, gradient_as_bucket_view=True)
    ddp.register_comm_hook(None, hook)
    handle = ddp.register_forward_pre_hook(lambda module, args: calls.append(100))
    sites = fg.find_sites(ddp, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(ddp, optimizer, x, y, 1)
    torch.manual_seed(rank)
    calls.clear()
    fg.grow(
        ddp,
        {"c1": 2},
        fg.how.GradMax(),
        sites=sites,
        optimizer=optimizer,
        closure=lambda: F.cross_entropy(ddp(x), y),
    )
    assert calls == [100]  # one forward pass, no gradient on the wire
    fg.grow(ddp, {"c1": 2}, fg.how.Random(), sites=sites, optimizer=optimizer)
    fg.grow(ddp, {"f": 3}, fg.how.ZeroOutgoing(), sites=sites, optimizer=optimizer)
    assert ddp.find_unused_parameters
    assert ddp.gradient_as_bucket_view
    assert ddp.bucket_bytes_cap == 2 * 2**20
    calls.clear()
    optimizer.zero_grad()
    F.cross_entropy(ddp(x), y).backward()
    assert calls[0] == 100
    assert calls.count(1) == 1
    handle.remove()
    own = made(Net)
    fg.grow(own, {"c1": 4}, fg.how.Random(), sites=sites)
    fg.grow(own, {"f": 3}, fg.how.ZeroOutgoing(), sites=sites)
    own.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    full_x, full_y = data()
    F.cross_entropy(own(full_x), full_y).backward()
    for mine, expected in zip(model.parameters(), own.parameters(), strict=True):
        bound = tolerance(torch.float64, 64 * BATCH) * float(expected.grad.abs().max())
        assert float((mine.grad - expected.grad).abs().max()) <= bound
    return model.state_dict()


def refusals(rank: int) -> dict[str, Tensor]:
    """An error on one rank is an error on both, and nothing has changed."""
    x, y = (tensor[part(rank)] for tensor in data())
    model = made(Net)
    ddp = DDP(model)
    sites = fg.find_sites(ddp, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = torch.full_like(x, torch.nan) if rank else x
    wanted = "not finite" if rank else "rank 1 could not grow"
    with pytest.raises(fg.GrowthError, match=wanted):
        fg.grow(ddp, {"c1": 2}, sites=sites, closure=lambda: F.cross_entropy(ddp(bad), y))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    state = powerSGD_hook.PowerSGDState(process_group=None)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    with pytest.raises(fg.GrowthError, match="powerSGD_hook keeps tensors"):
        fg.grow(ddp, {"c1": 2}, fg.how.Random(), sites=sites)
    mixed = DDP(made(Net), mixed_precision=None)
    assert replicas_of(torch.compile(mixed, backend="eager")).wrapper is mixed
    return model.state_dict()


def overflow(rank: int) -> dict[str, Tensor]:
    """A batch that overflows on one rank counts on none; growth waits for the next."""
    x, y = (tensor[part(rank)] for tensor in data())
    ddp = DDP(made(Net).float())
    x = x.float()
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    grower = fg.Grower(
        ddp,
        optimizer,
        example_inputs=x,
        when=fg.when.Every(1, times=1),
        where=fg.where.Everywhere(units=2),
        loss_scale=scaler,
    )
    grown = []
    for step in range(3):
        with grower.observe():
            factor = torch.inf if step == 0 and rank == 1 else 1.0
            scaler.scale(F.cross_entropy(ddp(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        grown.append(grower.step() is not None)
    assert grown == [False, True, False]
    return ddp.module.state_dict()


def resumed(rank: int, folder: Path) -> dict[str, Tensor]:
    x, y = (tensor[part(rank)] for tensor in data())
    ddp = DDP(made(Net))
    sites = fg.find_sites(ddp, x)
    optimizer = torch.optim.Adam(ddp.parameters())
    fg.grow(ddp, {"c1": 2, "f": 2}, fg.how.ZeroOutgoing(), sites=sites, optimizer=optimizer)
    train(ddp, optimizer, x, y)
    if rank == 0:
        save(folder / "grown.pt", ddp, optimizer)
    dist.barrier()
    other = DDP(made(Net))
    other_optimizer = torch.optim.Adam(other.parameters())
    assert load(folder / "grown.pt", other, other_optimizer) is other
    for model, using in ((ddp, optimizer), (other, other_optimizer)):
        train(model, using, x, y)
    for one, two in zip(ddp.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    return other.module.state_dict()


def worker(rank: int, folder: str) -> None:
    with joined(rank, folder) as path:
        results = {name: scenario(rank) for name, scenario in COMPARED.items()}
        results["random"] = random_growth(rank)
        results["refusals"] = refusals(rank)
        results["overflow"] = overflow(rank)
        results["resumed"] = resumed(rank, path)
        torch.save(results, path / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[dict[str, dict[str, Tensor]]]]:
    yield from found_by(worker)


def test_both_ranks_hold_the_same_bits(ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    assert_same_bits(ranks)


@pytest.mark.parametrize("scenario", COMPARED)
def test_two_ranks_grow_what_one_process_grows(ranks: list[dict[str, dict[str, Tensor]]], scenario: str) -> None:
    # Singular vectors move by the rounding over the relative gap; no gap of these nets is below 1e-3.
    relative = tolerance(torch.float64, 64 * BATCH) / 1e-3
    expected = COMPARED[scenario](None)
    assert_within(relative, ranks[0][scenario], expected)
