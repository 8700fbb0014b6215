"""Module attributes that repeat a size (``out_channels``, ``num_features``, ``num_heads``)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..layout import Concat, Layout, Leaf, Product, axes_of, size
from .propagation import Propagation
from .site import AttributeRule, Slot

__all__ = ["attribute_rules"]

_OUT = {
    "producer": ("out_features", "out_channels", "embedding_dim", "nf"),
    "consumer": ("in_features", "in_channels", "nx"),
}
_EMBEDDINGS = {
    "in_proj_weight": ("embed_dim", "kdim", "vdim"),
    "q_proj_weight": ("embed_dim",),
    "k_proj_weight": ("kdim",),
    "v_proj_weight": ("vdim",),
}
_NORM = ("num_features", "num_channels", "normalized_shape")
_QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_q_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "num_key_value_head")
_ALL_HEADS = ("all_head_size", "split_size", "inner_dim", "attn_dim", "attention_dim", "q_dim", "kv_dim")
_HIDDEN = (
    "intermediate_size",
    "ffn_dim",
    "hidden_features",
    "mlp_dim",
    "hidden_dim",
    "expert_dim",
    "inner_dim",
    "d_ff",
    "dim_feedforward",
)


def attribute_rules(
    model: nn.Module, slots: Sequence[Slot], propagation: Propagation, axis: int, heads: bool
) -> tuple[AttributeRule, ...]:
    """The attributes that must follow an axis, for each module that owns one of its slots.

    An attribute is taken only where its present value is the size it is thought to repeat.
    """
    modules = dict(model.named_modules())
    sizes = propagation.tracker.sizes
    rules: dict[tuple[str, str], AttributeRule] = {}

    def repeat(module: str, attribute: str, layout: Layout) -> None:
        value = getattr(modules[module], attribute, None)
        value = value[-1] if isinstance(value, tuple) and len(value) == 1 else value
        if type(value) is int and value == size(layout, sizes) and axis in axes_of(layout):
            rules.setdefault((module, attribute), AttributeRule(module, attribute, layout))

    for slot in slots:
        owner, _, leaf = slot.tensor.rpartition(".")
        module = slot.layer if slot.layer in modules and leaf == "weight" else owner
        if module not in modules:
            continue
        layout = slot.layout
        groups = getattr(modules[module], "groups", 1)
        grouped = isinstance(groups, int) and groups > 1 and slot.members is None
        if grouped and slot.dim == 1:  # the weight holds one group's inputs, or transposed one group's outputs
            group = next(
                (Leaf(a) for a in axes_of(propagation.tracker.resolve(propagation.tensor_dims[slot.tensor][0]))),
                None,
            )
            layout = Product((group, layout)) if group is not None else layout
        for attribute in _OUT.get(slot.role, ()):
            repeat(module, attribute, layout)
        if slot.role == "consumer" and isinstance(modules[module], nn.MultiheadAttention):
            for attribute in _EMBEDDINGS.get(leaf, ()):
                repeat(module, attribute, layout)
            for name, around in modules.items():
                if isinstance(around, nn.Transformer) and (not name or module.startswith(f"{name}.")):
                    repeat(name, "d_model", layout)
        if slot.role == "middle":
            for attribute in ("in_channels", "out_channels", "groups"):
                repeat(module, attribute, layout)
        if slot.role in ("norm_weight", "norm_bias", "running_mean", "slope"):
            for attribute in (*_NORM, "num_parameters"):
                repeat(module, attribute, layout)
            if isinstance(layout, Product) and layout.parts[0] == Leaf(axis):
                repeat(module, "num_groups", Leaf(axis))
        # a weight without a layer of its own belongs to the module that uses it
        parent = module.rpartition(".")[0] if leaf == "weight" else module
        if slot.role not in ("producer", "consumer") or parent not in modules:
            continue
        for attribute in _ALL_HEADS if heads else _HIDDEN:
            repeat(parent, attribute, layout)
        if slot.members is not None:  # experts view their input by it
            repeat(parent, "hidden_size", layout)
        if heads and slot.role == "producer":
            _head_counts(repeat, modules, parent, layout, axis)
    return tuple(rules.values())


def _head_counts(repeat, modules, parent: str, layout: Layout, axis: int) -> None:  # type: ignore[no-untyped-def]
    """Head counts of the attention module and of the module around it."""
    layout = layout.parts[0] if isinstance(layout, Concat) else layout  # a fused qkv
    parts = layout.parts if isinstance(layout, Product) else (layout,)
    while len(parts) > 1 and axis not in axes_of(parts[0]):  # a fused qkv viewed as (3, heads, head size)
        parts = parts[1:]
    counted = parts[:-1] if len(parts) > 1 else parts
    for holder in dict.fromkeys((parent, parent.rpartition(".")[0])):
        if holder not in modules:
            continue
        for attribute in _QUERY_HEADS:
            repeat(holder, attribute, counted[0] if len(counted) == 1 else Product(counted))
        for attribute in _KEY_HEADS:
            repeat(holder, attribute, Leaf(axis))
