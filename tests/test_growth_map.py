"""The fast maps and the replayed ones are the same matrix, and are chosen where they apply."""

from __future__ import annotations

import pytest
import torch
from nets import Plain, Residual, image_batch
from torch import nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow.growth_map import growth_map
from fastgrow.operators import ConvFlattenLinearPair, ConvPair, LinearPair
from fastgrow.replay import Capture, Replay, ReplayMap
from fastgrow.site_data import SiteData


def capture_of(model: nn.Module, sites: fg.Sites, x: torch.Tensor, y: torch.Tensor) -> Capture:
    watching = fg.observe(model, sites, nagn=False)
    kept: list[Capture] = []
    watching._solve = lambda batches: kept.extend(b.capture for b in batches)  # type: ignore[method-assign]
    with watching:
        F.cross_entropy(model(x), y).backward()
    return kept[0]


def normed(bias: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=bias),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.Flatten(),
        nn.Linear(3 * 16, 3),
    )


CASES = [
    (Plain, "conv1", ConvPair),
    (Plain, "conv2", ConvFlattenLinearPair),
    (Plain, "fc1", LinearPair),
    (lambda: normed(True), "0", ConvPair),
    (lambda: normed(False), "0", ConvPair),
    (Residual, "a1", ConvPair),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("build", "name", "kind"), CASES)
def test_pairs_equal_the_replay(build: object, name: str, kind: type, bias: bool, training: bool) -> None:
    torch.manual_seed(0)
    model = build().double().train(training)  # type: ignore[operator]
    x, y = image_batch()
    sites = fg.find_sites(model, x)
    capture = capture_of(model, sites, x, y)
    fast = growth_map(SiteData(model, sites, sites[name], [capture], [0.7], bias))
    assert type(fast) is kind
    slow = ReplayMap(Replay(model, sites, sites[name], capture), 0.7, bias=bias)
    truth = slow.dense()
    assert truth.abs().max() > 0
    for found in (fast.dense(), fast.matmat(torch.eye(fast.shape[1], dtype=torch.float64))):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12 * truth.abs().max().item())
    transposed = fast.rmatmat(torch.eye(fast.shape[0], dtype=torch.float64))
    torch.testing.assert_close(transposed.mT, truth, rtol=1e-9, atol=1e-12 * truth.abs().max().item())
