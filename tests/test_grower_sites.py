"""What a Grower may grow: sites that its method and its policy fit, and what it says of the others."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
from nets import small
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg


class Called(nn.Module):
    """A ReLU that is a function call, in front of a stream that a LayerNorm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 10)
        self.b = nn.Linear(10, 6)
        self.norm = nn.LayerNorm(6)
        self.c = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.b(torch.relu(self.a(x)))))


def looped(grower: fg.Grower, x: Tensor, y: Tensor, steps: int) -> None:
    (optimizer,) = grower.optimizers
    for _ in range(steps):
        with grower.observe():
            F.mse_loss(grower.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()


@pytest.mark.parametrize(
    ("how", "name", "widths"),
    [
        (fg.how.GradMax(), "a", [12, 14]),  # signed pairs
        (fg.how.VarianceTransfer(), "a", [12, 14]),  # pairs
        (fg.how.Net2Net(), "b", [12, 24]),  # a LayerNorm's channels all copied, twice
        (fg.how.Sparkling(), "b", [12, 24]),
    ],
    ids=["GradMax", "VarianceTransfer", "Net2Net", "Sparkling"],
)
def test_policies_ask_for_what_the_method_can_grow(how: fg.how.How, name: str, widths: list[int]) -> None:
    torch.manual_seed(0)
    model, x, y = Called(), torch.randn(16, 8), torch.randn(16, 4)
    grower = fg.Grower(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        sites=fg.find_sites(model, x, include=[name]),
        when=fg.when.Every(2),
        where=fg.where.Everywhere(units=1),
        how=how,
    )
    looped(grower, x, y, 4)
    assert [report.sites[0].new_width for report in grower.history] == widths


@pytest.mark.parametrize("how", [fg.how.GradMax(), fg.how.ZeroOutgoing()], ids=["GradMax", "ZeroOutgoing"])
def test_a_site_that_the_method_cannot_grow_is_refused_before_training(how: fg.how.How) -> None:
    model, x = Called(), torch.randn(16, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(fg.GrowthError, match=r"'b'.*'norm'.*exclude=\['b'\]"):
        fg.Grower(
            model, optimizer, sites=fg.find_sites(model, x), when=fg.when.Plateau(), where=fg.where.NAGN(), how=how
        )
    fg.Grower(model, optimizer, example_inputs=x, when=fg.when.Plateau(), where=fg.where.Everywhere({"a": 2}), how=how)


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2))


def test_a_grower_leaves_out_what_its_method_cannot_grow() -> None:
    """The stream behind LayerNorms: left out with its reason where the Grower found the sites, else refused."""
    model, x = encoder(), torch.randn(4, 5, 3)
    optimizer = torch.optim.Adam(model.parameters())
    options: dict[str, Any] = {"when": fg.when.Every(1, times=1), "where": fg.where.Everywhere(units=2)}
    grower = fg.Grower(model, optimizer, example_inputs=x, **options)
    assert "mixes its channels" in grower.sites.frozen["0"]
    with grower.observe():
        model(x).square().mean().backward()
    optimizer.step()
    grower.step()
    (report,) = grower.history
    assert {site.name for site in report.sites} == {site.name for site in grower.sites}
    assert model[1].layers[0].linear1.out_features == 18
    assert model[0].out_features == 8
    found = fg.find_sites(model, x)
    with pytest.raises(fg.GrowthError, match=r"exclude=\['0'\]"):
        fg.Grower(model, optimizer, sites=found, **options)
    with pytest.raises(fg.GrowthError, match="nothing in the model can grow"):
        fg.Grower(nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)), None, example_inputs=x, **options)


def test_a_policy_that_names_what_cannot_grow_is_told_so() -> None:
    model, x = Called(), torch.randn(16, 8)
    for where in (fg.where.Everywhere({"b": 2}), fg.where.NAGN(max_width={"b": 90})):
        with pytest.raises(fg.GrowthError, match=r"names 'b', which fits no site \(site 'b'.*found: a"):
            fg.Grower(model, None, example_inputs=x, when=fg.when.Every(2), where=where)


@pytest.mark.parametrize("block", [True, False], ids=["forward alone", "no block"])
def test_a_growth_that_nobody_measures_is_told_once(block: bool) -> None:
    model, x, y = small()
    grower = fg.Grower(model, None, sites=fg.find_sites(model, x), when=fg.when.Every(2))

    def steps(count: int) -> None:
        for _ in range(count):
            with grower.observe() if block else contextlib.nullcontext():
                loss = F.mse_loss(model(x), y)
            loss.backward()
            grower.step()

    with pytest.warns(UserWarning, match="no backward pass was seen"):
        steps(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(4)
        with grower.observe():
            F.mse_loss(model(x), y).backward()
        assert grower.step() is not None


def test_nothing_is_armed_for_ever_once_no_site_may_grow() -> None:
    model, x, y = small()
    grower = fg.Grower(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        sites=fg.find_sites(model, x),
        when=fg.when.Every(2),
        where=fg.where.Everywhere(target=18),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        looped(grower, x, y, 8)
    assert [report.step for report in grower.history] == [2]
    assert not grower.armed


def test_names_that_fit_no_site_are_told_at_once() -> None:
    model, x, _ = small()
    for where in (fg.where.Everywhere(target={"zz": 20}), fg.where.NAGN(max_width={"zz": 20})):
        with pytest.raises(fg.GrowthError, match="names 'zz', which fits no site"):
            fg.Grower(model, None, sites=fg.find_sites(model, x), when=fg.when.Every(2), where=where)


def test_a_grower_is_copied_with_its_model() -> None:
    model, x, y = small()
    grower = fg.Grower(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        example_inputs=x,
        when=fg.when.Every(2),
        where=fg.where.Everywhere(units=2),
    )
    twin = copy.deepcopy(grower)
    looped(twin, x, y, 2)
    assert twin.model[0].out_features == 18  # type: ignore[index]
    assert model[0].out_features == 16
    looped(grower, x, y, 2)
    assert torch.equal(model[0].weight, twin.model[0].weight)  # type: ignore[index]


class TiedHead(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 12)
        self.outer = nn.Linear(12, 8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        return self.head(h + self.outer(torch.tanh(self.inner(h))))


@pytest.mark.parametrize("how", [fg.how.Net2Net(), fg.how.GradMax()], ids=["Net2Net", "GradMax"])
def test_tied_sites_are_refused_before_training(how: fg.how.How) -> None:
    model, x = TiedHead(), torch.randint(0, 11, (6, 5))
    with pytest.raises(fg.GrowthError, match=r"is tied.*exclude=\['embedding'\]"):
        fg.Grower(model, None, sites=fg.find_sites(model, x), when=fg.when.Every(2), how=how)
    rest = fg.find_sites(model, x, exclude="embedding")
    fg.Grower(model, None, sites=rest, when=fg.when.Every(2), how=how)
