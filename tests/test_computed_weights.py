"""Layers whose weight is computed anew in every pass, and their neighbours: each says by what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastgrow as fg

WAYS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "weight_norm_hook": (nn.utils.weight_norm, "is computed by a hook (weight_norm); make it permanent to grow"),
    "spectral_norm_hook": (nn.utils.spectral_norm, "is computed by a hook (spectral_norm); make it permanent to grow"),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        "is computed by a hook (pruning); make it permanent to grow",
    ),
    "weight_norm": (
        parametrizations.weight_norm,
        "is computed by a parametrization (_WeightNorm); remove it to grow",
    ),
    "spectral_norm": (
        parametrizations.spectral_norm,
        "is computed by a parametrization (_SpectralNorm); remove it to grow",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_neighbour_is_named(way: str, kind: str) -> None:
    compute, reason = WAYS[way]
    layer = nn.Linear if kind == "linear" else (lambda i, o: nn.Conv2d(i, o, 1))
    model = nn.Sequential(layer(3, 6), nn.ReLU(), compute(layer(6, 4)), nn.ReLU(), layer(4, 5), nn.ReLU(), layer(5, 2))
    x = torch.randn(7, 3) if kind == "linear" else torch.randn(7, 3, 4, 4)
    sites = fg.find_sites(model, x)
    assert [site.name for site in sites] == ["4"]  # its neighbours compute nothing
    assert sites.frozen == {
        "0": f"the weight of '2', which shares its channels, {reason}",
        "2": f"its weight {reason}",
        "6": "its output is the model's output",
    }


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_layer_that_writes_the_same_channels_is_named_too() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch, self.head = nn.Linear(3, 4), nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stem(x) + self.branch(x))

    frozen = fg.find_sites(Residual(), torch.randn(7, 3)).frozen
    assert frozen["stem"].startswith("the weight of 'branch', which shares its channels, is computed by a hook")
