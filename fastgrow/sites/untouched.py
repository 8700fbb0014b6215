"""A model's attributes put back after a pass that was only tried, with all that a forward pass keeps in them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch import nn

__all__ = ["untouched"]

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Afterwards every attribute of the model's modules is as it was, as are lists and dicts in them, however nested.

    So are dataclasses and namespaces. Entries are put back, tensors are not copied: their values are not looked at.
    """
    saved = list(_contents(model))
    try:
        yield
    finally:
        for container, before in saved:
            _put_back(container, before)


def _contents(model: nn.Module) -> Iterator[tuple[Any, list[Any]]]:
    """Every mutable container that belongs to the model, and what is in it."""
    waiting: list[Any] = [model]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, tuple):
            waiting += value
            continue
        container = vars(value) if _holds_attributes(value) else value
        if type(container) not in _CONTAINERS or id(container) in seen:
            continue
        seen.add(id(container))
        yield container, _entries(container)
        waiting += container.values() if isinstance(container, dict) else container


def _holds_attributes(value: Any) -> bool:
    """Modules and plain records; other objects may lead anywhere (a trainer, a data set)."""
    record = dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__")
    return record or isinstance(value, (nn.Module, SimpleNamespace))


def _entries(container: Any) -> list[Any]:
    return list(container.items()) if isinstance(container, dict) else list(container)


def _flat(container: Any, entries: list[Any]) -> list[Any]:
    return [each for entry in entries for each in entry] if isinstance(container, dict) else entries


def _put_back(container: Any, before: list[Any]) -> None:
    if list(map(id, _flat(container, _entries(container)))) == list(map(id, _flat(container, before))):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(before)
    else:
        container.extend(before)
