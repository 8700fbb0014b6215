"""Calls that are nearly right: each says what was wanted; calls that look wrong and are not."""

from __future__ import annotations

import copy
from collections.abc import Callable

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
}


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
    "half a direction": ("k = 1.5", lambda x: fg.ops.top_directions([x], 1.5)),  # type: ignore[arg-type]
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
