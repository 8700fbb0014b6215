"""Stacks in every style that people write them, and each member alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MEMBERS, BATCH, INS, HIDDEN, OUTS = 3, 9, 4, 5, 6
Product = Callable[[Tensor, Tensor, Tensor], Tensor]
# How the product is written; the bias has shape (G, 1, out).
STYLES: dict[str, Product] = {
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x, w),
    "baddbmm_method": lambda x, w, b: b.baddbmm(x, batch2=w),
    "bmm": lambda x, w, b: torch.bmm(x, w) + b,
    "matmul": lambda x, w, b: x @ w + b,
    "einsum": lambda x, w, b: torch.einsum("gbi,gio->gbo", x, w) + b,
}
# The same with the weight stored as (G, out, in).
TURNED: dict[str, Product] = {
    "baddbmm_turned": lambda x, w, b: torch.baddbmm(b, x, w.transpose(1, 2)),
    "matmul_turned": lambda x, w, b: x @ w.mT + b,
    "permuted": lambda x, w, b: torch.bmm(x, w.permute(0, 2, 1)) + b,
    "einsum_turned": lambda x, w, b: torch.einsum("gbi,goi->gbo", x, w) + b,
    "from_the_left": lambda x, w, b: (w @ x.mT).mT + b,
}


class Stack(nn.Module):
    """A linear layer of several members, as people write it."""

    def __init__(self, ins: int, outs: int, style: str) -> None:
        super().__init__()
        turned = style in TURNED
        self.weight = nn.Parameter(torch.randn(MEMBERS, *((outs, ins) if turned else (ins, outs))) / ins**0.5)
        self.bias = nn.Parameter(torch.randn(MEMBERS, 1, outs) / 2)
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        return (STYLES | TURNED)[self.style](x, self.weight, self.bias)


def net(style: str, act: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(1)
    middle = act or nn.Tanh()
    return nn.Sequential(Stack(INS, HIDDEN, style), middle, Stack(HIDDEN, OUTS, style)).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(MEMBERS, BATCH, INS).double(), torch.randn(MEMBERS, BATCH, OUTS).double()


def member(stacked: nn.Sequential, number: int) -> nn.Sequential:
    """One member as a network of its own."""
    layers = []
    for at in (0, 2):
        stack: Any = stacked[at]
        weight = stack.weight[number] if stack.style in TURNED else stack.weight[number].T
        layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(stack.bias[number, 0])
        layers.append(layer)
    return nn.Sequential(layers[0], copy.deepcopy(stacked[1]), layers[1])


def each_loss(output: Tensor, target: Tensor) -> Tensor:
    """(members,): the squared loss of each."""
    return (output - target).square().mean((1, 2))
