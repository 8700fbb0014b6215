"""One tensor gives way to a larger one: made, put in its places, its memory let go, and taken back if need be.

A growth keeps an old tensor no longer than it takes to fill the larger one: at its peak it holds the network, the new
entries and one tensor more. Nothing is lost by that. The old values lie in the new tensor and the index maps say where,
so a growth that fails gives the same objects the same values again, bit for bit, in no more memory than it had taken.

The old object stays for that, and one NaN in its shape takes the place of its memory. What somebody else may still read
is never emptied: nothing but the transaction may refer to the tensor (a name, a list of parameters, what a graph has
saved for its backward pass) or to its memory (a view, ``detach()``, an entry of ``state_dict()``, a NumPy array). Other
tensors live as long as their holders want them. References are counted, not guessed at, and one counts for nothing: the
node that accumulates a parameter's gradient. It reads no values, and through it a ``loss`` that has been
backpropagated and is still at hand, as in most training loops, would keep the whole old network alive.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .enlarge import Enlargement, Fill, allocate

__all__ = ["GrownParameter", "Replacement", "StateMove"]

_R = TypeVar("_R", bound="Replacement")
Undo = list[Callable[[], None]]
"""What takes a transaction back, last entry first; each does no harm where its deed was not done."""

_WORTH = 1 << 16  # bytes; below, letting go takes longer than it is worth
_COUNTED = hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")  # private: torch may drop them


@dataclass(eq=False)
class Replacement:
    """holder[key], the one reference that the transaction keeps to an old tensor, and the larger one made of it."""

    holder: Any
    key: Any
    enlargement: Enlargement
    make: Callable[..., Tensor] | None = None  # None: `new` is there already
    rewritten: bool = False  # the new tensor does not hold the old values as they are
    _new: Tensor | None = field(default=None, init=False)
    _strides: tuple[int, ...] | None = field(default=None, init=False)  # of a tensor that was let go

    @classmethod
    def made(cls: type[_R], holder: Any, key: Any, enlargement: Enlargement, new: Tensor) -> _R:
        """One whose new tensor stands already."""
        replacement = cls(holder, key, enlargement, rewritten=True)
        replacement._new = new
        return replacement

    @property
    def old(self) -> Tensor:
        tensor: Tensor = self.holder[self.key]
        return tensor

    @property
    def new(self) -> Tensor:
        assert self._new is not None
        return self._new

    def preview(self) -> Tensor:
        """The new tensor, or another one like it."""
        return self.new if self.make is None else self.make()

    def build(self, undo: Undo, *given: object) -> Tensor:
        """Make the new tensor: all that needs memory. given: what `make` is called with."""
        undo.append(self._drop)
        if self.make is not None:
            self._new = self.make(*given)
        return self.new

    @property
    def is_empty(self) -> bool:
        """Whether the old tensor was let go of."""
        return self._strides is not None

    def _drop(self) -> None:
        if self.make is not None:
            self._new = None

    def release(self, undo: Undo) -> None:
        """Let go of the old tensor's memory, where nobody else can read it and the new tensor holds the values."""
        if not _COUNTED or self.rewritten or not _owns_memory(self.old) or not self.enlargement.keeps_all:
            return
        if _read_elsewhere(self.holder, self.key):
            return
        nothing = torch.nan if self.old.is_floating_point() or self.old.is_complex() else 0
        blank = self.old.new_full((), nothing).expand(self.old.shape)
        undo.append(self._regain)
        self._strides = self.old.stride()
        self.old.data = blank

    def _regain(self) -> None:
        """The old values back from the new tensor: no more memory than the growth had at this point, and where even
        that is gone they stay in the new one's."""
        if self._strides is None:
            return
        try:
            values = allocate(self.new, self.enlargement.old, self._strides)
            values.copy_(self.enlargement.old_block(self.new.detach()))
        except (MemoryError, RuntimeError):
            values = self.enlargement.compacted(self.new.detach())
        self.old.data = values
        self._strides = None


@dataclass(eq=False)
class StateMove:
    """What an optimizer keeps of a parameter, from under the old tensor to under the new one."""

    state: MutableMapping[Any, Any]
    kept: Mapping[str, Any]  # the old tensor's entries
    larger: Mapping[str, Replacement]  # those that grow; their holder is `kept`, and they are made of the parameter

    def change_key(self, found: GrownParameter, undo: Undo) -> None:
        undo.append(partial(self._change_back, found))
        self.state.pop(found.old, None)
        self.state[found.new] = dict(self.kept)

    def _change_back(self, found: GrownParameter) -> None:
        self.state.pop(found.new, None)
        self.state[found.old] = self.kept

    def fill(self, found: GrownParameter, undo: Undo) -> None:
        """The entries that grow, one after the other."""
        entries = self.state[found.new]
        for name, larger in self.larger.items():
            entries[name] = larger.build(undo, found)
            larger.release(undo)


@dataclass(eq=False)
class GrownParameter(Replacement):
    """A parameter or buffer, what replaces it (itself, where it grows into its room), and all that goes with it."""

    name: str = ""
    fresh: Fill | None = None  # what its new entries will be, where it stays; None: zeros
    stays: bool = False
    gradient: Replacement | None = None
    places: list[tuple[Any, Any]] = field(default_factory=list)  # (container, key) of every reference to be replaced
    moves: list[StateMove] = field(default_factory=list)

    @property
    def new(self) -> Tensor:
        return self.old if self.stays else super().new

    def grow(self, undo: Undo) -> None:
        """The new tensor in all its places, with gradient and optimizer state; each old tensor goes when its own new
        one stands."""
        self.build(undo)
        for container, key in self.places:
            undo.append(partial(self._put_back, container, key))
            container[key] = self.new
        for move in self.moves:
            move.change_key(self, undo)
        self.release(undo)
        if self.gradient is not None:
            self.new.grad = self.gradient.build(undo)
            if self.is_empty:
                undo.append(self._gradient_back)
                self.old.grad = None
                self.gradient.release(undo)
        for move in self.moves:
            move.fill(self, undo)

    def _put_back(self, container: Any, key: Any) -> None:
        container[key] = self.old

    def _gradient_back(self) -> None:
        assert self.gradient is not None
        self.old.grad = self.gradient.old


def _owns_memory(tensor: Tensor) -> bool:
    """Whether all of a piece of memory is a plain tensor's own, that could be had again."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.nbytes >= _WORTH
        and not tensor.is_meta
        and tensor.is_leaf
        and tensor.untyped_storage().nbytes() == tensor.nbytes
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
        and not (tensor.device.type == "cpu" and (tensor.is_shared() or tensor.is_pinned()))
    )


def _read_elsewhere(holder: Any, key: Any) -> bool:
    """Whether anything else refers to holder[key] or to its memory, the accumulator of its gradient aside."""
    if not holder[key].requires_grad or holder[key]._use_count() == 1:
        return _references(holder, key) != _alone(accumulated=False)
    edge = torch.autograd.graph.get_gradient_edge(holder[key])  # a reference more, if there was no accumulator yet
    return edge is None or _references(holder, key) != _alone(accumulated=True)


def _references(holder: Any, key: Any) -> tuple[int, ...]:
    """How many references there are to a tensor and to its memory, in Python and below it."""
    storage = holder[key].untyped_storage()
    return (
        sys.getrefcount(holder[key]),
        holder[key]._use_count(),
        sys.getrefcount(storage),
        torch._C._storage_Use_Count(storage._cdata),
    )


@functools.cache
def _alone(accumulated: bool) -> tuple[int, ...]:
    """`_references` of a tensor with no other holder than the accumulator of its gradient, if it has one."""
    holder = [nn.Parameter(torch.empty(1, device="cpu"))]
    edge = torch.autograd.graph.get_gradient_edge(holder[0]) if accumulated else None
    found = _references(holder, 0)
    del edge
    return found
