"""Room reserved ahead of growth: inert while it waits, filled in place, told apart from width everywhere."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Residual, image_batch
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow.natural import natural_directions
from fastgrow.ranks import ActivationRanks, weight_ranks
from fastgrow.sites import live_tensors

ROOM = {"0": 9, "3": 11, "7": 12}
UNITS = {"0": 2, "3": 1, "7": 2}


def chain(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """conv -> conv -> flatten -> linear -> linear, batch norm behind the convolutions."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 7),
        nn.PReLU(7),
        nn.Linear(7, 3),
    ).to(dtype)


def batch(dtype: torch.dtype = torch.float64, samples: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(samples, 2, 4, 4, dtype=dtype), torch.arange(samples) % 3


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    x, y = batch(next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def reserved(
    make: Callable[[Any], Any] = lambda p: torch.optim.SGD(p, lr=0.05), **more: Any
) -> tuple[nn.Sequential, fg.Sites, Any]:
    model = chain()
    sites = fg.find_sites(model, batch()[0])
    optimizer = make(model.parameters())
    assert fg.reserve(model, ROOM, sites=sites, optimizer=optimizer, **more) == {"0": 5, "3": 5, "7": 5}
    return model, sites, optimizer


def blank(model: nn.Module) -> None:
    """Every entry of every parameter that is room is exactly zero."""
    live = live_tensors(model)
    for name, parameter in model.named_parameters():
        assert int((parameter != 0).sum()) == int((live[name] != 0).sum()), name


def same(one: nn.Module, other: nn.Module) -> None:
    """The same network once the room is cut off: parameters and buffers."""
    theirs = live_tensors(other)
    for name, tensor in live_tensors(one).items():
        if tensor.is_floating_point():
            assert_close(theirs[name], tensor, tensor.dtype, 10_000, scale=max(1.0, float(tensor.detach().abs().max())))


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


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01, t0=1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
    "fg.sgd": lambda p: fg.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, rate_adaptation=True),
    "fg.adam": lambda p: fg.optim.Adam(p, lr=0.01, rate_adaptation=True),
    "fg.adamw": lambda p: fg.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fg.avagrad": lambda p: fg.optim.AvaGrad(p, lr=0.1, rate_adaptation=True),
}


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
    states = [
        (id(value), value.data_ptr()) for of in ours.state.values() for value in of.values() if torch.is_tensor(value)
    ]
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
    kept = [(id(v), v.data_ptr()) for of in ours.state.values() for v in of.values() if torch.is_tensor(v)]
    assert states == kept[: len(states)] if not name.startswith("fg.") else set(states) <= set(kept)
    assert all(now > before for before, now in zip(versions[:1], [model[0].weight._version], strict=True))
    same(plain, model)
    blank(model)


@pytest.mark.parametrize("name", ["adam", "fg.sgd", "fg.adam"])
def test_an_optimizer_made_after_the_room(name: str) -> None:
    plain = chain()
    sites = fg.find_sites(plain, batch()[0])
    model, _, _ = reserved()
    pairs = [(one, OPTIMIZERS[name](one.parameters())) for one in (plain, model)]
    for _ in range(2):
        for one, optimizer in pairs:
            train(one, optimizer)
            torch.manual_seed(2)
            fg.grow(one, UNITS, fg.how.Random(), sites=sites, optimizer=optimizer)
            train(one, optimizer)
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


@pytest.mark.parametrize("how", [fg.how.Firefly, fg.how.Splitting, fg.how.GradMaxOpt], ids=lambda how: how.__name__)
def test_methods_that_cannot_fill_room_say_so(how: type[fg.how.How]) -> None:
    model, sites, _ = reserved()
    x, y = batch()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fg.GrowthError, match=f"{how.__name__}.*fg.release"):
        fg.grow(model, {"7": 1}, how(), sites=sites, closure=lambda: F.cross_entropy(model(x), y))
    with pytest.raises(fg.GrowthError, match=how.__name__):
        fg.reserve(chain(), ROOM, sites=sites, how=how())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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


class Counting:
    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return graph


@pytest.mark.parametrize("how", [fg.how.GradMax, fg.how.Random], ids=lambda how: how.__name__)
def test_growth_into_room_compiles_nothing(how: type[fg.how.How]) -> None:
    torch._dynamo.reset()
    model, sites, optimizer = reserved(how=how())
    x, y = batch()
    counting = Counting()
    compiled = torch.compile(model, backend=counting)
    train(compiled, optimizer)
    seen = counting.graphs
    for _ in range(2):
        fg.grow(compiled, UNITS, how(), sites=sites, optimizer=optimizer, closure=lambda: F.cross_entropy(model(x), y))
        train(compiled, optimizer)
        assert_close(compiled(x), model(x), torch.float64, 100)
    assert counting.graphs == seen
    fg.grow(compiled, {"0": 9}, fg.how.Random(), sites=sites, optimizer=optimizer)
    train(compiled, optimizer)
    assert counting.graphs > seen  # the counter counts


def test_release_cuts_what_is_left() -> None:
    model, sites, optimizer = reserved(OPTIMIZERS["fg.adam"])
    train(model, optimizer)
    fg.grow(model, {"0": 2}, fg.how.Random(), sites=sites, optimizer=optimizer)
    train(model, optimizer)
    x, _ = batch()
    expected = model(x)
    assert fg.release(model, optimizer=optimizer) is model
    assert_close(model(x), expected, torch.float64, 100)
    assert [model[0].out_channels, model[1].num_features, model[3].in_channels, model[3].out_channels] == [6, 6, 6, 6]
    assert [model[7].in_features, model[7].out_features, model[8].num_parameters] == [96, 7, 7]
    assert sites.sizes(model) == sites.sizes(model, room=True)
    train(model, optimizer)
    fg.grow(model, UNITS, fg.how.Random(), sites=sites, optimizer=optimizer)
    train(model, optimizer)
    untouched = chain()
    assert fg.release(untouched) is untouched


def test_finalize_leaves_no_room() -> None:
    model, _, _ = reserved()
    x, _ = batch()
    expected = model(x)
    fg.finalize(model)
    assert_close(model(x), expected, torch.float64, 100)
    assert model[0].weight.shape == (4, 2, 3, 3)
    assert not [key for module in model.modules() for key in vars(module) if "fastgrow" in key]


def test_copies_and_pickles_keep_room() -> None:
    model, sites, _ = reserved()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for one in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert sites.widths(one) == sites.widths(model)
        assert sites.sizes(one, room=True) == sites.sizes(model, room=True)


@pytest.mark.parametrize("fresh", ["seed", "same room", "less room", "more room"])
def test_save_and_load(tmp_path: Path, fresh: str) -> None:
    model, sites, optimizer = reserved(OPTIMIZERS["fg.adam"])
    train(model, optimizer)
    fg.grow(model, UNITS, fg.how.Random(), sites=sites, optimizer=optimizer)
    train(model, optimizer)
    fg.save(tmp_path / "grown.pt", model, optimizer)
    other = chain()
    theirs = OPTIMIZERS["fg.adam"](other.parameters())
    widths = {"same room": ROOM, "less room": {"0": 6, "3": 7}, "more room": {"0": 20, "7": 30}}
    if fresh in widths:
        fg.reserve(other, widths[fresh], sites=sites, optimizer=theirs)
    fg.load(tmp_path / "grown.pt", other, theirs)
    assert sites.widths(other) == sites.widths(model)
    assert sites.sizes(other, room=True) == sites.sizes(model, room=True)
    pairs = ((model, optimizer), (other, theirs))
    for one, of in pairs:
        torch.manual_seed(4)
        train(one, of)
        fg.grow(one, UNITS, fg.how.Random(), sites=sites, optimizer=of)
        train(one, of)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    for one, of in pairs:
        fg.release(one, optimizer=of)
    assert model[3].in_channels == other[3].in_channels == 8


def test_a_seed_saved_without_room_loads_into_one_with_it(tmp_path: Path) -> None:
    plain = chain()
    fg.save(tmp_path / "seed.pt", plain)
    model, sites, _ = reserved()
    fg.load(tmp_path / "seed.pt", model)
    assert sites.sizes(model, room=True) == sites.sizes(plain)
    assert model[0].out_channels == 4
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


def test_averages_follow() -> None:
    model = chain()
    x, _ = batch()
    sites = fg.find_sites(model, x)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    fg.reserve(model, ROOM, sites=sites, also=[averaged])
    pointers = [p.data_ptr() for p in averaged.parameters()]
    torch.manual_seed(5)
    fg.grow(model, UNITS, fg.how.Random(), sites=sites, also=[averaged])
    assert_close(averaged(x), model(x), torch.float64, 100)
    assert pointers == [p.data_ptr() for p in averaged.parameters()]
    averaged.update_parameters(model)
    same(model, averaged.module)
    fg.release(model, also=[averaged])
    assert averaged.module[0].weight.shape == model[0].weight.shape == (6, 2, 3, 3)


def looped(reserve: Any) -> tuple[nn.Sequential, fg.Grower, list[int]]:
    model, (x, y) = chain(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    grower = fg.Grower(
        model,
        optimizer,
        example_inputs=x,
        when=fg.when.Every(2),
        where=fg.where.Everywhere(units=1),
        how=fg.how.GradMax(),
        reserve=reserve,
    )
    widths = []
    for _ in range(8):
        with grower.observe():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
        widths.append(model[0].out_channels)
    return model, grower, widths


def test_grower_fills_room_and_rounds_up() -> None:
    plain, without, _ = looped(None)
    named, first, widths = looped({"0": 6, "3": 40})
    rounded, second, multiples = looped(4)
    assert widths == [6, 6, 6, 6, 6, 7, 7, 8]
    assert multiples == [4, 8, 8, 8, 8, 8, 8, 8]
    assert named[3].out_channels == 40
    for model, grower in ((named, first), (rounded, second)):
        same(plain, model)
        for ours, theirs in zip(grower.history, without.history, strict=True):
            assert [(s.name, s.old_width, s.new_width) for s in ours.sites] == [
                (s.name, s.old_width, s.new_width) for s in theirs.sites
            ]
            assert ours.parameters == theirs.parameters


def test_a_run_that_is_resumed_may_be_past_its_room(tmp_path: Path) -> None:
    model, grower, _ = looped({"0": 6, "3": 40})
    fg.save(tmp_path / "grown.pt", model, grower=grower)
    other = chain()
    fg.load(tmp_path / "grown.pt", other)
    again = fg.Grower(
        other,
        torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9),
        example_inputs=batch()[0],
        when=fg.when.Every(2),
        how=fg.how.GradMax(),
        reserve={"0": 6, "3": 40},
    )
    fg.load(tmp_path / "grown.pt", other, grower=again)
    assert [p.shape for p in other.parameters()] == [p.shape for p in model.parameters()]
    assert again.sites.widths(other) == grower.sites.widths(model)


def test_measured_gains_are_those_of_the_units() -> None:
    plain, (x, y) = chain(), batch()
    sites = fg.find_sites(plain, x)
    model, _, _ = reserved()
    reports = []
    for one in (plain, model):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05)
        closure = lambda one=one: F.cross_entropy(one(x), y)  # noqa: E731
        reports.append(fg.grow(one, UNITS, sites=sites, optimizer=optimizer, closure=closure, measure_gain=True))
    for ours, theirs in zip(reports[1].sites, reports[0].sites, strict=True):
        assert ours.measured_gain == pytest.approx(theirs.measured_gain, abs=1e-10)
        assert ours.predicted_gain == pytest.approx(theirs.predicted_gain, rel=1e-8)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.activation, self.last = nn.Linear(5, 8), norm, activation, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.norm(self.first(x))))


class Shifted(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)) + 1.0)


REFUSED = {
    "layer_norm": (lambda: Normed(nn.LayerNorm(8), nn.ReLU()), "layer_norm"),
    "sigmoid": (lambda: Normed(nn.Identity(), nn.Sigmoid()), "sigmoid"),
    "softplus": (lambda: Normed(nn.Identity(), nn.Softplus()), "softplus"),
    "shifted": (lambda: Shifted(nn.Identity(), nn.ReLU()), "add"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_inert_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    model = make()
    sites = fg.find_sites(model, torch.randn(4, 5))
    before = list(model.parameters())
    with pytest.raises(fg.GrowthError, match=rf"'first'.*no room reserved.*{reason}"):
        fg.reserve(model, {"first": 12}, sites=sites)
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))


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


def test_attention_heads_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(layer, nn.Linear(8, 3))
    sites = fg.find_sites(model, torch.randn(2, 5, 8))
    heads = next(site.name for site in sites if site.heads)
    with pytest.raises(fg.GrowthError, match="attention heads"):
        fg.reserve(model, {heads: 4}, sites=sites)
    x = torch.randn(2, 5, 8)
    model.eval()
    expected = model(x)
    fg.reserve(model, {"0.linear1": 32}, sites=sites)
    assert_close(model(x), expected, torch.float32, 100)


def test_bad_arguments_are_named() -> None:
    model = chain()
    x, _ = batch()
    sites = fg.find_sites(model, x)
    for widths, words in (({"0": 4}, "above that"), ({"0": 4.5}, "integer"), ([("0", 9)], "mapping"), ({"x": 9}, "x")):
        with pytest.raises(fg.GrowthError, match=words):
            fg.reserve(model, widths, sites=sites)  # type: ignore[arg-type]
    with pytest.raises(fg.GrowthError, match="reserve"):
        fg.Grower(model, torch.optim.SGD(model.parameters(), lr=0.1), sites=sites, when=fg.when.Every(2), reserve=0)
    fg.reserve(model, ROOM, sites=sites)
    with pytest.raises(fg.GrowthError, match="fg.release"):
        fg.insert_layer(model, "7", example_inputs=x)


@pytest.mark.parametrize("call", ["grow", "release"])
def test_room_that_was_written_is_an_error(call: str) -> None:
    model, sites, _ = reserved()
    nn.init.normal_(model[3].weight)
    with pytest.raises(fg.GrowthError, match="'3.weight'.*no longer zero"):
        fg.grow(model, {"0": 1}, fg.how.Random(), sites=sites) if call == "grow" else fg.release(model)


def test_a_growth_that_fails_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are written in place, and put back when an optimizer fails at the very end."""
    model, sites, optimizer = reserved(OPTIMIZERS["fg.adam"])
    train(model, optimizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    widths = sites.widths(model)

    def fail(parameter: Tensor, stages: Any) -> None:
        raise RuntimeError("too late")

    monkeypatch.setattr(optimizer, "grown", fail)
    with pytest.raises(RuntimeError, match="too late"):
        fg.grow(model, UNITS, fg.how.Net2Net(), sites=sites, optimizer=optimizer)
    assert sites.widths(model) == widths
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
