"""Tensors enlarged: new values whole or in blocks, by padding or piece by piece."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastgrow as fg
from fastgrow import enlarge
from fastgrow.enlarge import Block, Enlargement
from fastgrow.layout import run_start
from fastgrow.widen import TensorEdit, widen


@st.composite
def enlargements(draw: st.DrawFn) -> Enlargement:
    dims = draw(st.integers(1, 4))
    old = [draw(st.integers(1, 4)) for _ in range(dims)]
    before = [draw(st.integers(0, 2)) for _ in range(dims)]
    new = [at + length + draw(st.integers(0, 2)) for at, length in zip(before, old, strict=True)]
    axes = {
        dim: torch.arange(before[dim], before[dim] + old[dim])
        for dim in range(dims)
        if new[dim] != old[dim] or dim == 0
    }
    return Enlargement.checked("it", old, new, axes)


@settings(deadline=None, max_examples=60)
@given(enlargements(), st.data())
def test_padding_and_pieces_agree_bit_for_bit(way: Enlargement, data: st.DataObject) -> None:
    tensor = torch.randn(way.old)
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in way.new)
    extent = [data.draw(st.integers(1, n - at)) for at, n in zip(offset, way.new, strict=True)]
    block = Block(offset, torch.randn(extent))
    padded = [way.place(tensor), way.place(tensor, 3.0), way.place(tensor, (block,), 0.5, torch.ones(()))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(enlarge, "_PADDED", 0)
        pieces = Enlargement(way.old, way.new, way.axes, way.starts)
        others = [pieces.place(tensor), pieces.place(tensor, 3.0), pieces.place(tensor, (block,), 0.5, torch.ones(()))]
    for one, other in zip(padded, others, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    inside = torch.zeros(way.new, dtype=torch.bool)
    inside[tuple(slice(way.starts.get(dim) or 0, (way.starts.get(dim) or 0) + n) for dim, n in enumerate(way.old))] = (
        True
    )
    assert torch.equal(padded[1][inside].reshape(way.old), tensor)
    assert bool((padded[1][~inside] == 3.0).all())


@pytest.mark.parametrize(
    ("positions", "start"),
    [([], 0), ([4], 4), ([2, 3, 4], 2), ([0, 2, 3], None), ([3, 2, 1], None), ([1, 1, 2], None)],
)
def test_run_start(positions: list[int], start: int | None) -> None:
    assert run_start(torch.tensor(positions, dtype=torch.int64)) == start


def _edit(fresh: Tensor | tuple[Block, ...]) -> TensorEdit:
    return TensorEdit("weight", {0: torch.arange(3)}, (5, 2), fresh)


def test_blocks_become_new_values() -> None:
    net, values = nn.Linear(2, 3), torch.randn(1, 2)
    old = net.weight.detach().clone()
    widen(net, [_edit((Block((4, 0), values),))])
    assert torch.equal(net.weight, torch.cat([old, torch.zeros(1, 2), values]))


@pytest.mark.parametrize(
    "block",
    [Block((4, 0), torch.ones(2, 2)), Block((0, -1), torch.ones(1, 1)), Block((0,), torch.ones(1))],
    ids=["beyond the end", "before the start", "too few dimensions"],
)
def test_blocks_that_do_not_fit_are_refused(block: Block) -> None:
    net = nn.Linear(2, 3)
    weight = net.weight
    with pytest.raises(fg.GrowthError, match="block of shape"):
        widen(net, [_edit((block,))])
    assert net.weight is weight


def test_tied_names_may_repeat_their_blocks_but_not_differ() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False), "b": nn.Linear(2, 3, bias=False)})
    net["b"].weight = net["a"].weight

    def edits(second: float) -> list[TensorEdit]:
        return [
            TensorEdit(name, {0: torch.arange(3)}, (4, 2), (Block((3, 0), torch.full((1, 2), value)),))
            for name, value in (("a.weight", 1.0), ("b.weight", second))
        ]

    with pytest.raises(fg.GrowthError, match="edited in two ways"):
        widen(net, edits(2.0))
    widen(net, edits(1.0))
    assert net["b"].weight is net["a"].weight
    assert torch.equal(net["a"].weight[3], torch.ones(2))
