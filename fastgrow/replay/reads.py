"""What a replay of a site's middle reads of the model, known before it runs: a sharded model is gathered first."""

from __future__ import annotations

from torch.fx import Node

from ..sites import Site, Sites
from ..sites.nodes import bind, plain_name
from .middle import input_node

__all__ = ["tensors_read"]

_OWN = ("producer", "consumer", "bias")


def tensors_read(sites: Sites, site: Site) -> frozenset[str]:
    """Names of the parameters and buffers whose values `Replay` may read, on the middle and off it.

    The weights of the site's own producers and consumers are not among them: new units bring their own.
    """
    names = {slot.tensor for slot in site.slots if slot.role not in _OWN}
    graph = sites.graph
    if graph is None:
        return frozenset(names)
    inside = set(site.middle)
    calls = {call.node: call for call in graph.calls}
    producers = {node for node, call in calls.items() if call.name in site.producers}
    # A producer's own input was seen; whatever else lies off the site is computed again from the model's inputs.
    known = {input_node(node, calls[node]) for node in producers if calls[node].kind != "embedding"}
    wanted: list[Node] = []
    for node in graph.trace.nodes:
        sources = [source for source in node.all_input_nodes if source.name not in inside]
        if node in calls and calls[node].name in site.consumers:
            wanted += [source for source in sources if source is input_node(node, calls[node])]
        if node in producers:
            wanted += sources if calls[node].kind == "embedding" else ()
        elif node.name in inside:
            # An RMSNorm's mean square is taken over all channels, the site's present ones too.
            wanted += [*sources, bind(node)["input"]] if plain_name(node) == "rms_norm" else sources
    while wanted:
        node = wanted.pop()
        if node in known:
            continue
        known.add(node)
        if node.op == "placeholder":
            names.update([graph.trace.tensors[node.name]] if node.name in graph.trace.tensors else ())
        wanted += node.all_input_nodes
    return frozenset(names)
