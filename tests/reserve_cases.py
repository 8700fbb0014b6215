"""A chain of layers with room reserved ahead, and what its tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
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
