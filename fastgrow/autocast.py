"""Mixed precision is the model's: its passes run under the caller's autocast, and nothing that growth computes does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch

__all__ = ["in_present_autocast", "without_autocast"]

_KINDS = ("cpu", "cuda")
_Result = TypeVar("_Result")


@contextmanager
def without_autocast() -> Iterator[None]:
    """No operation inside is cast, on any device."""
    with ExitStack() as stack:
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def in_present_autocast(closure: Callable[[], _Result]) -> Callable[[], _Result]:
    """The closure under the autocast that is on now, wherever it is called from.

    Without its cache, which would keep the casts of weights that a method changes between two calls.
    """
    present = [(kind, torch.get_autocast_dtype(kind)) for kind in _KINDS if torch.is_autocast_enabled(kind)]
    if not present or not callable(closure):
        return closure

    def under() -> _Result:
        with ExitStack() as stack:
            for kind, dtype in present:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            return closure()

    return under
