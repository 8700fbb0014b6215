"""Calls that are nearly right: each says what was wanted; calls that look wrong and are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import small
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg

CALLS: dict[str, tuple[str, Callable[..., object]]] = {
    "a method's class": ("how=the class GradMax.*write GradMax", lambda **c: fg.grow(**c | {"how": fg.how.GradMax})),
    "a method's name": ("how='gradmax'", lambda **c: fg.grow(**c | {"how": "gradmax"})),
    "a position": ("units=.*site name", lambda **c: fg.grow(**c | {"units": {0: 2}})),
    "a loss": ("closure is a Tensor", lambda **c: fg.grow(**c | {"closure": c["closure"]()})),
    "a list of sites": ("sites=", lambda **c: fg.grow(**c | {"sites": ["0"]})),
    "a plan of a list": ("units=.*site name", lambda **c: fg.plan(c["model"], ["0"], sites=c["sites"])),
    "when's class": ("write Plateau", lambda **c: grower(c, when=fg.when.Plateau)),
    "where's class": ("write NAGN", lambda **c: grower(c, where=fg.where.NAGN)),
    "how's class": ("write GradMax", lambda **c: grower(c, how=fg.how.GradMax)),
    "how for where": ("instance of Where", lambda **c: grower(c, where=fg.how.GradMax())),
    "names for sites": ("instance of Sites", lambda **c: grower(c, sites=["0"])),
    "a reduction": ("loss_reduction='none'", lambda **c: grower(c, loss_reduction="none")),
    "a scale": ("loss_scale='x'", lambda **c: grower(c, loss_scale="x")),
    "a rank": ("rank=2.5", lambda **c: fg.observe(c["model"], c["sites"], rank=2.5)),
    "a negative count": ("k=-1", lambda **c: seen(**c).directions(-1)),
    "one chain for a list": ("a list of chains", lambda **c: fg.name_sites(c["model"], torch.ones(1, 8), ["0", "2"])),
    "no model": ("model=None", lambda **c: fg.find_sites(None, torch.ones(1, 8))),
    "a position to leave out": ("exclude=0", lambda **c: fg.find_sites(c["model"], torch.ones(1, 8), exclude=[0])),
    "one milestone": ("when.Milestones: steps=5", lambda **c: fg.when.Milestones(5)),
    "a grower for its history": ("grower.history", lambda **c: fg.report(grower(c))),
    "nothing to finalize": ("model=None.*instance of Module", lambda **c: fg.finalize(None)),
    "nothing to grow": ("model=None.*instance of Module", lambda **c: fg.grow(**c | {"model": None})),
    "a model's class": (
        "write Linear",
        lambda **c: fg.Grower(nn.Linear, None, sites=c["sites"], when=fg.when.Every(5)),
    ),
    "no model to grow": ("model=None", lambda **c: fg.Grower(None, None, sites=c["sites"], when=fg.when.Every(5))),
    "no sites": ("give example_inputs= to find the sites with, or sites=", lambda **c: grower(c, sites=None)),
    "a copy's name": ("also='x' was given", lambda **c: fg.grow(**c, also="x")),
    "a copy's state": ("wanted an nn.Module", lambda **c: fg.grow(**c, also=[c["model"].state_dict()])),
    "one number as copies": ("also=3 was given", lambda **c: grower(c, also=3)),
    "a copy of another model": ("a copy that must follow .Linear. has no", lambda **c: grower(c, also=nn.Linear(2, 2))),
    "an optimizer's name": ("str is not an optimizer", lambda **c: fg.Grower(c["model"], "sgd", **rest(c))),
    "an optimizer that cannot grow": (
        "LBFGS holds '0.weight'",
        lambda **c: fg.Grower(c["model"], torch.optim.LBFGS(c["model"].parameters()), **rest(c)),
    ),
    "gains without a rate": ("give optimizer=", lambda **c: fg.Grower(c["model"], None, **rest(c), measure_gain=True)),
    "a layer's position": ("after=3 was given.*name of a module", lambda **c: fg.insert_layer(c["model"], 3)),
    "a reader's position": ("before=3 was given", lambda **c: fg.insert_layer(c["model"], "0", before=3)),
    "a position to find": ("include=3 was given", lambda **c: fg.find_sites(c["model"], torch.ones(1, 8), include=3)),
    "one stage": ("when.Stages: schedule=5", lambda **c: fg.when.Stages(5)),
    "a budget of something": ("budget=3 was given.*mapping", lambda **c: fg.where.SingularValues(budget=3)),
    "a rate in words": ("optim.AvaGrad: lr='a'", lambda **c: fg.optim.AvaGrad(c["model"].parameters(), lr="a")),
    "an endless average": ("below 1", lambda **c: fg.optim.AvaGrad(c["model"].parameters(), betas=(0.9, 1.0))),
}


def rest(call: dict[str, object]) -> dict[str, Any]:
    return {"sites": call["sites"], "when": fg.when.Every(5)}


def grower(call: dict[str, object], **options: object) -> fg.Grower:
    model = call["model"]
    assert isinstance(model, nn.Module)
    options = {"sites": call["sites"], "when": fg.when.Every(5), **options}
    return fg.Grower(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)  # type: ignore[arg-type]


def seen(model: nn.Module, sites: fg.Sites, closure: Callable[[], Tensor], **rest: object) -> fg.Observation:
    with fg.observe(model, sites) as found:
        closure().backward()
    return found


@pytest.mark.parametrize("wrong", CALLS)
def test_wrong_calls_say_what_was_wanted(wrong: str) -> None:
    model, x, y = small()
    call = {
        "model": model,
        "units": {"0": 2},
        "sites": fg.find_sites(model, x),
        "closure": lambda: F.mse_loss(model(x), y),
    }
    message, act = CALLS[wrong]
    with pytest.raises(fg.GrowthError, match=message):
        act(**call)


def test_one_copy_may_stand_for_a_list() -> None:
    model, x, y = small()
    average = copy.deepcopy(model)
    fg.grow(model, {"0": 2}, sites=fg.find_sites(model, x), also=average, closure=lambda: F.mse_loss(model(x), y))
    assert average[0].out_features == 18
    assert fg.Grower(
        model, None, sites=fg.find_sites(model, x), when=fg.when.Every(5), how=fg.how.Random(), also=average
    ).also == [average]


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model, x, y = small()
    stale = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    sites = fg.find_sites(model, x)
    with pytest.raises(fg.GrowthError, match="none of them of this Sequential"):
        fg.grow(model, {"0": 2}, sites=sites, optimizer=stale, closure=lambda: F.mse_loss(model(x), y))
    with pytest.raises(fg.GrowthError, match="none of them of this Sequential"):
        fg.Grower(model, stale, sites=sites, when=fg.when.Every(5))
    own = torch.optim.SGD(model[2].parameters(), lr=0.1)
    fg.grow(model, {"0": 2}, sites=sites, optimizer=[stale, own], closure=lambda: F.mse_loss(model(x), y))
    assert own.param_groups[0]["params"][0] is model[2].weight


SMALL_OP = fg.ops.ConvGeometry(3, padding=1)
OPS: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "a list": ("x is a list", lambda x: fg.ops.sum_of_squares([1.0])),  # type: ignore[arg-type]
    "no tensors": ("wanted a list", lambda x: fg.ops.sums_of_squares(None)),  # type: ignore[arg-type]
    "None": ("grad is a NoneType", lambda x: fg.ops.activation_backward(None, x, "relu")),  # type: ignore[arg-type]
    "no matrices": ("matrices is a NoneType", lambda x: fg.ops.top_directions(None, 1)),
    "a sparse matrix": ("call .to_dense", lambda x: fg.ops.top_directions([x.to_sparse()], 1)),
    "a matrix without values": ("meta device", lambda x: fg.ops.top_directions([x.to("meta")], 1)),
    "half a direction": ("k=1.5", lambda x: fg.ops.top_directions([x], 1.5)),  # type: ignore[arg-type]
    "out is a list": ("out is a list", lambda x: fg.ops.linear_growth_matrix(x, x, out=[x])),  # type: ignore[arg-type]
    "out is an input": ("out shares memory with grad_output", lambda x: fg.ops.linear_growth_matrix(x, x, out=x)),
    "out is a view of one": (
        "out shares memory with input",
        lambda x: fg.ops.linear_growth_matrix(x.clone(), x, out=x.view(-1).as_strided((6, 6), (1, 6))),
    ),
    "out is expanded": ("out is expanded", lambda x: fg.ops.linear_growth_matrix(x, x, out=x[:1].clone().expand(6, 6))),
    "out of a convolution": (
        "out shares memory",
        lambda x: fg.ops.conv2d_growth_matrix(
            *[x.view(1, 1, 6, 6)] * 2, SMALL_OP, SMALL_OP, out=x.as_strided((9, 9), (1, 1))
        ),
    ),
}


@pytest.mark.parametrize("wrong", OPS)
def test_wrong_ops_say_what_was_wanted(wrong: str) -> None:
    message, act = OPS[wrong]
    x = torch.randn(6, 6)
    before = x.clone()
    with pytest.raises(fg.GrowthError, match=message):
        act(x)
    assert torch.equal(x, before)


def test_out_may_lie_beside_an_input() -> None:
    whole = torch.randn(12, 6)
    x, out = whole[:6], whole[6:]
    expected = out + x.T @ x
    torch.testing.assert_close(fg.ops.linear_growth_matrix(x, x, out=out), expected)


def test_ranks_may_be_any_integers() -> None:
    matrix = torch.diag(torch.arange(1.0, 6.0))
    for k in (np.int64(2), torch.tensor(2), [np.int32(2)]):
        assert fg.ops.top_directions([matrix], k)[0].values.tolist() == [5.0, 4.0]
    assert len(fg.ops.top_directions((m for m in [matrix, matrix]), 1)) == 2


def test_a_block_inside_another_is_refused_and_both_are_over() -> None:
    model, x, y = small()
    grower = fg.Grower(model, None, example_inputs=x, when=fg.when.Every(1), where=fg.where.Everywhere(2))
    message = "inside another one of the same Grower"
    with pytest.raises(fg.GrowthError, match=message), grower.observe(), grower.observe():
        raise AssertionError("entered")
    with grower.observe():
        F.mse_loss(model(x), y).backward()
    assert grower.step() is not None


def test_a_copy_of_another_width_is_refused_before_training() -> None:
    model, x, _ = small()
    sites = fg.find_sites(model, x)
    narrow = copy.deepcopy(model)
    fg.grow(model, {"0": 2}, fg.how.ZeroOutgoing(), sites=sites)
    with pytest.raises(fg.GrowthError, match=r"'0.weight' has shape .*, in the model"):
        fg.Grower(model, None, sites=sites, when=fg.when.Every(5), also=narrow)


def test_a_chain_that_leaves_something_out_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(5, 4)
    sites = fg.name_sites(model, x, [["0", "1", "2", "3", "4"]])
    assert [site.name for site in sites] == ["0", "2"]
    with pytest.raises(fg.GrowthError, match=r"'4' is given \(5, 8\) in the model, and other values.*behind '1'"):
        fg.name_sites(model, x, [["0", "1", "4"]])
    with pytest.raises(fg.GrowthError, match="other values of shape"):
        fg.name_sites(model, x, [["0", "2"]])
    with pytest.raises(fg.GrowthError, match="nothing along the chain .* can grow .2: its output"):
        fg.name_sites(model, x, [["1", "2"]])

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv2(self.conv1(x)).mean((2, 3)))

    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(fg.GrowthError, match=r"'fc' is given \(2, 8\) in the model, and \(2, 8, 8, 8\) along"):
        fg.name_sites(Pooled(), images, [["conv1", "fc"]])
