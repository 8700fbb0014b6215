"""What a network costs at any widths: parameters, and FLOPs a sample of its linear and convolution layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import nn

from .layout import Layout, axes_of, size
from .sites import Followed, Sites, unwrap
from .sites.nodes import short_name

__all__ = ["Price", "pricing", "unit_costs"]

Price = Callable[[Mapping[str, int]], tuple[int, float]]


def pricing(model: nn.Module, sites: Sites) -> Price:
    """A function: units per site -> (parameters, forward FLOPs of one sample) of the network with them.

    FLOPs are two for each multiply-add of linear and convolution layers, as torch.utils.flop_counter counts them, at
    the example inputs' map sizes and lengths; divided by their batch size, so that it does not matter.
    """
    # Not the parameters themselves: a price may outlive them.
    lengths_now = {name: parameter.numel() for name, parameter in unwrap(model).named_parameters()}
    present = sites.sizes(model)
    graph = sites.graph
    samples = _samples(graph) if graph is not None else 1

    def price(units: Mapping[str, int]) -> tuple[int, float]:
        sizes = dict(present)
        for name, count in units.items():
            site = sites[name]
            sizes[site.axis] = present[site.axis] + count // site.step
        parameters = 0
        lengths: dict[str, int] = {}
        for name, present_length in lengths_now.items():
            layouts = graph.tensor_dims.get(name) if graph is not None else None
            count = math.prod(size(layout, sizes) for layout in layouts) if layouts else present_length
            lengths[name] = count
            parameters += count
        flops = 0.0
        for call in graph.calls if graph is not None else ():
            if call.kind == "embedding" or call.weight not in lengths:
                continue
            source = call.node.args[0] if call.transposed else call.node
            shape = source.meta["val"].shape  # type: ignore[union-attr]
            products = lengths[call.weight] * math.prod(shape) / shape[call.channel]
            if call.kind == "stacked":  # each member's output is made by its own matrix
                products /= shape[call.letters()[2].index("g")]
            if call.part is not None:
                products *= size(call.part[1], sizes) / size(graph.tensor_dims[call.weight][call.out_dim], sizes)  # type: ignore[union-attr]
            flops += 2.0 * products
        return parameters, flops / samples

    return price


def _samples(graph: Followed) -> int:
    """Samples in the example inputs: the length of the first input where it has them.

    That is its first dimension, but for what numbers a stack's members and for what attention joins (the sequence,
    where it stands before the batch). 1 where a layer reads that dimension as its channels: there is no batch.
    """
    channels = {axis for dims in graph.tensor_dims.values() for dim in dims for axis in axes_of(dim)}
    before = _sequences(graph) | {axis for member in graph.members for axis in axes_of(member)}
    made = {*graph.trace.tensors, *graph.trace.constants}
    for node in graph.trace.nodes:
        if node.op == "placeholder" and node.name not in made and graph.dims[node]:
            dims = zip(map(set, map(axes_of, graph.dims[node])), node.meta["val"].shape, strict=True)
            axes, length = next(((axes, length) for axes, length in dims if not axes & before), (channels, 1))
            return 1 if axes & channels else max(1, int(length))
    return 1


def _sequences(graph: Followed) -> set[int]:
    """What attention joins: the positions that queries, keys and values stand for."""
    joined: set[Layout] = set()
    weighted: set[Layout] = set()
    for node in graph.trace.nodes:
        kind = short_name(node)
        if kind == "scaled_dot_product_attention":
            joined |= {graph.dims[arg][-2] for arg in node.args[:2]}  # type: ignore[index]
        elif kind in ("softmax", "_softmax"):
            weighted.add(graph.dims[node][node.args[1]])
        elif kind in ("matmul", "bmm"):
            joined |= weighted & {graph.dims[node.args[1]][-2]}  # type: ignore[index]
    return {axis for layout in joined for axis in axes_of(layout)}


def unit_costs(model: nn.Module, sites: Sites, price: Price) -> tuple[dict[str, float], dict[str, float]]:
    """(parameters, FLOPs a sample) that one channel adds at each site, at the present widths."""
    parameters, flops = price({})
    by_site = {site.name: price({site.name: site.step}) for site in sites}
    return (
        {site.name: (by_site[site.name][0] - parameters) / site.step for site in sites},
        {site.name: (by_site[site.name][1] - flops) / site.step for site in sites},
    )
