"""Room reserved for growth: units that are there in every tensor, write nothing and receive no gradient.

A unit whose incoming weights, bias and outgoing weights are zero outputs ``f(0) = 0``. The gradient of its outgoing
weights is ``dL/dz_{l+1} h = 0``, since h = 0; that of its incoming weights is ``(W_{l+1}^T dL/dz_{l+1}) f'(0) x = 0``,
since its column of W_{l+1} is zero; behind a batch norm x_hat = 0 and beta = 0. So every optimizer that moves nothing
without a gradient leaves it as it is. Room lies behind the units of its axis; `fastgrow.stages` marks it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from . import stages
from .blocks import has_blocks
from .errors import GrowthError
from .layout import index_map, restricted_size, size
from .names import named_modules_in
from .replay import derivative_from_the_right
from .sites import Site, Sites, tensors_of, unwrap
from .sites.nodes import bind, plain_name
from .solve import Directions

__all__ = [
    "check_blank",
    "check_reservable",
    "check_told_apart",
    "has_room",
    "live_directions",
    "live_parameters",
    "live_shares",
]

_KEEPING = frozenset(
    "batch_norm instance_norm prelu mean sum amax max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d "
    "avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices dropout "
    "feature_dropout contiguous clone alias detach to view reshape _unsafe_view flatten unflatten permute transpose t "
    "movedim squeeze unsqueeze expand repeat select slice chunk split split_with_sizes getitem narrow roll flip "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d".split()
)
"""Ops whose output is zero where their first operand is."""


def has_room(model: nn.Module) -> bool:
    """Whether anything is reserved in a model."""
    return stages.any_room(unwrap(model))


def live_parameters(model: nn.Module) -> int:
    """Entries of the model's parameters, room left out."""
    inner = unwrap(model)
    named = named_modules_in(inner)
    room = stages.live_in(inner, named)
    if not room:
        held = (p for _, module in named for p in module._parameters.values() if p is not None)
        return sum({id(parameter): parameter.numel() for parameter in held}.values())
    lengths = {name: {dim: len(index) for dim, index in of.items()} for name, of in room.items()}
    return sum(
        math.prod(lengths.get(name, {}).get(dim, length) for dim, length in enumerate(parameter.shape))
        for name, parameter in inner.named_parameters()
    )


def check_reservable(sites: Sites, site: Site) -> None:
    """Raises `GrowthError` where units that are zero would not be inert, or growth could not fill them."""
    reason = None
    if sites.graph is None or not site.middle:
        reason = "it was named by hand, so what lies between its layers is not known"
    elif site.heads:
        reason = "its units are attention heads"
    elif has_blocks(site) or site.step != 1:
        reason = "its units are more than a channel each (gates, groups)"
    elif mixing := [norm for norm in site.norms if norm.kind not in ("batch_norm", "instance_norm")]:
        reason = f"{mixing[0].module!r} ({mixing[0].kind}) takes its statistics over all channels, room included"
    elif site.tied:
        reason = f"{site.tied[0]!r} is tied, producer and consumer at once"
    else:
        loud = _first_loud(sites, site)
        reason = None if loud is None else f"its channels pass {loud}, which need not be zero where they are"
    if reason is not None:
        raise GrowthError(f"site {site.name!r} can have no room reserved: {reason}; grow it without")


def _first_loud(sites: Sites, site: Site) -> str | None:
    """The first op that may write something else than zero from units that are zero, and reaches a consumer."""
    graph = sites.graph
    assert graph is not None
    inside = set(site.middle)
    own = {slot.tensor for slot in site.slots}
    quiet: set[Node] = set()
    loud: dict[Node, str] = {}
    written = {call.node for call in graph.calls if call.weight in own and call.name not in site.consumers}
    written |= {call.node for call in graph.calls if call.name in site.producers}
    for node in graph.trace.nodes:
        if graph.trace.tensors.get(node.name) in own or node in written:
            quiet.add(node)
        elif node.name in inside:
            if _is_quiet(node, quiet, inside):
                quiet.add(node)
            else:
                operands = [loud[source] for source in node.all_input_nodes if source in loud]
                loud[node] = operands[0] if operands else plain_name(node)
    for call in graph.calls:
        if call.name in site.consumers:
            found = [loud[source] for source in call.node.all_input_nodes if source in loud]
            if found:
                return found[0]
    return None


def _is_quiet(node: Node, quiet: set[Node], inside: set[str]) -> bool:
    """Whether what a node writes of the site's channels is zero where the nodes in `quiet` are."""
    kind = plain_name(node)
    operands = node.all_input_nodes
    if kind == "mul":
        return any(source in quiet for source in operands)
    if kind == "cat":  # what is not on the site lies beside it
        return all(source in quiet or source.name not in inside for source in operands)
    if kind in ("add", "sub"):
        numbers = [arg for arg in node.args[:2] if isinstance(arg, (int, float))]
        return not any(numbers) and all(source in quiet for source in operands)
    if kind in ("constant_pad_nd", "pad"):
        return operands[0] in quiet and not bind(node).get("value")
    if kind == "div" and len(operands) == 2:
        return operands[0] in quiet and operands[1] not in quiet
    if kind in _KEEPING:
        return operands[0] in quiet
    return bool(operands) and operands[0] in quiet and derivative_from_the_right(node) is not None


def check_told_apart(model: nn.Module, targets: Iterable[Site]) -> None:
    """Raises `GrowthError` for sites whose directions cannot be told from the room in their tensors."""
    roomy = stages.live_in(unwrap(model))
    for site in targets if roomy else ():
        if has_blocks(site) and any(slot.tensor in roomy for slot in site.slots):
            raise GrowthError(
                f"site {site.name!r}: its units take more than one direction each (gates, groups), which cannot be "
                "told from reserved room in the layers around it; call fg.release first, leave the site out, or use a "
                "method that reads no gradients (how.Random)"
            )


def check_blank(model: nn.Module) -> None:
    """Raises `GrowthError` where room is no longer zero, and so takes part in what the network computes."""
    tensors = tensors_of(model)
    found, names = [], []
    for name, positions in stages.live_in(unwrap(model)).items():
        tensor = tensors[name].detach()
        for dim, index in positions.items() if isinstance(tensors[name], nn.Parameter) else ():
            rest = torch.ones(tensor.shape[dim], dtype=torch.bool, device="cpu")
            rest[index] = False
            found.append(tensor.index_select(dim, rest.nonzero().squeeze(1).to(tensor.device)).any())
            names.append(name)
    device = found[0].device if found else None
    written = torch.stack([one.to(device) for one in found]).tolist() if found else []
    if any(written):
        name = names[written.index(True)]
        raise GrowthError(
            f"{name!r}: entries that are reserved for growth are no longer zero (the model was initialised or loaded "
            "anew, or the optimizer moves entries without a gradient); reserve after the values are set, or set them "
            "to zero"
        )


def live_shares(model: nn.Module, sites: Sites) -> dict[str, tuple[int, int]]:
    """Layer -> (output channels that hold units, all of them), of the layers with room in their outputs."""
    if sites.graph is None:
        return {}
    now, whole = sites.sizes(model), sites.sizes(model, room=True)
    shares = {}
    for call in sites.graph.calls:
        layout = call.part[1] if call.part is not None else sites.graph.tensor_dims[call.weight][call.out_dim]
        known, length = size(layout, now), size(layout, whole)
        if known != length:
            shares[call.name] = (known, length)
    return shares


def live_directions(model: nn.Module, sites: Sites, found: Mapping[str, Directions]) -> dict[str, Directions]:
    """Directions of the network without its room, from those of the one with it.

    M has zero rows and columns where there is room, and its singular vectors have zeros there, but for singular
    values of zero: those directions are left out.
    """
    now, whole = sites.sizes(model), sites.sizes(model, room=True)
    return {name: _without_room(sites, sites[name], directions, now, whole) for name, directions in found.items()}


def _without_room(
    sites: Sites, site: Site, found: Directions, now: Mapping[int, int], whole: Mapping[int, int]
) -> Directions:
    kept = {role: _kept(sites, site, role, now, whole) for role in ("consumer", "producer")}
    if all(bool(mask.all()) for mask in kept.values()):
        return found
    cut: dict[str, Any] = {}
    columns = torch.ones(len(found.values), dtype=torch.bool, device=found.values.device)
    for name, role in (("left", "consumer"), ("right", "producer")):
        vectors = getattr(found, name)
        if not vectors.shape[0]:  # a solver without this side
            continue
        mask = kept[role].to(vectors.device)
        rest = vectors.shape[0] - len(mask)  # the producers' biases stand behind their weights
        mask = torch.cat([mask, mask.new_ones(rest)])
        cut[name] = vectors[mask]
        squares = vectors.square().sum(0)
        columns &= vectors[~mask].square().sum(0) <= 1e-3 * squares
    for entry in dataclasses.fields(found):
        value = cut.get(entry.name, getattr(found, entry.name))
        if isinstance(value, Tensor):
            cut[entry.name] = value[..., columns]
    return dataclasses.replace(found, **cut)


def _kept(sites: Sites, site: Site, role: str, now: Mapping[int, int], whole: Mapping[int, int]) -> Tensor:
    """Which entries of a unit's vector (`Newborns.split`) do not stand for another unit that is room."""
    masks = []
    for layer in site.producers if role == "producer" else site.consumers:
        slot = site.weight(layer, role)
        layouts = sites.layouts(slot.tensor)
        out, into, *rest = slot.order(len(layouts))
        other = layouts[into if role == "producer" else out]
        live = torch.zeros(size(other, whole), dtype=torch.bool, device="cpu")
        live[index_map(other, now, whole)] = True
        own = restricted_size(slot.layout, site.axis, {**whole, site.axis: 1})
        grid = live.repeat(own) if role == "producer" else live.repeat_interleave(own)
        masks.append(grid.repeat_interleave(math.prod(size(layouts[dim], whole) for dim in rest)))
    return torch.cat(masks)
