"""Autocast and a default device are the caller's: the model's passes run in them, and nothing that growth computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

import torch

__all__ = ["as_called", "callers_device", "set_aside"]

_KINDS = ("cpu", "cuda")
_Result = TypeVar("_Result")
_set_aside: list[torch.device] = []  # default devices, the caller's first


@contextmanager
def set_aside() -> Iterator[None]:
    """No operation inside is cast, and tensors made without a device are on the CPU."""
    with ExitStack() as stack:
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if (device := torch.get_default_device()).type != "cpu":
            _set_aside.append(device)
            stack.callback(_set_aside.pop)
            stack.enter_context(torch.device("cpu"))
        yield


def callers_device() -> AbstractContextManager[object]:
    """The default device that was set aside, for code of the model inside."""
    return _set_aside[0] if _set_aside else nullcontext()


def as_called(closure: Callable[[], _Result]) -> Callable[[], _Result]:
    """The closure in the surroundings that are present now, wherever it is called from.

    Without autocast's cache, which would keep the casts of weights that a method changes between two calls.
    """
    present = [(kind, torch.get_autocast_dtype(kind)) for kind in _KINDS if torch.is_autocast_enabled(kind)]
    device = torch.get_default_device()
    if not callable(closure) or (not present and device.type == "cpu"):
        return closure

    def called() -> _Result:
        with ExitStack() as stack:
            for kind, dtype in present:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            stack.enter_context(device)
            return closure()

    return called
