"""Room in models whose sites branch, join and multiply, and under DistributedDataParallel."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gloo import assert_same_bits, found_by, joined
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow.sites import live_tensors


class Squeeze(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


class Mixed(nn.Module):
    """An inverted residual block with squeeze and excitation, a transposed convolution, two branches joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.wide, self.norm1 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.deep, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.squeeze = Squeeze(12)
        self.thin, self.norm3 = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.side = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.head = nn.Linear(5 + 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm0(self.stem(x)))
        h = F.silu(self.norm2(self.deep(F.gelu(self.norm1(self.wide(x))))))
        x = x + self.norm3(self.thin(self.squeeze(h)))
        z = self.side(F.leaky_relu(self.up(x)))
        return self.head(F.adaptive_avg_pool2d(torch.cat([F.relu(z), x], 1), 1).flatten(1))


def batch(rank: int = 0, samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1 + rank)
    return torch.randn(samples, 3, 8, 8, dtype=torch.float64, generator=generator), torch.arange(samples) % 3


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().double()


def train(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make", [fg.how.GradMax, fg.how.Random, fg.how.Net2Net, fg.how.ZeroOutgoing], ids=lambda how: how.__name__
)
def test_every_site_grows_into_room_as_without(make: Callable[[], fg.how.How]) -> None:
    plain, (x, y) = mixed(), batch()
    model = copy.deepcopy(plain)
    sites = fg.find_sites(model, x)
    assert [site.name for site in sites] == ["stem", "wide", "squeeze.down", "up", "side"]
    # a ReLU called as a function is behind "side": Random's units would never move there
    grown = [site for site in sites if make is not fg.how.Random or site.name != "side"]
    fg.reserve(model, {site.name: site.width + 6 for site in grown}, sites=sites, how=make())
    assert_close(model(x), plain(x), torch.float64, 1000)
    pairs = [(one, torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)) for one in (plain, model)]
    pointers = [p.data_ptr() for p in model.parameters()]
    for _ in range(2):
        for one, optimizer in pairs:
            torch.manual_seed(2)
            closure = lambda one=one: F.cross_entropy(one(x), y)  # noqa: E731
            fg.grow(one, {site.name: 2 for site in grown}, make(), sites=sites, optimizer=optimizer, closure=closure)
            train(one, optimizer, x, y)
    assert pointers == [p.data_ptr() for p in model.parameters()]
    ours = live_tensors(model)
    for name, tensor in live_tensors(plain).items():
        if tensor.is_floating_point():
            scale = max(1.0, float(tensor.detach().abs().max()))
            assert_close(ours[name], tensor, torch.float64, 100_000, scale=scale)
    fg.release(model)
    assert_close(model(x), plain(x), torch.float64, 100_000)


def _worker(rank: int, folder: str) -> None:
    with joined(rank, folder) as shared:
        model = mixed()
        x, y = batch(rank)
        sites = fg.find_sites(model, x)
        wrapper = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(wrapper.parameters(), lr=0.01)
        fg.reserve(wrapper, {"wide": 20, "side": 9}, sites=sites, optimizer=optimizer)
        reducer = wrapper.reducer
        for _ in range(2):
            train(wrapper, optimizer, x, y)
            closure = lambda: F.cross_entropy(wrapper(x), y)  # noqa: E731
            fg.grow(wrapper, {"wide": 2, "side": 2}, sites=sites, optimizer=optimizer, closure=closure)
        train(wrapper, optimizer, x, y)
        kept = wrapper.reducer is reducer
        widths = sites.widths(model)
        fg.release(wrapper, optimizer=optimizer)
        train(wrapper, optimizer, x, y)
        weights = {name: p.detach() for name, p in model.named_parameters()}
        facts = {"facts": torch.tensor([kept, widths["wide"], widths["side"], wrapper.reducer is not reducer])}
        torch.save({"weights": weights, "facts": facts}, shared / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[Any]]:
    yield from found_by(_worker)


def test_a_wrapper_of_several_processes_is_not_renewed(ranks: list[Any]) -> None:
    assert_same_bits(ranks)
    assert ranks[0]["facts"]["facts"].tolist() == [1, 16, 9, 1]
