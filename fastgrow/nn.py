"""Modules that a growing model may hold where torch has none; `fastgrow.finalize` takes them out again.

Activations equal to torch's in the forward pass, whose derivative at 0 is that of 0+: GradMax's new units start
at exactly zero. ``torch.nn.ReLU`` has the subgradient 0 there, so they would never learn; with the derivative
from the right they do.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Beside", "LeakyReLU", "PReLU", "ReLU", "ReLU6", "original", "twin"]


def relu(input: Tensor) -> Tensor:
    """max(x, 0) with derivative 1 at x = 0 (float dtypes; the input is kept for the backward pass).

    ``x > -tiny`` holds for exactly the x that are >= 0, tiny being the smallest number of the dtype.
    """
    return F.threshold(input, -torch.finfo(input.dtype).smallest_normal * torch.finfo(input.dtype).eps, 0.0)


class ReLU(nn.ReLU):
    """``torch.nn.ReLU`` with derivative 1 at 0. ``inplace`` is kept as an attribute and has no effect."""

    def forward(self, input: Tensor) -> Tensor:
        return relu(input)


class ReLU6(nn.ReLU6):
    """``torch.nn.ReLU6`` with derivative 1 at 0 (and 0 at 6, as torch's)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardtanh(relu(input), -1.0, 6.0)


class LeakyReLU(nn.LeakyReLU):
    """``torch.nn.LeakyReLU`` with derivative 1 at 0."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.where(input < 0, input * self.negative_slope, input)


class PReLU(nn.PReLU):
    """``torch.nn.PReLU`` with derivative 1 at 0."""

    def forward(self, input: Tensor) -> Tensor:
        slope = self.weight.reshape(-1, *[1] * (input.dim() - 2)) if input.dim() > 1 else self.weight
        return torch.where(input < 0, input * slope, input)


class Beside(nn.Module):
    """``layer(x) + branch(x)``: new units between a layer's input and its output (`fastgrow.insert_layer`)."""

    def __init__(self, layer: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.branch = branch

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = self.layer(input) + self.branch(input)
        return result

    def as_graph(self) -> torch.fx.GraphModule:
        """The same in torch's own terms, with the same modules under the same names."""
        graph = torch.fx.Graph()
        x = graph.placeholder("input")
        ways = [graph.call_module(name, (x,)) for name in ("layer", "branch")]
        graph.output(graph.call_function(operator.add, tuple(ways)))
        return torch.fx.GraphModule(self, graph, "Beside")


_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: ReLU,
    nn.ReLU6: ReLU6,
    nn.LeakyReLU: LeakyReLU,
    nn.PReLU: PReLU,
}


def _recast(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    other = kind.__new__(kind)
    other.__dict__ = module.__dict__.copy()
    return other


def twin(module: nn.Module) -> nn.Module | None:
    """The module with derivative 1 at 0 that stands in for a torch activation; None where none is needed.

    It shares the original's parameters, hooks and attributes. A ``nn.Hardtanh`` over [0, 6] counts as ReLU6.
    """
    kind = _TWINS.get(type(module))
    return None if kind is None else _recast(module, kind)


def original(module: nn.Module) -> nn.Module | None:
    """Torch's own activation for one of ours; None for any other module."""
    for torch_kind, our_kind in _TWINS.items():
        if type(module) is our_kind:
            return _recast(module, torch_kind)
    return None
