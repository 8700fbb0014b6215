"""What a replay of a site's middle reads off the site, known before it runs: a sharded model is gathered first."""

from __future__ import annotations

from torch.fx import Node

from ..sites import Followed, LayerCall, Site, Sites
from ..sites.nodes import bind, plain_name, short_name

__all__ = ["input_node", "nodes_read", "tensors_read"]

_OWN = ("producer", "consumer", "bias")


def tensors_read(sites: Sites, site: Site) -> frozenset[str]:
    """Names of the parameters and buffers whose values `Replay` may read, on the middle and off it.

    The weights of the site's own producers and consumers are not among them: new units bring their own.
    """
    names = {slot.tensor for slot in site.slots if slot.role not in _OWN}
    graph = sites.graph
    if graph is None:
        return frozenset(names)
    read = {node.name for node in nodes_read(graph, site) if node.op == "placeholder"}
    return frozenset(names | {name for placeholder, name in graph.trace.tensors.items() if placeholder in read})


def nodes_read(graph: Followed, site: Site) -> set[Node]:
    """The nodes off the site whose values `Replay` works out again, down to parameters and the model's inputs."""
    inside = set(site.middle)
    calls = {call.node: call for call in graph.calls}
    producers = {node for node, call in calls.items() if call.name in site.producers}
    # A producer's own input was seen; whatever else lies off the site is computed again from the model's inputs.
    seen = {input_node(node, calls[node]) for node in producers if calls[node].kind != "embedding"}
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
    read: set[Node] = set()
    while wanted:
        node = wanted.pop()
        if node not in seen and node not in read:
            read.add(node)
            wanted += node.all_input_nodes
    return read


def input_node(node: Node, call: LayerCall) -> Node:
    if call.source is not None:
        return call.source
    return node.args[1] if short_name(node) == "addmm" else node.args[0]  # type: ignore[return-value]
