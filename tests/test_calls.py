"""How a model is called and how its layers are: nested arguments, layers inside other modules, writes in place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import incoming_gradients, probe
from tolerances import tolerance
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_writing import Nested

import fastgrow as fg


class Dense(nn.Module):
    """A layer of its own weights that activates: what its module gives is not the product's output."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, into) * 0.3), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(2 * x, self.weight, self.bias))


class Chomped(nn.Conv1d):
    """A causal convolution that pads both ends and cuts one off."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out, 3, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :, :-2] * 0.5


class Masked(nn.Module):
    """A side value written in place through views, and its sum with an in-place op."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_zeros(x.shape[1], 1)
        mask[1:] = 2.0
        mask[0] += 0.5
        h = torch.tanh(self.fc1(x)) * mask
        return self.fc3(torch.tanh(self.fc2(h))).mean(1)


class Transposed(nn.Module):
    """Written over through a view that has no inverse op."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc1(x))
        h = h.clone()
        h.transpose(0, 1).mul_(2.0)
        return self.fc3(torch.tanh(self.fc2(h))).mean(1)


def stacked(layer: Any) -> nn.Module:
    return nn.Sequential(layer(4, 5), layer(5, 4), layer(4, 3))


CASES = {
    "dense": (lambda: stacked(Dense), (6, 4)),
    "chomped": (lambda: stacked(Chomped), (4, 4, 6)),
    "masked": (Masked, (4, 3, 4)),
    "transposed": (Transposed, (4, 3, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_optimum_is_attained(name: str) -> None:
    torch.manual_seed(0)
    build, shape = CASES[name]
    model, x = build().double(), torch.randn(shape, dtype=torch.float64)
    sites = fg.find_sites(model, x)
    assert len(sites) == 2 - (name == "transposed")
    for site in sites:
        grown = copy.deepcopy(model)
        truth = torch.linalg.svdvals(probe(grown, sites, site, lambda m: m(x).square().mean()))
        old_width = sites.width(grown, site)
        fg.grow(
            grown,
            {site.name: 2},
            fg.how.GradMax(norm="fixed", scale=0.3),
            sites=sites,
            closure=lambda grown=grown: grown(x).square().mean(),
        )
        torch.testing.assert_close(grown(x), model(x), rtol=1e-12, atol=1e-12)
        grown.zero_grad()
        grown(x).square().mean().backward()
        attained = incoming_gradients(grown, sites, site, old_width).norm().item()
        optimum = 0.3 * truth[:2].norm().item()
        assert optimum > 0
        assert 0.999 * optimum <= attained <= optimum * (1 + 1e-9)


def test_arguments_are_told_apart_by_name_whatever_their_order() -> None:
    torch.manual_seed(0)
    model = Nested().double()
    parts = [torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)]
    gain, mask = (torch.rand(6, 1, dtype=torch.float64) for _ in range(2))
    sites = fg.find_sites(model, {"parts": parts, "options": {"gain": gain}, "mask": mask, "scale": 0.5})
    calls = {
        "the same": lambda: model(parts=parts, options={"gain": gain}, mask=mask, scale=0.5),
        "another order": lambda: model(mask=mask, scale=0.5, options={"gain": gain}, parts=parts),
        "positions": lambda: model(parts, {"gain": gain}, 0.5, mask),
        "both": lambda: model(parts, {"gain": gain}, mask=mask, scale=0.5),
    }
    values = {}
    for label, call in calls.items():
        with fg.observe(model, sites, rank=3) as seen:
            call().square().mean().backward()
        values[label] = seen.directions(3)["fc1"].values
        assert values[label][0] > 0
        torch.testing.assert_close(values[label], values["the same"], rtol=1e-12, atol=0)


def test_a_loss_of_one_head_alone_grows_the_trunk() -> None:
    torch.manual_seed(0)

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.act = nn.Linear(4, 5), nn.Tanh()
            self.a, self.b = nn.Linear(5, 2), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.act(self.trunk(x))
            return self.a(h), self.b(h)

    model, x = Heads().double(), torch.randn(6, 4, dtype=torch.float64)
    sites = fg.find_sites(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    report = fg.grow(model, {"trunk": 2}, sites=sites, optimizer=optimizer, closure=lambda: model(x)[1].square().mean())
    model(x)[1].square().mean().backward()
    gradient = incoming_gradients(model, sites, sites["trunk"], 5)
    assert report.sites[0].predicted_gain == pytest.approx(float(gradient.square().sum()), rel=1e-9)
    assert float(model.a.weight[:, 5:].norm()) <= tolerance(torch.float64, 5) * float(model.b.weight[:, 5:].norm())


def test_random_values_between_the_layers_are_refused_by_name() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x) * torch.randn(x.shape[0], 1))

    model, x = Noisy(), torch.randn(6, 4)
    sites = fg.find_sites(model, x)
    with pytest.raises(fg.GrowthError, match=r"random values \(randn\)"):
        fg.grow(model, {"fc1": 1}, sites=sites, closure=lambda: model(x).square().mean())
    assert model.fc1.out_features == 5


def test_captured_modules_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = stacked(nn.Linear), torch.randn(6, 4)
    sites = fg.find_sites(model, x)

    def make_graphed_forward(forward: Any) -> Any:  # as torch.cuda.graphs names it
        def new_fwd(*args: Any) -> Any:
            return forward(*args)

        return new_fwd

    model[1].forward = make_graphed_forward(model[1].forward)
    for act in (
        lambda: fg.grow(model, {"0": 1}, fg.how.Random(), sites=sites),
        lambda: fg.observe(model, sites).__enter__(),
    ):
        with pytest.raises(fg.GrowthError, match="'1' was captured by torch.cuda.make_graphed_callables"):
            act()
    del model[1].forward
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(fg.GrowthError, match="being captured"):
        fg.grow(model, {"0": 1}, fg.how.Random(), sites=sites)
    assert model[0].out_features == 5
