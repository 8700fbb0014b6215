"""Room reserved ahead of growth: inert while it waits, filled in place, told apart from width everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from nets import Residual, image_batch
from reserve_cases import OPTIMIZERS, ROOM, UNITS, batch, blank, chain, reserved, same, train
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow.natural import natural_directions
from fastgrow.ranks import ActivationRanks, weight_ranks


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_reserving_keeps_the_function(dtype: torch.dtype, training: bool) -> None:
    model = chain(dtype)
    x, _ = batch(dtype)
    model(x)  # statistics of their own
    model.train(training)
    plain = copy.deepcopy(model)
    sites = fg.find_sites(model, x)
    fg.reserve(model, ROOM, sites=sites)
    assert_close(model(x), plain(x), dtype, 100)
    assert sites.widths(model) == {"0": 4, "3": 6, "7": 7}
    assert model[0].out_channels == model[1].num_features == 9
    assert model[7].in_features == 11 * 16


def test_residual_streams_have_room_too() -> None:
    torch.manual_seed(0)
    model, (x, y) = Residual().double(), image_batch()
    plain = copy.deepcopy(model)
    sites = fg.find_sites(model, x)
    fg.reserve(model, {site.name: site.width + 3 for site in sites}, sites=sites)
    assert_close(model(x), plain(x), torch.float64, 1000)
    units = {site.name: 1 for site in sites}
    for one in (plain, model):
        fg.grow(one, units, sites=sites, closure=lambda one=one: F.cross_entropy(one(x), y))
    assert_close(model(x), plain(x), torch.float64, 1000)
    same(plain, model)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "fg.sgd", "fg.adam", "fg.adamw", "fg.avagrad"])
def test_room_stays_exactly_zero(name: str) -> None:
    model, _, optimizer = reserved(OPTIMIZERS[name])
    train(model, optimizer, 50)
    blank(model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_growth_into_room_is_growth_without_it(name: str) -> None:
    """Same seed, method and steps: the same network afterwards, and every object at its place."""
    plain = chain()
    x, y = batch()
    sites = fg.find_sites(plain, x)
    theirs = OPTIMIZERS[name](plain.parameters())
    model, _, ours = reserved(OPTIMIZERS[name])
    pairs = ((plain, theirs), (model, ours))
    for one, optimizer in pairs:
        train(one, optimizer)
    places = [(id(p), p.data_ptr()) for p in model.parameters()]

    def moments() -> list[tuple[int, int]]:
        # Not the counts: after a growth fused steps put those of a batch side by side anew.
        kept = [value for of in ours.state.values() for name, value in of.items() if name != "step"]
        return [(id(value), value.data_ptr()) for value in kept if torch.is_tensor(value)]

    states = moments()
    versions = [p._version for p in model.parameters()]
    for _ in range(2):
        for one, optimizer in pairs:
            torch.manual_seed(2)
            report = fg.grow(
                one,
                UNITS,
                fg.how.Random(),
                sites=sites,
                optimizer=optimizer,
                closure=lambda one=one: F.cross_entropy(one(x), y),
            )
            train(one, optimizer)
        assert [entry.new_width for entry in report.sites] == [
            plain[0].out_channels,
            plain[3].out_channels,
            plain[7].out_features,
        ]
        assert report.parameters == sum(p.numel() for p in plain.parameters())
    assert places == [(id(p), p.data_ptr()) for p in model.parameters()]
    kept = moments()
    assert states == kept[: len(states)] if not name.startswith("fg.") else set(states) <= set(kept)
    assert all(now > before for before, now in zip(versions[:1], [model[0].weight._version], strict=True))
    same(plain, model)
    blank(model)


HOWS: dict[str, Callable[[], fg.how.How]] = {
    "gradmax": fg.how.GradMax,
    "gradmax-pairs": lambda: fg.how.GradMax(relu="pairs"),
    "gradmax-sigma": lambda: fg.how.GradMax(norm="sigma"),
    "random": fg.how.Random,
    "zero-outgoing": fg.how.ZeroOutgoing,
    "zero-both": fg.how.ZeroBoth,
    "net2net": lambda: fg.how.Net2Net(noise=0.1),
    "variance-transfer": fg.how.VarianceTransfer,
    "sparkling": fg.how.Sparkling,
}


@pytest.mark.parametrize("name", HOWS)
def test_methods_see_units_alone(name: str) -> None:
    plain = chain()
    x, y = batch(samples=128)
    sites = fg.find_sites(plain, x)
    model, _, _ = reserved(how=HOWS[name]())
    pointers = [p.data_ptr() for p in model.parameters()]
    units = {"0": 2, "3": 2, "7": 2}
    for one in (plain, model):
        torch.manual_seed(3)
        fg.grow(one, units, HOWS[name](), sites=sites, closure=lambda one=one: F.cross_entropy(one(x), y))
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert_close(model(x), plain(x), torch.float64, 10_000)
    same(plain, model)
    blank(model)


def test_tiny_sees_units_alone() -> None:
    plain, (x, y) = chain(), batch(samples=128)
    sites = fg.find_sites(plain, x)
    model, _, _ = reserved(how=fg.how.TINY())
    found = []
    for one in (plain, model):
        with fg.observe(one, sites, rank=3, solvers={"natural": natural_directions}) as seen:
            F.cross_entropy(one(x), y).backward()
        found.append(seen.solution("natural", "7", 2))
    assert_close(found[1].values, found[0].values, torch.float64, 10_000)
    assert_close(found[1].left, found[0].left, torch.float64, 10_000, scale=1.0)
    assert found[1].right.shape == found[0].right.shape
    pointers = [p.data_ptr() for p in model.parameters()]
    report = fg.grow(model, {"7": 2}, fg.how.TINY(), sites=sites, closure=lambda: F.cross_entropy(model(x), y))
    assert report.sites[0].random_units == 0
    assert pointers == [p.data_ptr() for p in model.parameters()]
    blank(model)


def test_room_that_is_too_small_is_widened_and_filled() -> None:
    plain = chain()
    sites = fg.find_sites(plain, batch()[0])
    theirs = torch.optim.Adam(plain.parameters(), lr=0.01)
    model, _, ours = reserved(lambda p: torch.optim.Adam(p, lr=0.01))
    for one, optimizer in ((plain, theirs), (model, ours)):
        train(one, optimizer)
        torch.manual_seed(2)
        fg.grow(one, {"0": 7, "3": 2}, fg.how.Random(), sites=sites, optimizer=optimizer)
        train(one, optimizer)
    assert sites.sizes(model) == sites.sizes(plain)
    assert model[0].out_channels == 11
    assert model[3].out_channels == 11
    assert sites.width(model, "3") == 8
    same(plain, model)


def test_what_is_read_counts_units() -> None:
    plain, (x, y) = chain(), batch()
    sites = fg.find_sites(plain, x)
    model, _, _ = reserved()
    found = []
    for one in (plain, model):
        with fg.observe(one, sites, rank=2) as seen:
            F.cross_entropy(one(x), y).backward()
        found.append(seen)
    for read in ("nagn", "nagn_after_norm"):
        ours, theirs = (getattr(seen, read) for seen in (found[1], found[0]))
        assert ours == pytest.approx(theirs, rel=1e-10)
    for name, directions in found[0].directions(2).items():
        ours = found[1].directions(2)[name]
        products = [one.left * one.values @ one.right.T for one in (directions, ours)]
        assert_close(products[1], products[0], torch.float64, 10_000, scale=float(directions.values[0]))
    assert weight_ranks(model, sites, 0.01) == weight_ranks(plain, sites, 0.01)
    seen = [ActivationRanks(one, sites) for one in (plain, model)]
    for one, ranks in zip((plain, model), seen, strict=True):
        with ranks.watching():
            one(x)
    assert seen[1].ranks(0.01) == seen[0].ranks(0.01)
    plans = [fg.plan(one, {"3": 2}, sites=sites) for one in (plain, model)]
    assert plans[0] == plans[1]
    again = fg.find_sites(model, x)
    assert [(site.name, site.width) for site in again] == [(site.name, site.width) for site in sites]
    assert again.widths(model) == sites.widths(model)


class Gating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.up, self.last = (nn.Linear(*n) for n in ((5, 8), (8, 6), (8, 6), (6, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        return self.last(F.silu(self.gate(x)) * self.up(x))


def test_gates_beside_room() -> None:
    torch.manual_seed(0)
    model = Gating().double()
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 3
    sites = fg.find_sites(model, x)
    with pytest.raises(fg.GrowthError, match="gates"):
        fg.reserve(model, {"gate": 9}, sites=sites)
    plain = copy.deepcopy(model)
    fg.reserve(model, {"first": 12}, sites=sites)
    with pytest.raises(fg.GrowthError, match="'gate'.*fg.release"):
        fg.grow(model, {"gate": 1}, sites=sites, closure=lambda: F.cross_entropy(model(x), y))
    for one in (plain, model):
        torch.manual_seed(1)
        fg.grow(one, {"gate": 1, "first": 2}, fg.how.Random(), sites=sites)
    assert_close(model(x), plain(x), torch.float64, 100)
    same(plain, model)
