"""Checks of arguments: each returns the value it was given, or says what was seen and what was wanted."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from .errors import GrowthError

__all__ = ["as_list", "choice", "copies_of", "instance", "number", "whole"]

T = TypeVar("T")


def as_list(value: Any) -> list[Any]:
    """One or a list (or tuple) as a list; nothing for None."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def copies_of(also: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """The copies that must follow, one or any number; a Sequential is one, though it can be iterated."""
    single = isinstance(also, nn.Module) and not isinstance(also, nn.ModuleList)
    if isinstance(also, str) or not (single or isinstance(also, Iterable)):
        raise GrowthError(f"also={also!r} was given; wanted copies of the model that must follow, one or a list")
    copies: list[nn.Module] = [also] if single else list(also)  # type: ignore[list-item, arg-type]
    for copy in copies:
        if not isinstance(copy, nn.Module):
            raise GrowthError(
                f"also={copy!r} was given; wanted an nn.Module (of an EMA helper: the module it holds), one or a list"
            )
    return copies


def instance(owner: str, argument: str, value: T, kind: type[Any]) -> T:
    """An instance of `kind`."""
    if not isinstance(value, kind):
        seen = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        hint = f": write {value.__name__}(...)" if isinstance(value, type) and issubclass(value, kind) else ""
        raise GrowthError(f"{owner}: {argument}={seen} was given; wanted an instance of {kind.__name__}{hint}")
    return value


def whole(owner: str, argument: str, value: Any, least: int = 1) -> int:
    """An integer of at least `least`; booleans and whole floats are refused."""
    try:
        result = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        result = None
    if result is None or result < least:
        raise GrowthError(f"{owner}: {argument}={value!r} was given; wanted an integer of at least {least}")
    return result


def number(owner: str, argument: str, value: Any, *, least: float | None = None, above: float | None = None) -> float:
    """A finite number, `>= least` or `> above` where these are given."""
    wanted = "a finite number"
    if least is not None:
        wanted += f" of at least {least:g}"
    if above is not None:
        wanted += f" above {above:g}"
    try:
        result = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    low = (least is not None and result < least) or (above is not None and result <= above)
    if not math.isfinite(result) or low:
        raise GrowthError(f"{owner}: {argument}={value!r} was given; wanted {wanted}")
    return result


def choice(owner: str, argument: str, value: T, options: Iterable[T]) -> T:
    """One of `options`."""
    options = tuple(options)
    if value not in options:
        raise GrowthError(f"{owner}: {argument}={value!r} was given; wanted one of {', '.join(map(repr, options))}")
    return value
