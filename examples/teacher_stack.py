"""Several small networks as one: the seeds of `teacher_student.py` trained at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

METHODS = frozenset(
    "gradmax gradmax_opt gradmax_opt_tuned gradmax_inverse random zero_both zero_outgoing baseline_small "
    "baseline_big".split()
)
"""The methods that grow each network of a stack as it would grow alone."""


class StackedLinear(nn.Module):
    """(G, N, in) -> (G, N, out): G linear layers side by side."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]).contiguous())
        self.bias = nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)

    def member(self, number: int) -> nn.Linear:
        """One of the layers, a copy."""
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[2]).to(self.weight)
        with torch.no_grad():
            layer.weight.copy_(self.weight[number].T)
            layer.bias.copy_(self.bias[number, 0])
        return layer


def stacked(models: Sequence[nn.Sequential]) -> nn.Sequential:
    """Networks of one shape as one network; what lies between their layers is the first one's."""
    return nn.Sequential(
        *(
            StackedLinear(layers) if isinstance(layers[0], nn.Linear) else copy.deepcopy(layers[0])
            for layers in zip(*models, strict=True)
        )
    )


def apart(model: nn.Module) -> list[nn.Module]:
    """The networks of a stack, as copies; a network that is none, alone."""
    layers = list(model.children())
    counts = [len(layer.weight) for layer in layers if isinstance(layer, StackedLinear)]
    if not counts:
        return [copy.deepcopy(model)]
    return [
        nn.Sequential(
            *(layer.member(at) if isinstance(layer, StackedLinear) else copy.deepcopy(layer) for layer in layers)
        )
        for at in range(counts[0])
    ]
