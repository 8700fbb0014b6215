"""Norms and activations between two layers: the function kept, and the gain that was predicted attained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg


class Normed(nn.Module):
    """A site whose channels pass a norm that mixes them."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 16)
        self.norm = norm
        self.outer = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.norm(self.inner(x)))


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("how", [fg.how.Random, fg.how.ZeroOutgoing], ids=lambda how: how.__name__)
def test_norms_that_mix_channels_keep_the_function_or_refuse(kind: str, how: type[fg.how.How]) -> None:
    torch.manual_seed(0)
    model = Normed(getattr(nn, kind)(16, eps=1e-5)).double()
    x = torch.randn(16, 8).double()
    before = model(x)
    sites = fg.find_sites(model, x)
    if kind == "LayerNorm" or how is fg.how.ZeroOutgoing:
        with pytest.raises(fg.GrowthError, match="'inner'.*mixes its channels.*Net2Net"):
            fg.grow(model, {"inner": 16}, how(), sites=sites)
        assert sites.widths(model) == {"inner": 16}
    else:
        fg.grow(model, {"inner": 16}, how(), sites=sites)
    torch.testing.assert_close(model(x), before)


def gains(model: nn.Module, name: str, units: int, x: Tensor, sites: fg.Sites) -> tuple[float, float]:
    """Predicted at learning rate 1, and found: the squared gradient that the new units' incoming weights attain."""
    torch.manual_seed(1)
    target = torch.randn_like(model(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    (grown,) = fg.grow(
        model, {name: units}, sites=sites, optimizer=optimizer, closure=lambda: F.mse_loss(model(x), target)
    ).sites
    model.zero_grad()
    F.mse_loss(model(x), target).backward()
    gradient = model.get_submodule(name).weight.grad
    assert isinstance(gradient, Tensor)
    assert grown.predicted_gain is not None
    return grown.predicted_gain, gradient[grown.old_width :].square().sum().item()


def test_a_group_norm_keeps_the_size_of_its_groups_growth_after_growth() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8), nn.Tanh(),
        nn.Flatten(), nn.Linear(128, 5),
    ).double()  # fmt: skip
    x = torch.randn(4, 3, 8, 8).double()
    sites = fg.find_sites(model, x)
    for _ in range(3):
        for name, units in {"0": 4, "3": 2}.items():
            predicted, found = gains(model, name, units, x, sites)
            assert predicted == pytest.approx(found, rel=1e-8)


class Bent(nn.Module):
    """One activation between two layers, as a module or as a function."""

    def __init__(self, bend: Callable[[Tensor], Tensor], norm: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.bend = bend
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.bend(self.norm(self.a(x))))


SLOPE = torch.tensor([0.25]).double()
BENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, SLOPE),
    "Hardtanh": nn.Hardtanh(-1.0, 1.0),
    "LeakyReLU": nn.LeakyReLU(0.3),
}


@pytest.mark.parametrize("bend", BENDS)
def test_activations_that_no_twin_replaces_keep_their_own_derivative(bend: str) -> None:
    torch.manual_seed(0)
    model, x = Bent(BENDS[bend]).double(), torch.randn(9, 6).double()
    predicted, found = gains(model, "a", 2, x, fg.find_sites(model, x))
    assert predicted == pytest.approx(found, rel=1e-8)


def test_units_behind_a_hardtanh_that_is_flat_at_zero_learn() -> None:
    torch.manual_seed(0)
    model, x = Bent(nn.Hardtanh(0.0, 1.0)).double(), torch.randn(9, 6).double()
    _, found = gains(model, "a", 2, x, fg.find_sites(model, x))
    assert found > 0


class RootMeanSquare(nn.Module):
    """An RMSNorm written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.variance_epsilon = 0.3

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.mark.parametrize("norm", [RootMeanSquare, lambda: nn.RMSNorm(8, eps=0.3)], ids=["written", "module"])
def test_an_rms_norms_new_eps_is_that_of_the_next_growth(norm: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Normed(norm()).double(), torch.randn(9, 8).double()
    model.inner, model.outer = nn.Linear(8, 8).double(), nn.Linear(8, 4).double()
    sites = fg.find_sites(model, x)
    for _ in range(3):
        predicted, found = gains(model, "inner", 1, x, sites)
        assert predicted == pytest.approx(found, rel=1e-8)


@pytest.mark.parametrize("norm", [False, True], ids=["bare", "batch_norm"])
@pytest.mark.parametrize("bend", [F.relu, F.relu6, nn.Hardtanh(0.0, 1.0)], ids=["relu", "relu6", "hardtanh"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_signed_pairs_are_solved_where_they_start(norm: bool, bend: Callable[[Tensor], Tensor], scale: float) -> None:
    torch.manual_seed(0)
    model, x = Bent(bend, norm).double(), scale * torch.randn(9, 6).double()
    predicted, found = gains(model, "a", 4, x, fg.find_sites(model, x))
    assert predicted == pytest.approx(found, rel=1e-6)
