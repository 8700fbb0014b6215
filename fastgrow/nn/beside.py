"""Two ways from one input, added."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

__all__ = ["Beside"]


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
