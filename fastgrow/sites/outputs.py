"""Which layers are output layers: those behind which the model has no weights any more."""

from __future__ import annotations

import torch
from torch.fx import Node

from .mutation import writes_first
from .nodes import short_name
from .propagation import Propagation

__all__ = ["is_product", "output_layers"]

_PRODUCTS = frozenset(
    "linear bilinear _trilinear mm mv dot addmm addmv matmul bmm baddbmm einsum tensordot "
    "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc "
    "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split()
)


def output_layers(p: Propagation) -> set[str]:
    """Names of the layers whose values reach an output of the model, and no other layer on any way to one.

    A layer is a linear layer or a convolution, also one whose weight is computed first. What lies behind it else
    (softmax, views, norms, residual additions) changes nothing; a model of several heads has an output layer in each.
    A hidden activation that is also returned is none: the network goes on behind it.
    """
    behind = _layers_behind(p)
    layers: dict[str, bool] = {}
    for call in p.layers:
        if call.kind != "embedding":
            found = behind.get(call.node)
            layers[call.name] = layers.get(call.name, True) and found is not None and found <= {call.name}
    return {name for name, last in layers.items() if last}


def _layers_behind(p: Propagation) -> dict[Node, frozenset[str]]:
    """Node -> the layers on its ways to the model's outputs; nodes that reach none are left out."""
    names = {call.node: call.name for call in p.layers if call.kind != "embedding"}
    weights = _of_parameters(p)
    behind: dict[Node, frozenset[str]] = {}
    for node in reversed(p.trace.nodes):
        readers = list(node.users)
        if writes_first(node):  # later readers of a tensor that is written in place read what was written
            readers += [user for user in node.args[0].users if user in behind]  # type: ignore[union-attr]
        found: frozenset[str] | None = frozenset() if node.name in p.trace.returned else None
        for reader in readers:
            if reader in behind:
                layer = names.get(reader) or (reader.name if _is_layer(reader, weights) else None)
                found = (found or frozenset()) | behind[reader] | ({layer} if layer is not None else frozenset())
        if found is not None:
            behind[node] = found
    return behind


def _of_parameters(p: Propagation) -> set[Node]:
    """Parameters, and what is computed from them without the model's inputs."""
    found: set[Node] = set()
    given: set[Node] = set()
    for node in p.trace.nodes:
        sources = node.all_input_nodes
        if node.name in p.trace.inputs or any(source in given for source in sources):
            given.add(node)
        elif node.name in p.trace.parameters or any(source in found for source in sources):
            found.add(node)
    return found


def _is_layer(node: Node, weights: set[Node]) -> bool:
    """Whether an op multiplies a value by a weight."""
    return is_product(node) and any(source in weights for source in node.all_input_nodes)


def is_product(node: Node) -> bool:
    """Whether an op is a matrix product, a convolution or a recurrent layer, or may hold one."""
    return short_name(node) in _PRODUCTS or isinstance(node.target, torch._ops.HigherOrderOperator)
