"""What can grow: the exported graph, dimension tracking, `Site`, `Sites`."""

from .discover import discover, follow
from .graph import Followed, LayerCall, argument_paths, as_call, evaluation, open_outputs, unwrap, without_hooks
from .site import Activation, AttributeRule, Gate, LayerInfo, Norm, Site, Sites, Slot, live_tensors, tensors_of
from .untouched import untouched

__all__ = [
    "Activation",
    "AttributeRule",
    "Followed",
    "Gate",
    "LayerCall",
    "LayerInfo",
    "Norm",
    "Site",
    "Sites",
    "Slot",
    "argument_paths",
    "as_call",
    "discover",
    "evaluation",
    "follow",
    "live_tensors",
    "open_outputs",
    "tensors_of",
    "untouched",
    "unwrap",
    "without_hooks",
]
