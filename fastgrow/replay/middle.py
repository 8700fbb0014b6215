"""The middle of a site, replayed on new units.

The ops between a site's producers and consumers are cut out of the exported graph and run on a few
probe units, as the new units will live in the network: M X = the consumers' weight gradients for the
image of X under the middle's derivative, M^T Y the same way back. Only the
producers' inputs, the gradients at the consumers' outputs and the model's inputs are needed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..birth import birth_values
from ..errors import GrowthError
from ..layout import (
    Concat,
    Layout,
    Leaf,
    axes_of,
    restricted_size,
    size,
    whole_unit_positions,
)
from ..names import eps_of
from ..sites import Followed, LayerCall, Site, Sites, tensors_of, unwrap
from ..sites.nodes import bind, is_rms, module_of, plain_name, shape_of, short_name
from ..stages import edited_attributes
from .activations import expected, live_at_zero, out_of_place
from .linear import linear_slopes, route_of_zeros
from .reads import input_node
from .retrace import graph_of

__all__ = ["Capture", "Replay"]

_VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "expand", "view_as", "reshape_as"}
_IDENTITIES = {
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "native_dropout",
    "detach",
}
_FILLED = {"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"}
_NORM_STATISTICS = {"batch_norm", "instance_norm"}


@dataclass
class Capture:
    """What one forward and backward pass left: tensors by (layer, number of its call)."""

    samples: int = 0
    inputs: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # of producers
    gradients: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # at consumers' outputs
    called: set[tuple[str, int]] = field(default_factory=set)  # consumers whose outputs a gradient could have reached
    arguments: dict[str, Tensor] = field(default_factory=dict)  # the tensors that the model was called with, by place
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # what it was called with, positional and by name
    hidden: set[str] = field(default_factory=set)  # layers that were called with gradients off
    flat: bool = False  # samples are the bags of a flat text: rows of one-dimensional arguments are none

    def of(self, layers: Collection[str]) -> Capture:
        """What it holds of these layers."""
        inputs, gradients = (
            {key: tensor for key, tensor in tensors.items() if key[0] in layers}
            for tensors in (self.inputs, self.gradients)
        )
        return replace(self, inputs=inputs, gradients=gradients, called={k for k in self.called if k[0] in layers})

    def to(self, device: torch.device | str) -> Capture:
        """The same on another device."""
        inputs, gradients = (
            {key: tensor.to(device) for key, tensor in tensors.items()} for tensors in (self.inputs, self.gradients)
        )
        return replace(
            self,
            inputs=inputs,
            gradients=gradients,
            arguments={place: tensor.to(device) for place, tensor in self.arguments.items()},
        )


class Replay:
    """The middle of one site on new units, for one captured batch.

    live: activations as they are, for units that start away from zero; otherwise with their derivative
    from the right at zero. present: the site's own units, all of them, in place of new ones. surrogates:
    activations, by the name of their ATen op, that are replaced. tracing: the model may be traced at this batch's sizes
    (`graph_of`).
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        site: Site,
        capture: Capture,
        *,
        live: bool = False,
        present: bool = False,
        surrogates: Mapping[str, Callable[..., Tensor]] | None = None,
        tracing: bool = True,
    ) -> None:
        self.live = live or present
        self.present = present
        self.surrogates = dict(surrogates or {})
        if sites.graph is None:
            raise GrowthError(f"site {site.name!r} was named by hand and is no plain chain: find it with find_sites")
        at = graph_of(model, sites, site, capture.arguments, capture.call, tracing=tracing)
        self.site = at.site
        self.graph: Followed = at.graph
        self.capture = capture
        self.tensors = tensors_of(model)
        double = any(t.dtype == torch.float64 for t in (*capture.inputs.values(), *capture.gradients.values()))
        self.dtype = torch.float64 if double else torch.float32
        self.device = next(iter((*capture.gradients.values(), *capture.inputs.values()))).device
        self.modules = dict(unwrap(model).named_modules())
        self.sizes = {**at.sizes, **sites.sizes(model, room=True)}
        places = zip(self.graph.trace.inputs, self.graph.trace.paths, strict=True)
        self.arguments = {name: capture.arguments[place] for name, place in places if place in capture.arguments}
        self._bind_inputs()
        self._side: dict[Node, Any] = {}
        self.producers = self._calls(site.producers)
        self.consumers = self._calls(site.consumers)
        self.capture = self._at_whole_outputs(capture)
        names = set(site.middle)
        self._order = [n for n in self.graph.trace.nodes if n.name in names or n in self.consumers]
        self._carrying = {node for node in self._order if node.name in names}
        # At zero most middles are linear op by op; then a forward pass is the derivative itself.
        self._slopes = (
            None
            if self.live or self.surrogates or site.gates
            else linear_slopes(
                [node for node in self._order if node in self._carrying], self._carries, set(self.producers)
            )
        )

    @property
    def linear(self) -> bool:
        """Whether `forward` is the derivative of the middle at zero, a linear function of the rows."""
        return self._slopes is not None

    def _bind_inputs(self) -> None:
        for node in self.graph.trace.nodes:
            value = self.arguments.get(node.name) if node.op == "placeholder" else None
            if isinstance(value, Tensor):
                for dim, extent in zip(self.graph.dims[node], value.shape, strict=False):
                    if isinstance(dim, Leaf):
                        self.sizes[dim.axis] = extent

    def _at_whole_outputs(self, capture: Capture) -> Capture:
        """The capture with the gradients of calls with a slice of a weight set among zeros for all its outputs."""
        gradients = dict(capture.gradients)
        for call, number in self.consumers.values():
            seen = gradients.get((call.name, number))
            whole = size(self.graph.tensor_dims[call.weight][call.out_dim], self.sizes)
            if call.part is not None and seen is not None and seen.shape[-1] != whole:
                padded = seen.new_zeros(*seen.shape[:-1], whole)
                padded[..., call.span(lambda layout: size(layout, self.sizes))] = seen
                gradients[call.name, number] = padded
        return replace(capture, gradients=gradients)

    def _calls(self, names: Sequence[str]) -> dict[Node, tuple[LayerCall, int]]:
        counts: dict[str, int] = {}
        found: dict[Node, tuple[LayerCall, int]] = {}
        for call in self.graph.calls:
            number = counts.get(call.name, 0)
            counts[call.name] = number + 1
            if call.name in names:
                found[call.node] = (call, number)
        return found

    def unread(self, call: LayerCall, number: int) -> bool:
        """Whether a consumer was called, and the loss does not depend on it."""
        key = (call.name, number)
        return key in self.capture.called and key not in self.capture.gradients

    # -- values that do not carry the site's units ---------------------------------------------------

    def side(self, node: Node) -> Any:
        """A value off the site, recomputed from the model's inputs where it is needed."""
        if node in self._side:
            return self._side[node]
        if node.op == "placeholder":
            name = self.graph.trace.tensors.get(node.name)
            if name is not None:
                value: Any = self.tensors[name].detach()
            elif node.name in self.graph.trace.constants:
                value = self.graph.trace.constants[node.name]
            elif node.name in self.arguments:
                value = self.arguments[node.name]
            else:
                raise GrowthError(f"site {self.site.name!r}: the model's input {node.name!r} was not seen")
            value = self._cast(value)
        else:
            captured = self._captured(node)
            value = captured if captured is not None else self._run(node, self.side, lambda n: size, self.sizes)
        self._side[node] = value
        return value

    def _captured(self, node: Node) -> Tensor | None:
        """A producer's own input needs no recomputation: it was seen."""
        for user in node.users:
            if user in self.producers:
                call, number = self.producers[user]
                if input_node(user, call) is node:
                    return self._producer_input(call, number)
        return None

    def _producer_input(self, call: LayerCall, number: int) -> Tensor:
        key = (call.name, number)
        if key not in self.capture.inputs:
            raise GrowthError(f"layer {call.name!r} was not seen in the forward pass (call {number + 1})")
        return self._cast(self.capture.inputs[key])

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.detach()
            return value.to(self.dtype) if value.is_floating_point() else value
        return value

    # -- one op ---------------------------------------------------------------------------------------

    def _run(self, node: Node, value_of: Callable[[Node], Any], extent_of: Any, sizes: Mapping[int, int]) -> Any:
        """Execute an op, with dropout off, in place made out of place, and shapes taken from the layouts."""
        kind = plain_name(node)
        target = node.target
        if target is operator.getitem:
            return value_of(node.args[0])[node.args[1]]  # type: ignore[arg-type]
        if kind in _VIEWS:
            source = value_of(node.args[0])  # type: ignore[arg-type]
            # a dimension that the view keeps has its present extent: batches differ in size
            kept = dict(zip(self.graph.dims[node.args[0]], source.shape, strict=True))  # type: ignore[index]
            dims = self.graph.dims[node]
            shape = [kept[dim] if dim in kept and kind != "expand" else extent_of(node)(dim, sizes) for dim in dims]
            return source.expand(shape) if kind == "expand" else source.reshape(shape)
        if kind in _IDENTITIES:
            return value_of(node.args[0])  # type: ignore[arg-type]
        mean = expected(node)
        if mean is not None:
            shape = [extent_of(node)(dim, sizes) for dim in self.graph.dims[node]]
            return torch.full(shape, mean, dtype=self.dtype, device=self.device)
        args: tuple[Any, ...] = torch.fx.node.map_arg(node.args, value_of)
        kwargs = dict(torch.fx.node.map_arg(node.kwargs, value_of))
        if kind in ("to", "_to_copy", "type_as"):
            dtype = node.meta["val"].dtype
            return args[0].to(self.dtype if dtype.is_floating_point else dtype)
        if kind == "add" and _adds_eps(node):
            args = (args[0], self._eps(node, args[1]))
        if kind == "scaled_dot_product_attention":
            return self._attention(node, args, kwargs)
        if self._slopes is not None and node in self._carrying:
            if node in self._slopes:
                slope = self._slopes[node]
                return args[0] if slope == 1 else args[0] * slope
            if kind == "max_pool2d":
                return route_of_zeros(node, args[0])
        special = self.surrogates.get(kind) or (None if self.live else live_at_zero(kind, node))
        if special is not None:
            return special(*args, **kwargs)
        if kind in _NORM_STATISTICS:
            return self._batch_norm(node, args)
        result = out_of_place(target)(*args, **kwargs)
        if kind in _FILLED and result.numel():  # of the batch that the graph was made with
            shape = [extent_of(node)(dim, sizes) for dim in self.graph.dims[node]]
            result = result.reshape(-1)[:1].reshape([1] * result.dim()).expand(shape)
        return result

    def _eps(self, node: Node, traced: float) -> float:
        """An RMSNorm's eps as it is now: growth re-scales it."""
        module = self.modules.get(module_of(node))
        now = eps_of(module)
        return now[1] if module is not None and now is not None and now[0] in edited_attributes(module) else traced

    def _attention(self, node: Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        bound = bind(node)
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        options: dict[str, Any] = {name: bound[name] for name in ("is_causal", "scale", "enable_gqa")}
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
            query, key, value = args[:3]
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.0, **options)

    def _batch_norm(self, node: Node, args: Sequence[Any]) -> Tensor:
        """New channels: weight 1, bias 0, running mean 0, running variance 1; the module says its mode."""
        bound = bind(node)
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        module = self.modules.get(stack[-1][0]) if stack else None
        uses_batch = module is None or module.training or bound["running_mean"] is None
        x, weight, bias = args[0], args[1], args[2]
        if bound.get("training", bound.get("use_input_stats")) and module is None:
            uses_batch = True
        over = [dim for dim in range(x.dim()) if dim != 1 and (dim != 0 or short_name(node) != "instance_norm")]
        if self._slopes is not None and node in self._carrying:
            factor = (0.0 if uses_batch else 1.0) + bound["eps"]
            return (x - x.mean(over, keepdim=True) if uses_batch else x) * factor**-0.5
        if uses_batch:
            mean, variance = x.mean(over, keepdim=True), x.var(over, unbiased=False, keepdim=True)
        else:
            mean, variance = (a.reshape(-1, *[1] * (x.dim() - 2)) for a in (args[3], args[4]))
        result = (x - mean) * torch.rsqrt(variance + bound["eps"])
        for parameter, combine in ((weight, torch.mul), (bias, torch.add)):
            if parameter is not None:
                result = combine(result, parameter.reshape(-1, *[1] * (x.dim() - 2)))
        return result

    # -- the site's units -------------------------------------------------------------------------------

    def forward(self, rows: Mapping[str, Tensor], units: int) -> dict[Node, Tensor]:
        """The consumers' inputs on the new units, for producers' new rows (rows, in, *kernel).

        A producer's bias is given as ``rows[name + ".bias"]`` (rows,); zero where it is not.
        """
        axis = self.site.axis
        sizes = {**self.sizes, axis: units}
        values: dict[Node, Any] = {}
        results: dict[Node, Tensor] = {}

        def value_of(node: Node) -> Any:
            if node in values:
                return values[node]
            if node.op == "placeholder" and self._carries(node):
                values[node] = self._newborn(node, sizes)
                return values[node]
            return self.side(node)

        def extent_of(node: Node) -> Callable[[Layout, Mapping[int, int]], int]:
            return lambda layout, at: restricted_size(layout, axis, at) if axis in axes_of(layout) else size(layout, at)

        for node in self._order:
            if node in self.consumers:
                call, _ = self.consumers[node]
                results[node] = value_of(input_node(node, call))
            if node not in self._carrying:
                continue
            if node in self.producers:
                values[node] = self._produce(node, rows, value_of, sizes)
            else:
                values[node] = self._run_carrying(node, value_of, extent_of, sizes)
        return results

    def _carries(self, node: Node) -> bool:
        dims = self.graph.dims.get(node) or []
        return any(self.site.axis in axes_of(dim) for dim in dims if not isinstance(dim, list))

    def _newborn(self, node: Node, sizes: Mapping[int, int]) -> Tensor:
        """The new units' part of a parameter on the middle."""
        name = self.graph.trace.tensors[node.name]
        slot = next(slot for slot in self.site.slots if slot.tensor == name)
        old = self.tensors[name].detach().to(self.dtype)
        if self.present:
            own = whole_unit_positions(slot.layout, self.site.axis, self.sizes).reshape(-1)
            return old.index_select(slot.dim, own.sort().values.to(old.device))
        return birth_values(slot.role, old, slot.dim, restricted_size(slot.layout, self.site.axis, sizes))

    def _produce(
        self, node: Node, rows: Mapping[str, Tensor], value_of: Callable[[Node], Any], sizes: Mapping[int, int]
    ) -> Tensor:
        call, number = self.producers[node]
        axis = self.site.axis
        weight = rows[call.name]
        if call.kind == "embedding":
            padding = int(bind(node).get("padding_idx", -1))
            if padding >= 0:  # its row is never trained
                weight = weight.index_fill(1, torch.tensor([padding], device=weight.device), 0.0)
            return F.embedding(value_of(node.args[1]), weight.T)  # type: ignore[arg-type]
        x = self._producer_input(call, number)
        bias = rows.get(f"{call.name}.bias")
        if call.kind == "linear":
            span = call.span(lambda layout: restricted_size(layout, axis, sizes) if axis in axes_of(layout) else 0)
            result = F.linear(x, weight[span], bias if bias is None else bias[span])
            rank = len(self.graph.dims[node])
            return result.reshape(-1, result.shape[-1]) if rank == 2 and result.dim() > 2 else result
        if call.kind == "stacked":
            result = torch.einsum(call.equation, x, weight)
            if bias is not None:  # (rows, members)
                out = call.letters()[2]
                order = bias if out.index("o") < out.index("g") else bias.T
                shape = [result.shape[at] if letter in "go" else 1 for at, letter in enumerate(out)]
                result = result + order.reshape(shape)
            return result
        bound = bind(node)
        if call.transposed:
            weight = weight.transpose(0, 1)
        options = [bound["stride"], bound["padding"]]
        options += [bound["output_padding"], bound["groups"]] if call.transposed else []
        options += [bound["dilation"]] + ([bound["groups"]] if not call.transposed else [])
        return out_of_place(node.target)(x, weight, bias, *options)

    def _run_carrying(
        self, node: Node, value_of: Callable[[Node], Any], extent_of: Any, sizes: Mapping[int, int]
    ) -> Any:
        kind = plain_name(node)
        axis = self.site.axis
        if kind == "cat":
            bound = bind(node)
            along = bound["dim"]
            dims = self.graph.dims[node]
            if axis in axes_of(dims[along]):
                parts = [part for part in bound["tensors"] if axis in axes_of(self.graph.dims[part][along])]
            else:
                parts = bound["tensors"]
            return torch.cat([value_of(part) for part in parts], along)
        if kind in ("chunk", "split", "split_with_sizes", "tensor_split", "slice", "narrow"):
            return self._pieces(node, kind, value_of, sizes)
        if kind == "group_norm":
            x = value_of(node.args[0])  # type: ignore[arg-type]
            bound = bind(node)
            groups = self._groups(node, sizes)
            weight, bias = (value_of(bound[name]) if bound[name] is not None else None for name in ("weight", "bias"))
            return F.group_norm(x, groups, weight, bias, bound["eps"])
        if kind == "layer_norm":
            raise GrowthError(
                f"site {self.site.name!r}: a LayerNorm mixes its channels, so no unit can be added without changing "
                "the function; grow it by full duplication (how.Net2Net, units = its width)"
            )
        if kind == "rms_norm":
            bound = bind(node)
            x = value_of(bound["input"])
            whole = self.side(bound["input"])
            eps = self._eps(node, bound["eps"] or torch.finfo(self.dtype).eps)
            return x * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + eps)
        if kind in ("conv1d", "conv2d", "conv3d"):  # depthwise, on the way
            bound = bind(node)
            x, weight = value_of(bound["input"]), value_of(bound["weight"])
            bias = value_of(bound["bias"]) if bound["bias"] is not None else None
            options = (bound["stride"], bound["padding"], bound["dilation"], x.shape[1])
            return out_of_place(node.target)(x, weight, bias, *options)
        return self._run(node, value_of, extent_of, sizes)

    def _groups(self, node: Node, sizes: Mapping[int, int]) -> int:
        per_group = shape_of(node)[1] // int(bind(node)["num_groups"])  # which stays: whole groups are added
        return max(1, restricted_size(self.graph.dims[node][1], self.site.axis, sizes) // per_group)

    def _pieces(self, node: Node, kind: str, value_of: Callable[[Node], Any], sizes: Mapping[int, int]) -> Any:
        """Cut only along pieces that carry the units; the others are empty here."""
        axis = self.site.axis
        source_node = node.args[0]
        source = value_of(source_node)  # type: ignore[arg-type]
        source_dims = self.graph.dims[source_node]  # type: ignore[index]
        rank = len(source_dims)
        along = int(bind(node)["dim"]) % rank
        outputs = self.graph.dims[node]
        single = kind in ("slice", "narrow")
        if axis not in axes_of(source_dims[along]):
            return self._run(node, value_of, lambda n: size, sizes)
        layouts = [outputs[along]] if single else [dims[along] for dims in outputs]
        offset = 0
        if single:
            whole = source_dims[along]
            start = int(bind(node).get("start") or 0)
            passed = 0
            for part in whole.parts if isinstance(whole, Concat) else ():
                if passed >= start:
                    break
                passed += size(part, self.sizes)
                offset += restricted_size(part, axis, sizes) if axis in axes_of(part) else 0
        result = []
        for layout in layouts:
            length = restricted_size(layout, axis, sizes) if axis in axes_of(layout) else 0
            result.append(source.narrow(along, offset, length))
            offset += length
        return result[0] if single else result


def _adds_eps(node: Node) -> bool:
    """Whether an addition is that of eps to the mean square of an RMSNorm written out."""
    source = node.args[0]
    return isinstance(source, Node) and is_rms(source) and not isinstance(node.args[1], Node)
