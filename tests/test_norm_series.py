"""Norms that units pass one behind the other, and side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow.newborns import Newborns
from fastgrow.norm_series import amplification, evaluation_factor


class Block(nn.Module):
    """post: conv, norm, ReLU, conv, norm, added, ReLU; otherwise the norms stand before the convolutions."""

    def __init__(self, channels: int, middle: int, eps: float, post: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, middle, 3, padding=1, bias=False)
        self.second = nn.Conv2d(middle, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n, eps) for n in ((middle, channels) if post else (channels, middle)))
        self.relus = nn.ModuleList([nn.ReLU(), nn.ReLU()])
        self.post = post

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            inside = self.relus[0](self.norms[0](self.first(x)))
            return self.relus[1](x + self.norms[1](self.second(inside)))
        inside = self.first(self.relus[0](self.norms[0](x)))
        return x + self.second(self.relus[1](self.norms[1](inside)))


class Stream(nn.Module):
    def __init__(self, eps: float, post: bool, blocks: int = 3) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, eps), nn.ReLU()
        self.blocks = nn.ModuleList(Block(6, 5, eps, post) for _ in range(blocks))
        self.head, self.post = nn.Linear(6, 4), post

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(self.norm(x)) if self.post else x
        for block in self.blocks:
            x = block(x)
        x = x if self.post else self.relu(self.norm(x))
        return self.head(x.mean((2, 3)))


class Beside(nn.Module):
    """A path through one norm beside one through none, or through two."""

    def __init__(self, eps: float, further: int) -> None:
        super().__init__()
        self.a, self.norm, self.relu = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps), nn.ReLU()
        depthwise = [nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6, eps), nn.ReLU()]
        self.further = nn.Sequential(*depthwise[: 3 * further])
        self.b, self.head = nn.Conv2d(6, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        z = z + self.further(self.relu(self.norm(z)))
        return self.head(self.b(z).mean((2, 3)))


def chain(*norms: nn.Module) -> nn.Sequential:
    """One norm behind the first convolution, further ones behind depthwise convolutions."""
    between = [layer for n in norms[1:] for layer in (nn.Conv2d(6, 6, 3, padding=1, groups=6), n, nn.ReLU())]
    first = [nn.Conv2d(3, 6, 3, padding=1, bias=False), norms[0], nn.ReLU(), *between]
    return nn.Sequential(*first, nn.Conv2d(6, 4, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


NETS: dict[str, tuple[Callable[[float], nn.Module], int]] = {
    "chain": (lambda eps: chain(nn.BatchNorm2d(6, eps)), 1),
    "depthwise": (lambda eps: chain(nn.BatchNorm2d(6, eps), nn.BatchNorm2d(6, eps)), 2),
    "stream": (lambda eps: Stream(eps, post=True), 1),
    "pre-activation": (lambda eps: Stream(eps, post=False), 1),
    "identity beside": (lambda eps: Beside(eps, 0), 1),
    "one beside two": (lambda eps: Beside(eps, 1), 2),
    "instance norm": (lambda eps: chain(nn.InstanceNorm2d(6, eps)), 1),
    "group norm": (lambda eps: chain(nn.GroupNorm(3, 6, eps)), 1),
    "group norm, then batch norm": (lambda eps: chain(nn.GroupNorm(3, 6, eps), nn.BatchNorm2d(6, eps)), 2),
    "without statistics": (lambda eps: chain(nn.BatchNorm2d(6, eps, track_running_stats=False)), 1),
}


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 3, 8, 8, dtype=dtype), torch.randint(0, 4, (8,))


def built(make: Callable[[float], nn.Module], eps: float, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return make(eps).to(dtype)


def gradient_at_zero(make: Callable[[float], nn.Module], eps: float) -> tuple[float, float]:
    """(the norm of the gradient that random units at zero receive, what `amplification` says)."""
    model, (x, y) = built(make, eps), data()
    sites = fg.find_sites(model, x)
    site = sites[0]
    said = amplification(model, sites, site)
    torch.manual_seed(2)
    units = 2 * site.multiple
    fg.grow(model, {site.name: units}, fg.how.Random(scale=1e-6, norm="fixed"), sites=sites)
    F.cross_entropy(model(x), y).backward()
    gradients = [model.get_submodule(name).get_parameter("weight").grad for name in site.producers]
    return math.sqrt(sum(float(g[-units:].square().sum()) for g in gradients if g is not None)), said


@pytest.mark.parametrize("net", NETS)
def test_what_norms_multiply_units_at_zero_by(net: str) -> None:
    make, count = NETS[net]
    (large, said), (small, lower) = (gradient_at_zero(make, eps) for eps in (1e-12, 1e-8))
    assert said == pytest.approx(1e6**count)
    # what passes fewer norms is smaller by 1e-4 at most
    assert large / small == pytest.approx(said / lower, rel=1e-3)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("how", [fg.how.GradMax(), fg.how.Random(), fg.how.TINY(project=False), fg.how.GradMaxOpt()],
                         ids=lambda how: how.name)  # fmt: skip
def test_outgoing_norms_count_norms_in_series(net: str, how: fg.how.How) -> None:
    make, count = NETS[net]
    model, (x, y) = built(make, 1e-4), data()
    sites = fg.find_sites(model, x)
    site = sites[0]
    present = Newborns(model, sites, site, site.step).mean_norm("consumer")
    width = site.width
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    fg.grow(model, {site.name: 2 * site.multiple}, how, sites=sites, closure=closure)
    columns = [model.get_submodule(name).get_parameter("weight").detach()[:, width:] for name in site.consumers]
    born = torch.cat([column.transpose(0, 1).flatten(1) for column in columns], 1).norm(dim=1)
    born = born.view(-1, site.step).norm(dim=1)  # a group norm's channels come in groups
    wanted = 0.5 * float(present) * 1e-2**count
    assert born.tolist() == pytest.approx([wanted] * len(born), rel=1e-3)


@pytest.mark.parametrize("how", [fg.how.GradMax(), fg.how.Random(), fg.how.TINY()], ids=lambda how: how.name)
def test_units_of_a_long_stream_learn(how: fg.how.How) -> None:
    """19 norms lie side by side on it: sqrt(eps) to their number is 1e-48."""
    model = built(lambda eps: Stream(eps, post=True, blocks=18), 1e-5, torch.float32)
    x, y = data(torch.float32)
    sites = fg.find_sites(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    fg.grow(model, {"stem": 2}, how, sites=sites, optimizer=optimizer, closure=loss)
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    weight = model.get_submodule("blocks.0.first").get_parameter("weight").detach()
    norms = weight.transpose(0, 1).flatten(1).norm(dim=1)
    assert float(norms[6:].min()) > 0.01 * float(norms[:6].mean())


def test_evaluation_mode_and_mode_by_norm() -> None:
    model, (x, _) = built(NETS["depthwise"][0], 1e-4), data()
    sites = fg.find_sites(model, x)
    assert amplification(model, sites, sites[0]) == pytest.approx(1e4)
    model[1].eval()
    assert amplification(model, sites, sites[0]) == pytest.approx(1e2)
    model.eval()
    assert amplification(model, sites, sites[0]) == 1.0
    assert evaluation_factor(model, sites, sites[0]) == 1.0


def test_a_norm_that_is_called_as_a_function() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("var", torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            z = F.batch_norm(self.a(x), self.mean, self.var, training=self.training, eps=1e-4)
            return self.b(F.relu(z))

    model = Functional()
    sites = fg.find_sites(model.eval(), torch.randn(8, 4))
    assert amplification(model, sites, sites[0]) == 1.0


def test_evaluation_factor_is_a_product_and_a_mean_over_paths() -> None:
    model, (x, _) = built(NETS["depthwise"][0], 1e-4), data()
    model[1].get_buffer("running_var").fill_(0.25 - 1e-4)
    model[4].get_buffer("running_var").fill_(4.0 - 1e-4)
    sites = fg.find_sites(model, x)
    assert evaluation_factor(model, sites, sites[0]) == pytest.approx(2e-2 * 0.5e-2)
    stream = built(NETS["pre-activation"][0], 1e-4)  # a consumer behind each norm; from 1, 2, 3 and 4 producers
    for count, norm in enumerate([block.norms[0] for block in stream.blocks] + [stream.norm]):  # type: ignore[union-attr]
        norm.get_buffer("running_var").fill_((1 + count) ** 2 - 1e-4)
    sites = fg.find_sites(stream, x)
    between = evaluation_factor(stream, sites, sites[0])
    assert 0.25e-2 < between < 1e-2


def test_sites_without_a_graph() -> None:
    """A chain's norms stand in series; those among several layers side by side, but for depthwise ones between."""

    def without(sites: fg.Sites) -> fg.Sites:
        return dataclasses.replace(sites, graph=None)

    x, _ = data()
    wanted: Mapping[str, float] = {"chain": 1e2, "depthwise": 1e4, "stream": 1e2, "pre-activation": 1e2}
    for net, said in wanted.items():
        model = built(NETS[net][0], 1e-4)
        sites = without(fg.find_sites(model, x))
        assert amplification(model, sites, sites[0]) == pytest.approx(said)
        assert amplification(model.eval(), sites, sites[0]) == 1.0


def test_named_sites_count_as_found_ones() -> None:
    model, (x, _) = built(NETS["depthwise"][0], 1e-4), data()
    sites = fg.name_sites(model, x, [[str(place) for place in range(7)]])
    assert amplification(model, sites, sites["0"]) == pytest.approx(1e4)


@pytest.mark.parametrize("how", [fg.how.GradMax(), fg.how.Random()], ids=lambda how: how.name)
def test_weights_that_would_underflow_are_refused(how: fg.how.How) -> None:
    """Two norms of eps 1e-5 in series: entries of 1e-6 are no normal numbers of float16."""
    model = built(lambda eps: chain(nn.BatchNorm2d(6, eps), nn.BatchNorm2d(6, eps)), 1e-5, torch.float16)
    x, y = data(torch.float16)
    sites = fg.find_sites(model, x)

    def loss() -> Tensor:
        return F.cross_entropy(model(x).float(), y)

    loss()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(fg.GrowthError, match=r"site '0': for the norms behind it new weights.*evaluation mode"):
        fg.grow(model, {"0": 2}, how, sites=sites, closure=loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.eval()
    fg.grow(model, {"0": 2}, how, sites=sites, closure=loss)
    assert bool((model.get_submodule("6").get_parameter("weight")[:, 6:] != 0).any())


@pytest.mark.parametrize("relu", ["pairs", "epsilon"])
@pytest.mark.parametrize("net", NETS)
def test_small_incoming_weights_stay_small_behind_norms(net: str, relu: str) -> None:
    """The output keeps what epsilon alone changes, and the gradient is the one predicted at their own mask."""
    make, _ = NETS[net]
    model, (x, y) = built(make, 1e-5), data()
    sites = fg.find_sites(model, x)
    site = sites[0]
    before, units = model(x).detach(), 2 * site.multiple
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    how = fg.how.GradMax(relu=relu, norm="fixed", scale=0.5, epsilon=1e-4)
    report = fg.grow(model, {site.name: units}, how, sites=sites, optimizer=optimizer, closure=closure)
    after = model(x)
    bound = 1e-10 if relu == "pairs" else 1e-3  # of epsilon times sums of 9 taps and a few channels
    assert float((after.detach() - before).abs().max()) < bound * float(before.abs().max())
    model.zero_grad()
    F.cross_entropy(after, y).backward()
    producers, consumers = (
        [model.get_submodule(name).get_parameter("weight").grad for name in names]
        for names in (site.producers, site.consumers)
    )
    squares = [g[-units:] for g in producers if g is not None] + [g[:, -units:] for g in consumers if g is not None]
    found = sum(float(part.square().sum()) for part in squares)
    assert report.sites[0].predicted_gain == pytest.approx(found, rel=0.01)
