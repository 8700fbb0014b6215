"""Room that cannot be reserved, filled or kept: refused by name, and nothing changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reserve_cases import OPTIMIZERS, ROOM, UNITS, batch, chain, reserved, train
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg


@pytest.mark.parametrize("how", [fg.how.Firefly, fg.how.Splitting, fg.how.GradMaxOpt], ids=lambda how: how.__name__)
def test_methods_that_cannot_fill_room_say_so(how: type[fg.how.How]) -> None:
    model, sites, _ = reserved()
    x, y = batch()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fg.GrowthError, match=f"{how.__name__}.*fg.release"):
        fg.grow(model, {"7": 1}, how(), sites=sites, closure=lambda: F.cross_entropy(model(x), y))
    with pytest.raises(fg.GrowthError, match=how.__name__):
        fg.reserve(chain(), ROOM, sites=sites, how=how())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Normed(nn.Module):
    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.activation, self.last = nn.Linear(5, 8), norm, activation, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.norm(self.first(x))))


class Shifted(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)) + 1.0)


REFUSED = {
    "layer_norm": (lambda: Normed(nn.LayerNorm(8), nn.ReLU()), "layer_norm"),
    "sigmoid": (lambda: Normed(nn.Identity(), nn.Sigmoid()), "sigmoid"),
    "softplus": (lambda: Normed(nn.Identity(), nn.Softplus()), "softplus"),
    "shifted": (lambda: Shifted(nn.Identity(), nn.ReLU()), "add"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_inert_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    model = make()
    sites = fg.find_sites(model, torch.randn(4, 5))
    before = list(model.parameters())
    with pytest.raises(fg.GrowthError, match=rf"'first'.*no room reserved.*{reason}"):
        fg.reserve(model, {"first": 12}, sites=sites)
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))


def test_attention_heads_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(layer, nn.Linear(8, 3))
    sites = fg.find_sites(model, torch.randn(2, 5, 8))
    heads = next(site.name for site in sites if site.heads)
    with pytest.raises(fg.GrowthError, match="attention heads"):
        fg.reserve(model, {heads: 4}, sites=sites)
    x = torch.randn(2, 5, 8)
    model.eval()
    expected = model(x)
    fg.reserve(model, {"0.linear1": 32}, sites=sites)
    assert_close(model(x), expected, torch.float32, 100)


def test_bad_arguments_are_named() -> None:
    model = chain()
    x, _ = batch()
    sites = fg.find_sites(model, x)
    for widths, words in (({"0": 4}, "above that"), ({"0": 4.5}, "integer"), ([("0", 9)], "mapping"), ({"x": 9}, "x")):
        with pytest.raises(fg.GrowthError, match=words):
            fg.reserve(model, widths, sites=sites)  # type: ignore[arg-type]
    with pytest.raises(fg.GrowthError, match="reserve"):
        fg.Grower(model, torch.optim.SGD(model.parameters(), lr=0.1), sites=sites, when=fg.when.Every(2), reserve=0)
    fg.reserve(model, ROOM, sites=sites)
    with pytest.raises(fg.GrowthError, match="fg.release"):
        fg.insert_layer(model, "7", example_inputs=x)


@pytest.mark.parametrize("call", ["grow", "release"])
def test_room_that_was_written_is_an_error(call: str) -> None:
    model, sites, _ = reserved()
    nn.init.normal_(model[3].weight)
    with pytest.raises(fg.GrowthError, match="'3.weight'.*no longer zero"):
        fg.grow(model, {"0": 1}, fg.how.Random(), sites=sites) if call == "grow" else fg.release(model)


def test_a_growth_that_fails_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are written in place, and put back when an optimizer fails at the very end."""
    model, sites, optimizer = reserved(OPTIMIZERS["fg.adam"])
    train(model, optimizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    widths = sites.widths(model)

    def fail(parameter: Tensor, stages: Any) -> None:
        raise RuntimeError("too late")

    monkeypatch.setattr(optimizer, "grown", fail)
    with pytest.raises(RuntimeError, match="too late"):
        fg.grow(model, UNITS, fg.how.Net2Net(), sites=sites, optimizer=optimizer)
    assert sites.widths(model) == widths
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
