"""What a growth costs whatever its size: how often it walks through the modules, and what it reads of gradients."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

import fastgrow as fg
from fastgrow import names
from fastgrow.cores import fixed_signs
from fastgrow.layout import run_start

WALKS = {names.modules_in.__code__, names.named_modules_in.__code__}


def mlp(depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.ReLU())]
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), *hidden, nn.Linear(6, 3))


def calls_of(work: Callable[[], object]) -> Counter[object]:
    """How often each Python function is called meanwhile."""
    counts: Counter[object] = Counter()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            counts[frame.f_code] += 1

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counts


def walks(depth: int) -> int:
    """How often a growth of every site looks at all modules."""
    model, x = mlp(depth), torch.randn(8, 4)
    sites = fg.find_sites(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    units = {site.name: 2 for site in sites}
    assert len(units) == depth + 1

    def grow() -> None:
        fg.grow(model, units, sites=sites, optimizer=optimizer, closure=lambda: model(x).square().mean())

    counts = calls_of(grow)
    assert all(site.width + 2 == sites.widths(model)[site.name] for site in sites)
    return sum(count for code, count in counts.items() if code in WALKS)


def test_modules_are_walked_through_as_often_for_many_sites_as_for_one() -> None:
    assert walks(5) == walks(0) <= 16


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), -float("inf"), 1e25])
def test_a_gradient_that_is_not_finite_is_told_where_no_norm_is_asked_for(worst: float) -> None:
    model, x = mlp(0), torch.randn(8, 4)
    sites = fg.find_sites(model, x)
    weight = torch.ones(8, 3)
    weight[5, 1] = worst

    def loss() -> Tensor:
        return (model(x) * weight).sum()

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(fg.GrowthError, match="layer '2'.*not finite"):
        fg.grow(model, {sites[0].name: 1}, sites=sites, closure=loss)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_signs_make_the_largest_entry_positive() -> None:
    left = torch.tensor([[0.5, -3.0, 2.0], [-1.0, 2.0, -2.0], [0.25, 1.0, 0.0]])
    signed = left * fixed_signs(left)
    assert signed.tolist() == [[-0.5, 3.0, 2.0], [1.0, -2.0, -2.0], [-0.25, -1.0, 0.0]]  # a tie stays as it is
    assert fixed_signs(torch.zeros(4, 2)).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("positions", "start"),
    [([], 0), ([4], 4), ([3, 4, 5], 3), ([3, 5, 6], None), ([5, 4, 3], None), ([2, 2, 3], None)],
)
def test_runs_of_positions(positions: list[int], start: int | None) -> None:
    assert run_start(torch.tensor(positions, dtype=torch.int64)) == start
    assert run_start(torch.tensor([p for n in positions for p in (n, -1)], dtype=torch.int64)[::2]) == start


def test_the_stages_of_an_axis_behind_its_room() -> None:
    axis = fg.stages.Axis.seed(3).grown(torch.tensor([0, 1, 4]), 6, 2, torch.tensor([5]))
    assert axis.stage.tolist() == [0, 0, 2, 2, 0, fg.stages.ROOM]
    assert (axis.newest, axis.has_room) == (2, True)
    filled = axis.grown(torch.tensor([0, 1, 2, 3, 4, -1]), 6, 3, torch.tensor([], dtype=torch.int64))
    assert filled.stage.tolist() == [0, 0, 2, 2, 0, 3]
    assert (filled.newest, filled.has_room, filled.origin.tolist()) == (3, False, [0, 1, 4])
    assert (fg.stages.Axis.seed(0).newest, fg.stages.Axis.seed(0).has_room) == (0, False)
