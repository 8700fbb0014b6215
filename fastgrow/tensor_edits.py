"""New shape and values of one parameter or buffer: checked, and how the larger tensor is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from .enlarge import Block, Enlargement
from .errors import GrowthError
from .names import find_tensor
from .replacement import GrownParameter, Replacement
from .sharded import Renewals, is_sharded, part, whole
from .tensor_checks import check_owner, unknown_tensor

__all__ = ["TensorEdit", "planned"]


@dataclass(frozen=True, eq=False)
class TensorEdit:
    """New shape and values of one parameter or buffer. Tied names follow: a tensor is edited once."""

    tensor: str  # name in model.state_dict(), or of a buffer that isn't saved
    axes: Mapping[int, Tensor]  # dimension -> (old length,) int64: where each old index goes; -1 drops room
    shape: tuple[int, ...]  # the new shape
    fresh: Tensor | tuple[Block, ...] | None = None  # where no old value lands: of the new shape, or blocks; else zeros
    scale: float | Tensor = 1.0  # factor on the old values, broadcast against the old shape
    shift: Tensor | None = None  # added to them afterwards, broadcast against the old shape
    room: Mapping[int, Tensor] | None = None  # dimension -> new positions without a unit; given: written in place

    @property
    def values(self) -> list[Tensor]:
        """All tensors of values that the edit holds."""
        fresh = [block.values for block in self.fresh] if isinstance(self.fresh, tuple) else [self.fresh]
        return [part for part in (*fresh, self.scale, self.shift) if isinstance(part, Tensor)]


def planned(
    root: nn.Module,
    edit: TensorEdit,
    whose: str,
    grown: dict[int, GrownParameter],
    edited: dict[int, TensorEdit],
    renewals: Renewals,
) -> list[tuple[Any, Any, Any]]:
    """Check one edit and enter it in `grown`; nothing where it is there already.

    Returns what is to be written into a tensor that stays.
    """
    place = find_tensor(root, edit.tensor)
    if place is None:
        raise GrowthError(unknown_tensor(root, edit.tensor, whose))
    module, leaf = place
    check_owner(module, leaf, edit.tensor, whose)
    parameter = module._parameters.get(leaf)
    old: Tensor = getattr(module, leaf)
    what = f"{whose}: {edit.tensor!r}"
    if is_lazy(old):
        raise GrowthError(f"{what} has no shape yet; run one batch through the model first")
    if old.layout != torch.strided or old.is_quantized:
        raise GrowthError(f"{what} is {old.layout}, quantized={old.is_quantized}; wanted a dense tensor")
    previous = edited.get(id(old))
    if previous is not None:
        if previous is edit or _same(previous, edit):
            return []
        raise GrowthError(
            f"{whose}: {previous.tensor!r} and {edit.tensor!r} are the same tensor, edited in two ways; "
            "join them into one edit"
        )
    enlargement = Enlargement.checked(what, old.shape, edit.shape, edit.axes, edit.room)
    if isinstance(edit.fresh, Tensor) and tuple(edit.fresh.shape) != enlargement.new:
        raise GrowthError(f"{what}: fresh has shape {tuple(edit.fresh.shape)}, wanted {enlargement.new}")
    for block in edit.fresh if isinstance(edit.fresh, tuple) else ():
        if not block.fits(enlargement.new):
            raise GrowthError(
                f"{what}: fresh has a block of shape {tuple(block.values.shape)} from {block.offset} on, which does "
                f"not lie in {enlargement.new}"
            )
    if isinstance(edit.scale, Tensor) and not _broadcasts(edit.scale.shape, old.shape):
        raise GrowthError(
            f"{what}: scale has shape {tuple(edit.scale.shape)}, which doesn't broadcast to {enlargement.old}"
        )
    if edit.shift is not None and not _broadcasts(edit.shift.shape, old.shape):
        raise GrowthError(
            f"{what}: shift has shape {tuple(edit.shift.shape)}, which doesn't broadcast to {enlargement.old}"
        )
    edited[id(old)] = edit
    if edit.room is not None and enlargement.stays:
        grown[id(old)] = GrownParameter([old], 0, enlargement, name=edit.tensor, fresh=edit.fresh, stays=True)
        present = old.detach()
        if _rewrites(edit):
            return [(present, None, enlargement.place(present, edit.fresh, edit.scale, edit.shift))]
        return list(enlargement.births(present, edit.fresh))
    holder = [old]
    if is_sharded(old):  # gathered while nothing has changed on any rank
        sharded = renewals.renewed(
            what, old, enlargement.place(whole(old).detach(), edit.fresh, edit.scale, edit.shift)
        )
        _take_hooks(old, sharded)
        vars(sharded).update(vars(old))
        found = GrownParameter.made(holder, 0, enlargement, sharded)
    else:
        make = partial(_successor, holder, enlargement, edit, parameter is not None)
        found = GrownParameter(holder, 0, enlargement, make, _rewrites(edit))
    found.name = edit.tensor
    if old.grad is not None:
        gradients = [old.grad]
        if is_sharded(old.grad):
            placed = part(enlargement.place(whole(old.grad)), old.grad)
            found.gradient = Replacement.made(gradients, 0, enlargement, placed)
        else:
            grow = partial(_successor, gradients, enlargement)
            found.gradient = Replacement(gradients, 0, enlargement, grow)
    grown[id(old)] = found
    return []


def _rewrites(edit: TensorEdit) -> bool:
    return isinstance(edit.scale, Tensor) or edit.scale != 1.0 or edit.shift is not None


def _successor(
    holder: Sequence[Tensor], enlargement: Enlargement, edit: TensorEdit | None = None, trained: bool = False
) -> Tensor:
    """The larger tensor that takes the place of ``holder[0]``; a gradient where there is no edit."""
    if edit is None:
        return enlargement.place(holder[0])
    new = enlargement.place(holder[0].detach(), edit.fresh, edit.scale, edit.shift)
    if trained:
        new = _parameter_like(holder[0], new)
    if not isinstance(holder[0], FakeTensor):
        vars(new).update(vars(holder[0]))
    return new


def _parameter_like(old: Tensor, values: Tensor) -> Tensor:
    """A parameter of the same class, flags and hooks; handles to the hooks stay valid."""
    if type(old) is not nn.Parameter and issubclass(type(old), nn.Parameter):
        new: Tensor = torch.Tensor._make_subclass(type(old), values, old.requires_grad)
    else:
        new = nn.Parameter(values, requires_grad=old.requires_grad)
    if getattr(old, "grad_dtype", old.dtype) != old.dtype:
        new.grad_dtype = old.grad_dtype
    _take_hooks(old, new)
    return new


def _take_hooks(old: Tensor, new: Tensor) -> None:
    if old._backward_hooks is not None:
        new._backward_hooks = old._backward_hooks
    if old._post_accumulate_grad_hooks is not None:
        new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks


def _same(one: TensorEdit, other: TensorEdit) -> bool:
    if tuple(one.shape) != tuple(other.shape) or one.axes.keys() != other.axes.keys():
        return False
    if not all(torch.equal(index, other.axes[dim]) for dim, index in one.axes.items()):
        return False
    rooms = (one.room or {}, other.room or {})
    if rooms[0].keys() != rooms[1].keys() or not all(torch.equal(at, rooms[1][dim]) for dim, at in rooms[0].items()):
        return False
    return all(_equal(getattr(one, name), getattr(other, name)) for name in ("fresh", "scale", "shift"))


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, tuple) and isinstance(other, tuple):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(a.offset == b.offset and _equal(a.values, b.values) for a, b in pairs)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    return len(shape) <= len(target) and all(
        mine in (1, wanted) for mine, wanted in zip(reversed(shape), reversed(target), strict=False)
    )
