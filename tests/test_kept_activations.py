"""Models that keep activations in their attributes: they grow, and looking for their sites leaves nothing behind."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgrow as fg


@dataclass
class Kept:
    tensors: list[Tensor] = field(default_factory=list)


def replaced(net: Keeping, z: Tensor) -> None:
    net.kept = z


def replaced_list(net: Keeping, z: Tensor) -> None:
    net.kept = [z, {"twice": (z * 2,)}]


def appended(net: Keeping, z: Tensor) -> None:
    net.kept.append(z)


def entered(net: Keeping, z: Tensor) -> None:
    net.kept["z"] = z


def nested(net: Keeping, z: Tensor) -> None:
    net.kept["list"][0].append(z)


def recorded(net: Keeping, z: Tensor) -> None:
    net.kept.tensors.append(z)


def created(net: Keeping, z: Tensor) -> None:
    net.act.seen = {"z": z}  # type: ignore[assignment]


KEEPING: dict[str, tuple[Callable[[Any, Tensor], None], Callable[[], Any]]] = {
    "tensor": (replaced, lambda: None),
    "new_list": (replaced_list, lambda: None),
    "list": (appended, list),
    "deque": (appended, lambda: deque(maxlen=3)),
    "dict": (entered, dict),
    "ordered_dict": (entered, OrderedDict),
    "nested": (nested, lambda: {"list": ([],)}),
    "dataclass": (recorded, Kept),
    "namespace": (recorded, lambda: SimpleNamespace(tensors=[])),
    "of_a_child": (created, lambda: None),
}


class Keeping(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
        self.keep, make = KEEPING[way]
        self.kept = make()

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(self.a(x))
        self.keep(self, z)
        return self.b(z)


def contents(value: Any) -> Any:
    """All that can be reached, with tensors by identity."""
    if isinstance(value, (nn.Module, Kept, SimpleNamespace)):
        return id(value), contents(vars(value))
    if isinstance(value, dict):
        return id(value), [(key, contents(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return id(value), [contents(each) for each in value]
    return id(value)


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "ran_before"])
@pytest.mark.parametrize("way", KEEPING)
def test_they_grow_and_stay_as_they_were(way: str, ran: bool) -> None:
    torch.manual_seed(0)
    model, x = Keeping(way), torch.randn(2, 4)
    if ran:
        model(x)  # what is kept has a history now, and cannot be deep-copied
    before = contents(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch.export's, of attributes assigned
        sites = fg.find_sites(model, x)
    assert contents(model) == before
    assert [site.name for site in sites] == ["a"]
    assert sites.frozen == {"b": "its output is the model's output"}
    expected = model(x)
    fg.grow(model, {"a": 2}, fg.how.GradMax(), sites=sites, closure=lambda: model(x).square().mean())
    assert model.a.out_features == 7
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("way", ["list", "nested"])
def test_an_export_that_fails_leaves_nothing_behind(way: str) -> None:
    model, x = Keeping(way), torch.randn(2, 4)
    model.b = nn.Linear(6, 3)
    before = contents(model)
    with pytest.raises(fg.GrowthError, match="cannot be exported"):
        fg.find_sites(model, x)
    assert contents(model) == before


def test_by_hand_and_inserted_layers_leave_nothing_behind_either() -> None:
    model, x = Keeping("list"), torch.randn(2, 4)
    before = contents(model)
    fg.name_sites(model, x, [["a", "act", "b"]])
    assert contents(model) == before
    deeper = copy.deepcopy(model)
    fg.insert_layer(deeper, "act", activation=None, example_inputs=x)
    assert deeper.kept == []
