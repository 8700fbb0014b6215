"""A small network with everything that `widen` changes, and its edits."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from fastgrow import stages
from fastgrow.widen import AttributeEdit, TensorEdit

MIDDLE = torch.tensor([0, 1, 3, 5])  # 4 -> 6, new units at 2 and 4


class Twin(nn.ReLU):
    """A ReLU of another class, as fastgrow's own is."""


class Net(nn.Module):
    """conv - batch norm - relu - conv: 4 channels between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 3, 1)
        self.register_buffer("gate", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.norm(self.conv1(x))) * self.gate.view(-1, 1, 1))


def net_edits(index: Tensor = MIDDLE, width: int = 6, fresh: bool = True) -> list[TensorEdit]:
    old = len(index)
    values = torch.Generator().manual_seed(3)

    def edit(name: str, dim: int, shape: tuple[int, ...]) -> TensorEdit:
        return TensorEdit(name, {dim: index}, shape, torch.randn(shape, generator=values) if fresh else None)

    assert old < width
    return [
        edit("conv1.weight", 0, (width, 2, 3, 3)),
        edit("conv1.bias", 0, (width,)),
        edit("norm.weight", 0, (width,)),
        edit("norm.bias", 0, (width,)),
        edit("norm.running_mean", 0, (width,)),
        TensorEdit("norm.running_var", {0: index}, (width,), torch.ones(width)),
        edit("gate", 0, (width,)),
        TensorEdit("conv2.weight", {1: index}, (3, width, 1, 1)),
    ]


def net_attributes(width: int = 6) -> list[AttributeEdit]:
    return [
        AttributeEdit("conv1", "out_channels", width),
        AttributeEdit("norm", "num_features", width),
        AttributeEdit("conv2", "in_channels", width),
    ]


X = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def step(net: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    net(X).square().mean().backward()
    if optimizer is not None:
        optimizer.step()


def everything(*things: Any) -> Any:
    """Identities and values of all that a transaction may touch."""
    seen: list[Any] = []
    for thing in things:
        if isinstance(thing, nn.Module):
            for name, module in thing.named_modules():
                for key, value in vars(module).items():
                    if key in ("_parameters", "_buffers", "_modules"):
                        seen += [(name, key, leaf, id(item)) for leaf, item in value.items()]
                    elif "_hook" in key:
                        seen.append((name, key, id(value), list(value or ()) if isinstance(value, dict) else value))
                    elif key == stages.ATTRIBUTE:
                        seen.append((name, str(value)))
                    else:
                        seen.append((name, key, repr(value)))
            for name, tensor in itertools.chain(thing.named_parameters(), thing.named_buffers()):
                grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
                seen.append((name, tensor.tolist(), tensor.requires_grad, grad))
        else:
            for group in thing.param_groups:
                seen.append({key: repr(value) for key, value in group.items() if key != "params"})
                seen.append((id(group["params"]), [id(p) for p in group["params"]]))
            for key, entries in thing.state.items():
                seen.append((id(key), {name: (id(value), str(value)) for name, value in entries.items()}))
    return seen
