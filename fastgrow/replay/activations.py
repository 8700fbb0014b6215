"""Activations as new units meet them: out of place, with the derivative from the right at zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import GrowthError
from ..sites.nodes import activation_module, bind, plain_name

__all__ = ["derivative_from_the_right", "expected", "live_at_zero", "out_of_place"]


def _slope_one(x: Tensor) -> Tensor:
    return torch.where(x < 0, torch.zeros((), dtype=x.dtype, device=x.device), x)


def live_at_zero(kind: str, node: Node) -> Callable[..., Tensor] | None:
    """Activations with the derivative from the right at 0, where torch's is smaller there."""
    if kind == "relu":
        return lambda x, *rest, **kw: _slope_one(x)
    if kind == "hardtanh" and bind(node)["min_val"] == 0:
        return lambda x, low, high, *rest, **kw: _slope_one(x).clamp(max=high)
    if kind == "relu6":
        return lambda x, *rest, **kw: _slope_one(x).clamp(max=6.0)
    if kind in ("leaky_relu", "prelu") and activation_module(node) is None:
        return None  # not replaced, and alive as it is
    if kind == "leaky_relu":
        return lambda x, slope=0.01, *rest, **kw: torch.where(x < 0, x * slope, x)
    if kind == "prelu":
        return lambda x, w, *rest, **kw: torch.where(x < 0, x * w.reshape(-1, *[1] * (x.dim() - 2)), x)
    return None


_ELEMENTWISE = frozenset("relu relu6 gelu hardtanh hardswish mish threshold".split())
"""Ops of one element that torch does not tag as pointwise."""


_SLOPE = "slope at zero"  # of a node's meta: it is asked for at every growth, and stays what it is


def derivative_from_the_right(node: Node) -> float | None:
    """f'(0+) of an elementwise op with one tensor operand and f(0) = 0; None for any other op."""
    if _SLOPE not in node.meta:
        node.meta[_SLOPE] = _derivative_from_the_right(node)
    slope: float | None = node.meta[_SLOPE]
    return slope


def _derivative_from_the_right(node: Node) -> float | None:
    tensors = [arg for arg in node.args if isinstance(arg, Node)]
    target = node.target
    if len(tensors) != 1 or node.kwargs.get("out") or not isinstance(target, torch._ops.OpOverload):
        return None
    kind = plain_name(node)
    if torch.Tag.pointwise not in target.tags and kind not in _ELEMENTWISE:
        return None
    function = live_at_zero(kind, node) or out_of_place(target)
    x = torch.zeros((), dtype=torch.float64, requires_grad=True, device="cpu")
    args = [x if isinstance(arg, Node) else arg for arg in node.args]
    try:
        with torch.enable_grad():
            y = function(*args, **node.kwargs)
            (slope,) = torch.autograd.grad(y, x)
    except RuntimeError:
        return None
    if y.item() != 0:
        return None
    return slope.item()


_DRAWN = frozenset(
    "rand rand_like randn randn_like randint randint_like randperm uniform normal multinomial bernoulli".split()
)


def expected(node: Node) -> float | None:
    """The mean of a mask drawn at random (stochastic depth: dropout of a whole branch); None for any other op.

    raises: GrowthError for other random values, which cannot be drawn again as they were.
    """
    kind = plain_name(node)
    chances: list[Any] = []
    if kind == "bernoulli" and len(node.args) > 1:
        chances = [node.args[1]]
    elif kind == "floor" and isinstance(node.args[0], Node) and plain_name(node.args[0]) == "add":
        terms = node.args[0].args  # floor(keep + rand): Hugging Face's stochastic depth
        if any(isinstance(term, Node) and plain_name(term) == "rand" for term in terms):
            chances = [term for term in terms if not isinstance(term, Node)]
    if len(chances) == 1 and isinstance(chances[0], (int, float)):
        return float(chances[0])
    if kind in _DRAWN:
        raise GrowthError(
            f"random values ({kind}) lie between the site's layers and cannot be drawn again as they were; use "
            "how.ZeroOutgoing, or grow in a mode of the model that draws none"
        )
    return None


def out_of_place(target: Any) -> Callable[..., Any]:
    """``aten.relu_.default`` -> ``aten.relu.default``."""
    if (
        isinstance(target, torch._ops.OpOverload)
        and target._schema.name.endswith("_")
        and not target._schema.name.endswith("__")
    ):
        packet = getattr(torch.ops.aten, target._schema.name.rpartition("::")[2][:-1])
        return getattr(packet, target._overloadname or "default", packet)
    return target
