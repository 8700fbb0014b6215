"""Room reserved ahead in training runs: optimizers, compilation, checkpoints, averages, the Grower."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from reserve_cases import OPTIMIZERS, ROOM, UNITS, batch, blank, chain, reserved, same, train
from tolerances import assert_close
from torch import nn
from torch.nn import functional as F

import fastgrow as fg


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
