"""CUDA graphs replay kernels on fixed memory: a captured module neither runs hooks nor sees new parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .errors import GrowthError
from .names import modules_in
from .sites import unwrap

__all__ = ["check_not_captured"]


def check_not_captured(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> None:
    """Raises `GrowthError` while a CUDA graph is captured, and for modules that `make_graphed_callables` captured.

    modules: the model's, where at hand.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise GrowthError(
            "a CUDA graph is being captured: growth changes the memory that it would replay; grow outside the capture, "
            "and capture again afterwards"
        )
    for module in modules_in(unwrap(model)) if modules is None else modules:
        forward = module.__dict__.get("forward")
        if forward is not None and "make_graphed_forward" in getattr(forward, "__qualname__", ""):
            name = next(name for name, one in unwrap(model).named_modules() if one is module)
            raise GrowthError(
                f"{name or 'the model'!r} was captured by torch.cuda.make_graphed_callables, which replays its old "
                "parameters and runs no hooks; grow before capturing (del module.forward gives its own forward back), "
                "and capture again afterwards"
            )
