"""A site's growth matrix as a linear map: two stored tensors where the middle is plain, replay elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.fx import Node

from .errors import GrowthError
from .layout import Leaf
from .names import find_module
from .operators import ConvFlattenLinearPair, ConvPair, LinearMap, LinearPair, StackedPair
from .replay import Capture, ReplayMap, derivative_from_the_right, same_shapes, sizeless
from .site_data import SiteData, summed
from .sites import LayerCall, Site, Sites
from .sites.nodes import bind, conv_padding, module_of, plain_name, short_name

__all__ = ["check_mapped", "check_untied", "growth_map", "stacked_pairs"]

_PASSES = frozenset(
    "dropout feature_dropout alpha_dropout feature_alpha_dropout contiguous clone alias detach to view reshape flatten "
    "_unsafe_view".split()
)


@dataclass(frozen=True)
class Chain:
    """A site whose middle is a chain of elementwise ops (and one batch norm) between two layers."""

    producer: LayerCall
    consumer: LayerCall
    slope: float  # of the middle at zero, without the norm
    norm: Node | None
    sized: bool = False  # the slope holds numbers that may have been computed from the sizes of the inputs

    @cached_property
    def letters(self) -> tuple[str, str, str]:
        """Of stacked layers, in the producer's letters: what it reads, what dL/dz of the consumer has, and both as
        (member, samples, channel) without the channel."""
        read, _, between = self.producer.letters()
        taken, _, out = self.consumer.letters()
        same = dict(zip(taken, between, strict=True))  # what lies between is one tensor, read under other letters
        out = "".join(letter if letter == "o" else same[letter] for letter in out)
        return read, out, "g" + "".join(letter for letter in between if letter not in "go")


def _chain_of(sites: Sites, site: Site) -> Chain | None:
    """`plain_chain`, read from the graph once."""
    if sites.graph is None:
        return None
    known = sites.graph.chains
    if site.name not in known:
        known[site.name] = plain_chain(sites, site)
    found: Chain | None = known[site.name]
    return found


def plain_chain(sites: Sites, site: Site) -> Chain | None:
    """The chain that a site's middle is; None where it branches or holds any other op."""
    graph = sites.graph
    if graph is None or site.gates or len(site.producers) != 1 or len(site.consumers) != 1 or site.step != 1:
        return None
    calls = [call for call in graph.calls if call.name in (*site.producers, *site.consumers)]
    if [call.name for call in calls] != [site.producers[0], site.consumers[0]]:
        return None
    producer, consumer = calls
    if producer.part is not None or consumer.part is not None:
        return None
    if {producer.kind, consumer.kind} - {"linear", "conv"} and {producer.kind, consumer.kind} != {"stacked"}:
        return None
    inside = set(site.middle)
    node, slope, norm, sized = producer.node, 1.0, None, False
    for _ in site.middle:
        followers = [user for user in node.users if user.name in inside or user is consumer.node]
        if len(followers) != 1 or any(user.op == "output" for user in node.users):
            return None
        node = followers[0]
        if node is consumer.node:
            return Chain(producer, consumer, slope, norm, sized) if _fits(sites, site, producer, consumer) else None
        kind = plain_name(node)
        if kind in _PASSES:
            continue
        if kind == "batch_norm" and norm is None:
            norm = node
            continue
        if kind == "add" and _adds_newborn_zeros(sites, site, node):
            continue
        derivative = derivative_from_the_right(node)
        if derivative is None:
            return None
        if derivative == 0:
            raise GrowthError(
                f"site {site.name!r}: {kind} has derivative 0 at 0, so units that start at zero would never learn; use "
                "how.ZeroOutgoing"
            )
        slope *= derivative
        sized = sized or not sizeless(node)
    return None


def _adds_newborn_zeros(sites: Sites, site: Site, node: Node) -> bool:
    """Whether an addition adds a parameter whose new entries are zero (a bias of its own)."""
    assert sites.graph is not None
    names = {sites.graph.trace.tensors.get(arg.name) for arg in node.all_input_nodes if arg.op == "placeholder"}
    shifts = {slot.tensor for slot in site.slots_of("shift")}
    return len(node.all_input_nodes) == 2 and len(names & shifts) == 1


def _fits(sites: Sites, site: Site, producer: LayerCall, consumer: LayerCall) -> bool:
    """The layouts that the pairs of stored tensors assume: bare, or channels x positions behind a flatten."""
    assert sites.graph is not None
    out = site.weight(producer.name, "producer").layout
    into = site.weight(consumer.name, "consumer").layout
    hidden = sites.graph.dims[producer.node]
    if not isinstance(out, Leaf):
        return False
    if producer.kind == "stacked":
        if not (site.separate and isinstance(into, Leaf)):
            return False
        assert consumer.source is not None
        return list(hidden) == list(sites.graph.dims[consumer.source])
    if producer.kind == "conv":
        if not _even(producer) or len(hidden) != len(sites.graph.tensor_dims[producer.weight]):
            return False
        if consumer.kind == "conv":
            return isinstance(into, Leaf) and _even(consumer)
        source = consumer.node.args[1] if short_name(consumer.node) == "addmm" else consumer.node.args[0]
        dims = sites.graph.dims[source]  # type: ignore[index]
        return len(dims) == 2 and tuple(getattr(into, "parts", (into,))) == tuple(hidden[1:])
    return consumer.kind == "linear" and isinstance(into, Leaf)


@dataclass(frozen=True)
class _Geometry:
    """A convolution's geometry, an entry for each of its one, two or three spatial dimensions."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def _geometry(call: LayerCall) -> _Geometry:
    bound = bind(call.node)
    kernel = tuple(int(k) for k in call.node.args[1].meta["val"].shape[2:])  # type: ignore[union-attr]

    def each(value: int | Sequence[int]) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return tuple(int(v) for v in (values * len(kernel) if len(values) == 1 else values))

    dilation = each(bound["dilation"])
    padding = tuple(before for before, _ in conv_padding(bound["padding"], kernel, dilation))
    return _Geometry(kernel, each(bound["stride"]), padding, dilation)


def _even(call: LayerCall) -> bool:
    """Whether a convolution pads as much after as before (padding="same" of an even kernel does not)."""
    bound = bind(call.node)
    kernel = call.node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
    dilation = bound["dilation"] if len(bound["dilation"]) == len(kernel) else [bound["dilation"][0]] * len(kernel)
    return all(before == after for before, after in conv_padding(bound["padding"], kernel, dilation))


def check_mapped(site: Site) -> None:
    """Raises `GrowthError` for a site that has no growth matrix."""
    for norm in site.norms:
        if norm.kind == "layer_norm":
            raise GrowthError(
                f"site {site.name!r}: {norm.module!r} (LayerNorm) mixes its channels, so units added by gradients "
                "would change the function; leave the site out, or grow it by full duplication"
            )
    check_untied(site)


def check_untied(site: Site) -> None:
    """Raises `GrowthError` for a site whose units are written and read by one tensor."""
    if site.tied:
        raise GrowthError(
            f"site {site.name!r}: {site.tied[0]!r} is tied, producer and consumer at once, so its new entries cannot "
            "be zero on one side only; exclude the site, or untie the weights"
        )


def growth_map(data: SiteData) -> LinearMap:
    """M of a site over several batches, each with its weight."""
    check_mapped(data.site)
    chain = _chain_of(data.sites, data.site)
    if chain is None:
        return summed(data.maps())
    maps: list[LinearMap] = []
    for capture, weight in data.batches():
        pair = _pair(data, chain, capture, weight)
        maps.append(pair or ReplayMap(data.replay(capture), weight, bias=data.bias))
    return summed(maps)


def _pair(data: SiteData, chain: Chain, capture: Capture, weight: float) -> LinearMap | None:
    assert data.sites.graph is not None
    if chain.sized and not same_shapes(data.sites.graph, capture.arguments):
        return None
    h = _seen(capture.inputs, chain.producer.name, "was not called in the forward pass")
    dz = _seen(capture.gradients, chain.consumer.name, "received no gradient; the loss must depend on it")
    bias = data.bias and chain.producer.bias is not None
    scale = weight * chain.slope
    centred = False
    if chain.norm is not None:
        bound = bind(chain.norm)
        module = find_module(data.model, module_of(chain.norm))
        if module is None or chain.producer.kind != "conv" or chain.consumer.kind != "conv":
            return None
        centred = module.training or bound["running_mean"] is None
        scale *= (float(bound["eps"]) if centred else 1.0 + float(bound["eps"])) ** -0.5
    if chain.producer.kind == "stacked":
        return _stacked_pair(chain, h, dz, scale, bias)
    if chain.producer.kind == "linear":
        return LinearPair(dz.reshape(-1, dz.shape[-1]), h.reshape(-1, h.shape[-1]), scale, bias)
    geometry = _geometry(chain.producer)
    if chain.consumer.kind == "linear":
        return ConvFlattenLinearPair(dz, h, geometry, scale, bias)
    return ConvPair(dz, h, geometry, _geometry(chain.consumer), scale, bias, centred=centred)


def _stacked_pair(chain: Chain, h: Tensor, dz: Tensor, scale: float, bias: bool) -> StackedPair:
    """Both tensors as (G, N, channels), samples in the order that they have between the two layers."""
    read, out, shared = chain.letters
    if "g" not in read:
        h, read = h[None], f"g{read}"
    grad, data = _ordered(dz, out, f"{shared}o"), _ordered(h, read, f"{shared}i")
    if data.shape[0] != grad.shape[0]:  # one input for all members
        data = data.expand(grad.shape[0], *data.shape[1:])
    return StackedPair(grad, data, scale, bias)


def _ordered(tensor: Tensor, letters: str, wanted: str) -> Tensor:
    """(first, all between, last) of a tensor's dimensions in the wanted order."""
    if letters != wanted:
        tensor = tensor.permute([letters.index(letter) for letter in wanted])
    return tensor if len(wanted) == 3 else tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def stacked_pairs(data: SiteData) -> list[StackedPair]:
    """The growth matrices of a stack's members, batch by batch; none where its middle is not elementwise."""
    chain = _chain_of(data.sites, data.site) if data.site.stacked and data.site.separate else None
    if chain is None:
        return []
    pairs = [_pair(data, chain, *batch) for batch in data.batches()]
    found = [pair for pair in pairs if isinstance(pair, StackedPair)]
    return found if len(found) == len(pairs) else []  # one batch has another middle: a replay of all of them


def _seen(tensors: dict[tuple[str, int], Tensor], name: str, missing: str) -> Tensor:
    if (name, 0) not in tensors:
        raise GrowthError(f"layer {name!r} {missing}")
    return tensors[name, 0]
