"""Optimizer state of grown parameters: the old block bit for bit, the new one as for a new parameter.

What an optimizer would give a new parameter is zero for nearly every entry of every ``torch.optim``
optimizer; `_FRESH` and `_FACTORED` list the others. Scalars (step counts, NAdam's ``mu_product``,
ASGD's ``eta`` and ``mu``) belong to the whole parameter and are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .enlarge import Enlargement, Fill
from .errors import GrowthError
from .names import modules_in
from .replacement import GrownParameter, Replacement, StateMove
from .sharded import is_sharded, part, whole

__all__ = ["Carried", "carry", "check_followed", "check_trained", "holds", "rates_of", "unwrapped"]


@dataclass(frozen=True, eq=False)
class Carried:
    """What one optimizer does beside what its grown parameters take along (`GrownParameter.places`, ``.moves``)."""

    written: list[tuple[Tensor, Any, Tensor]]  # into state that stays, as `Enlargement.births` says
    held: list[GrownParameter]


def _adagrad_sum(optimizer: Any, group: Mapping[str, Any], grown: GrownParameter) -> Fill:
    return _both_parts(optimizer.defaults["initial_accumulator_value"], grown)


def _rprop_step_size(optimizer: Any, group: Mapping[str, Any], grown: GrownParameter) -> Fill:
    return _both_parts(float(group["lr"]), grown)


def _asgd_average(optimizer: Any, group: Mapping[str, Any], grown: GrownParameter) -> Fill:
    # A new parameter's average starts at its own value (mu = 1 at first); zero would stay in it once mu < 1.
    if grown.stays:
        return 0.0 if grown.fresh is None else grown.fresh
    return whole(grown.new).detach()


def _both_parts(value: float, grown: GrownParameter) -> Fill:
    return complex(value, value) if grown.old.is_complex() else value


_FRESH: dict[tuple[type, str], Callable[[Any, Mapping[str, Any], GrownParameter], Fill]] = {
    (torch.optim.Adagrad, "sum"): _adagrad_sum,
    (torch.optim.Rprop, "step_size"): _rprop_step_size,
    (torch.optim.ASGD, "ax"): _asgd_average,
}

# Second moments kept as row and column means: torch.optim.Adafactor with keepdim, and, under the names
# that fairseq gave them and Transformers and timm took over, without it.
_FACTORED: dict[str, Callable[[Enlargement], Enlargement]] = {
    "row_var": lambda enlargement: enlargement.reduced([-1]),
    "col_var": lambda enlargement: enlargement.reduced([-2]),
    "exp_avg_sq_row": lambda enlargement: enlargement.without(-1),
    "exp_avg_sq_col": lambda enlargement: enlargement.without(-2),
}


def carry(optimizer: Any, grown: Mapping[int, GrownParameter]) -> Carried:
    """Give one optimizer's grown parameters their places and their state in it; changes nothing of the optimizer.

    optimizer: whatever has ``param_groups`` and ``state`` as ``torch.optim.Optimizer`` has them.
    grown: id(old parameter) -> what becomes of it; those that the optimizer doesn't hold are passed over.
    Raises `GrowthError` naming optimizer and entry where state can't be carried.
    """
    kind = type(optimizer).__name__
    groups, state = _groups_and_state(optimizer)
    members = [
        (group, position, grown[id(parameter)])
        for group in groups
        for position, parameter in enumerate(group["params"])
        if id(parameter) in grown
    ]
    group_of = {id(found.old): group for group, _, found in members}
    # State may outlive its group (a group that was taken out by hand): it follows all the same.
    keys = [key for key in state if id(key) in grown]
    held = {id(found.old): found for _, _, found in members} | {id(key): grown[id(key)] for key in keys}
    _check_kind(optimizer, {key: found.name for key, found in held.items()})
    written: list[tuple[Tensor, Any, Tensor]] = []
    moves: list[tuple[GrownParameter, StateMove]] = []
    for key in keys:
        found = held[id(key)]
        group = group_of.get(id(key), getattr(optimizer, "defaults", {}))
        kept = state[key]
        if not isinstance(kept, Mapping):
            raise GrowthError(f"{kind}: the state of {found.name!r} is a {type(kept).__name__}, wanted a dict")
        following = {name: _checked_entry(optimizer, name, value, found) for name, value in kept.items()}
        larger: dict[str, Replacement] = {}
        for name, enlargement in following.items():
            if enlargement is None:
                continue
            if found.stays:
                written += enlargement.births(kept[name], _fresh(optimizer, group, name, found))
            else:
                larger[name] = _larger_entry(optimizer, group, name, kept, found, enlargement)
        if not found.stays:
            moves.append((found, StateMove(state, kept, larger)))
    for group, position, found in members:
        if not found.stays:
            found.places.append((group["params"], position))
    for found, move in moves:
        found.moves.append(move)
    return Carried(written, list(held.values()))


def _groups_and_state(optimizer: Any) -> tuple[list[dict[str, Any]], MutableMapping[Any, Any]]:
    groups, state = getattr(optimizer, "param_groups", None), getattr(optimizer, "state", None)
    if not isinstance(groups, list) or not isinstance(state, MutableMapping):
        raise GrowthError(
            f"{type(optimizer).__name__} is not an optimizer: wanted the param_groups and state of "
            "torch.optim.Optimizer"
        )
    return groups, state


def _check_kind(optimizer: Any, held: Mapping[int, str]) -> None:
    """Raises `GrowthError` for an optimizer that no growth of these parameters (id -> name), which it holds, can be
    carried through."""
    if not held:
        return
    groups, state = _groups_and_state(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        names = ", ".join(map(repr, held.values()))
        raise GrowthError(
            f"LBFGS holds {names}: its history is one flat vector over all parameters and can't grow; "
            "make a new LBFGS after growth, or train with another optimizer"
        )
    if callable(getattr(optimizer, "grown", None)):  # it sees to its own caches
        return
    for attribute, value in vars(optimizer).items():
        own = value is groups or value is state or attribute == "defaults" or "_hook" in attribute
        if not own and holds(value, held):
            raise GrowthError(
                f"{type(optimizer).__name__}.{attribute} keeps parameters of its own, which would stay at their old "
                "size; make a new optimizer after growth, or use one of torch.optim or fastgrow.optim"
            )


def check_followed(optimizers: Iterable[Any], names: Mapping[int, str]) -> None:
    """Raises `GrowthError` for what is no optimizer, and for one that holds a parameter of these (id -> name) and whose
    kind cannot follow growth; what its state will be is for `carry` to check."""
    for optimizer in unwrapped(optimizers):
        groups, state = _groups_and_state(optimizer)
        held = [*(parameter for group in groups for parameter in group["params"]), *state]
        _check_kind(optimizer, {id(one): names[id(one)] for one in held if id(one) in names})


def rates_of(optimizers: Iterable[Any]) -> dict[int, float]:
    """id(parameter) -> the learning rate of its param group; without those of groups that give no number."""
    rates: dict[int, float] = {}
    for optimizer in unwrapped(optimizers):
        for group in _groups_and_state(optimizer)[0]:
            rate = group.get("lr")
            if rate is not None:
                rate = float(rate)
                for parameter in group["params"]:
                    rates.setdefault(id(parameter), rate)
    return rates


def unwrapped(optimizers: Iterable[Any]) -> Iterator[Any]:
    """Each optimizer, and what it wraps as ``.optimizer``; a wrapper without state of its own is left out."""
    for optimizer in optimizers:
        inner: Any = getattr(optimizer, "optimizer", None)
        if hasattr(inner, "param_groups"):
            yield from unwrapped([inner])
            if getattr(optimizer, "state", None) is inner.state:
                continue
        yield optimizer


def check_trained(model: nn.Module, optimizers: Iterable[Any]) -> None:
    """Raises `GrowthError` for optimizers of which none holds a parameter of the model: what grows would not train."""
    groups = [getattr(one, "param_groups", None) for one in unwrapped(optimizers)]
    own = {id(p) for module in modules_in(model) for p in module._parameters.values() if p is not None}
    held = [id(parameter) for each in groups for group in each or () for parameter in group["params"]]
    if own and held and own.isdisjoint(held):
        raise GrowthError(
            f"the optimizer holds {len(held)} parameters, none of them of this {type(model).__name__}: give the one "
            "that trains it, made from the parameters that it has now"
        )


_CONTAINERS = (dict, list, tuple, set, frozenset)


def holds(value: object, ids: Mapping[int, object], depth: int = 2) -> bool:
    """Whether one of these objects is `value`, or lies in it as in a list, set or dict of lists."""
    if isinstance(value, Tensor):
        return id(value) in ids
    if depth == 0 or not isinstance(value, _CONTAINERS):
        return False
    items = (*value, *value.values()) if isinstance(value, dict) else value
    inner = [item for item in items if isinstance(item, (Tensor, *_CONTAINERS))]
    return bool(inner) and any(holds(item, ids, depth - 1) for item in inner)


def _larger_entry(
    optimizer: Any,
    group: Mapping[str, Any],
    name: str,
    kept: Mapping[str, Any],
    grown: GrownParameter,
    enlargement: Enlargement,
) -> Replacement:
    if is_sharded(kept[name]):  # gathered while nothing has changed on any rank
        placed = enlargement.place(whole(kept[name]), _fresh(optimizer, group, name, grown))
        return Replacement.made(kept, name, enlargement, part(placed, kept[name]))
    # The parameter is given later: one that is reached from its own state lives until the garbage collector comes.
    return Replacement(
        kept,
        name,
        enlargement,
        lambda parameter: enlargement.place(kept[name], _fresh(optimizer, group, name, parameter)),
    )


def _checked_entry(optimizer: Any, name: str, value: object, grown: GrownParameter) -> Enlargement | None:
    """How an entry follows its parameter; None for what belongs to the whole parameter."""
    if not isinstance(value, Tensor):
        if _has_tensor(value):
            raise _refusal(optimizer, name, grown, f"is a {type(value).__name__} that holds tensors")
        return None
    if type(value) not in (Tensor, nn.Parameter, FakeTensor) and not is_sharded(value):
        raise _refusal(optimizer, name, grown, f"is a {type(value).__name__}, not a plain tensor")
    enlargement = _enlargement_of(name, value, grown)
    if enlargement is None:
        if value.numel() == 1 and value.dim() < 2:
            return None
        raise _refusal(optimizer, name, grown, f"has shape {tuple(value.shape)}")
    return enlargement


def _fresh(optimizer: Any, group: Mapping[str, Any], name: str, grown: GrownParameter) -> Fill | None:
    """What this optimizer gives a new parameter's entry; None for zeros."""
    rule = next((rule for (kind, key), rule in _FRESH.items() if key == name and isinstance(optimizer, kind)), None)
    return rule and rule(optimizer, group, grown)


def _enlargement_of(name: str, value: Tensor, grown: GrownParameter) -> Enlargement | None:
    """How an entry follows its parameter; None where its shape doesn't say."""
    full, shape = grown.enlargement, tuple(value.shape)
    if name in _FACTORED and len(full.old) > 1:
        factored = _FACTORED[name](full)
        if factored.old == shape:
            return factored
    if shape == full.old:
        return full
    if len(shape) != len(full.old):
        return None
    means = [dim for dim, (mine, whole) in enumerate(zip(shape, full.old, strict=True)) if mine != whole]
    # A dimension of length 1 that grows: a mean over it and the thing itself look alike.
    unclear = any(mine == 1 and full.new[dim] > 1 for dim, mine in enumerate(shape) if dim not in means)
    if unclear or any(shape[dim] != 1 for dim in means):
        return None
    return full.reduced(means)


def _has_tensor(value: object) -> bool:
    if isinstance(value, Tensor):
        return True
    children: Iterable[object] = ()
    if isinstance(value, Mapping):
        children = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        children = value
    return any(_has_tensor(child) for child in children)


def _refusal(optimizer: Any, entry: str, grown: GrownParameter, seen: str) -> GrowthError:
    return GrowthError(
        f"{type(optimizer).__name__}: state entry {entry!r} of {grown.name!r} {seen}; wanted the parameter's "
        f"shape {grown.enlargement.old}, means over some of its dimensions, or a scalar. Let it start anew "
        "with optimizer.state[parameter].clear(), or use an optimizer of torch.optim or fastgrow.optim"
    )
