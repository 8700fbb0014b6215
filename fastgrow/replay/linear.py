"""Middles that are linear at zero op by op: there the replay is its own derivative, and costs one pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from ..sites.nodes import bind, plain_name
from .activations import derivative_from_the_right

__all__ = ["linear_slopes", "route_of_zeros"]

_LINEAR = frozenset(
    "view reshape _unsafe_view flatten unflatten expand view_as reshape_as dropout feature_dropout alpha_dropout "
    "feature_alpha_dropout native_dropout contiguous clone alias to _to_copy unsqueeze squeeze permute transpose t mT "
    "movedim cat chunk split split_with_sizes slice narrow getitem avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean sum neg batch_norm instance_norm conv1d conv2d "
    "conv3d max_pool2d _assert_tensor_metadata".split()
)


def linear_slopes(nodes: list[Node], carries: Callable[[Node], bool], producers: set[Node]) -> dict[Node, float] | None:
    """The slopes at zero of a middle's activations, where every other op in it is linear; None elsewhere."""
    slopes: dict[Node, float] = {}
    for node in nodes:
        kind = plain_name(node)
        if node in producers or kind in _LINEAR:
            continue
        operands = [arg for arg in node.args[:2] if isinstance(arg, Node)]
        carrying = [arg for arg in operands if carries(arg)]
        if kind in ("add", "sub"):
            if len(carrying) != 2 or bind(node).get("alpha", 1) != 1:
                return None
        elif kind in ("mul", "div"):
            if len([arg for arg in carrying if arg.op != "placeholder"]) != 1 or (
                kind == "div" and node.args[0] not in carrying
            ):
                return None
        elif kind in ("pad", "constant_pad_nd"):
            if bind(node).get("mode", "constant") != "constant" or bind(node).get("value") not in (None, 0, 0.0):
                return None
        else:
            slope = derivative_from_the_right(node)
            if not slope:  # curved, or flat at zero
                return None
            slopes[node] = slope
    return slopes


def route_of_zeros(node: Node, x: Tensor) -> Tensor:
    """Max pooling's derivative at an all-zero map: each window passes on its first element."""
    bound = bind(node)
    options = [bound[name] for name in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")]
    options[1] = options[1] or None
    zeros = x.new_zeros(1, 1, *x.shape[2:])
    result, index = F.max_pool2d(zeros, *options, return_indices=True)
    taken = x.flatten(2).index_select(2, index.reshape(-1))
    return taken.reshape(*x.shape[:2], *result.shape[2:])
