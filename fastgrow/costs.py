"""What a network costs at any widths: parameters, and FLOPs of its linear and convolution layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import nn

from .layout import size
from .sites import Sites, unwrap

__all__ = ["Price", "pricing", "unit_costs"]

Price = Callable[[Mapping[str, int]], tuple[int, float]]


def pricing(model: nn.Module, sites: Sites) -> Price:
    """A function: units per site -> (parameters, forward FLOPs for the example inputs) of the network with them.

    FLOPs are two for each multiply-add of linear and convolution layers, as
    torch.utils.flop_counter counts them, at the example inputs' batch and map sizes.
    """
    # Not the parameters themselves: a price may outlive them.
    lengths_now = {name: parameter.numel() for name, parameter in unwrap(model).named_parameters()}
    present = sites.sizes(model)
    graph = sites.graph

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
        return parameters, flops

    return price


def unit_costs(model: nn.Module, sites: Sites, price: Price) -> tuple[dict[str, float], dict[str, float]]:
    """(parameters, FLOPs) that one channel adds at each site, at the present widths."""
    parameters, flops = price({})
    by_site = {site.name: price({site.name: site.step}) for site in sites}
    return (
        {site.name: (by_site[site.name][0] - parameters) / site.step for site in sites},
        {site.name: (by_site[site.name][1] - flops) / site.step for site in sites},
    )
