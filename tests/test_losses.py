"""Losses as people write them: several forward passes, gradients in them, backward passes of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import small
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg


def halves(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean loss of the whole batch, its samples in two forward passes of unequal size."""
    return 0.25 * F.mse_loss(model(x[:4]), y[:4]) + 0.75 * F.mse_loss(model(x[4:]), y[4:])


def pair(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of two views of each sample."""
    return F.mse_loss(model(x), model(x.flip(1)))


@pytest.mark.parametrize("criterion", [halves, pair], ids=["halves", "pair"])
def test_forward_passes_of_one_loss_are_one_batch(criterion: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
    model, x, y = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    report = fg.grow(
        model, {"0": 2}, sites=fg.find_sites(model, x), optimizer=optimizer, closure=lambda: criterion(model, x, y)
    )
    criterion(model, x, y).backward()
    gradient = model[0].weight.grad
    assert gradient is not None
    assert report.predicted_gain == pytest.approx(gradient[16:].square().sum().item(), rel=1e-10)


@pytest.mark.parametrize("growth", [True, "sketch"])
def test_parts_of_a_batch_have_its_growth_matrix(growth: bool | str) -> None:
    model, x, y = small()
    sites = fg.find_sites(model, x)
    found = []
    for criterion in (halves, lambda model, x, y: F.mse_loss(model(x), y)):
        with fg.observe(model, sites, growth=growth, rank=4) as seen:
            criterion(model, x, y).backward()
        found.append(seen)
    parts, whole = found
    assert parts.samples == whole.samples == 16
    torch.testing.assert_close(parts.directions(4)["0"].values, whole.directions(4)["0"].values)


def test_backward_passes_behind_the_block_are_not_observed() -> None:
    model, x, y = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = fg.Grower(model, optimizer, example_inputs=x, when=fg.when.Every(2), where=fg.where.NAGN())
    for _ in range(4):
        with grower.observe():
            loss = F.mse_loss(model(x), y)
            gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        torch.stack([gradient.square().sum() for gradient in gradients]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
    assert len(grower.history) == 2


def test_a_loss_that_depends_on_gradients_is_refused() -> None:
    model, x, y = small()

    def penalised() -> Tensor:
        inputs = x.clone().requires_grad_()
        output = model(inputs)
        (slope,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
        return F.mse_loss(output, y) + slope.square().mean()

    with pytest.raises(fg.GrowthError, match="'2'.*create_graph=True"):
        fg.grow(model, {"0": 2}, sites=fg.find_sites(model, x), closure=penalised)
    assert model[0].out_features == 16
    fg.grow(model, {"0": 2}, fg.how.ZeroOutgoing(), sites=fg.find_sites(model, x))


def test_a_closure_that_calls_backward_is_told() -> None:
    model, x, y = small()

    def closure() -> Tensor:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    with pytest.raises(fg.GrowthError, match="return it without calling backward"):
        fg.grow(model, {"0": 2}, sites=fg.find_sites(model, x), closure=closure)
