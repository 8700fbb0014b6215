"""Which layers `find_sites` calls output layers, and what variance transfer makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg


def outputs_of(model: nn.Module, x: Any) -> list[str]:
    return [name for name, info in fg.find_sites(model, x).layers.items() if info.is_output]


TAILS: dict[str, Callable[[], list[nn.Module]]] = {
    "nothing": list,
    "log_softmax": lambda: [nn.LogSoftmax(1)],
    "unflatten": lambda: [nn.Unflatten(1, (2, 2))],
    "sigmoid": lambda: [nn.Sigmoid()],
    "batch_norm": lambda: [nn.BatchNorm1d(4)],
    "in_place": lambda: [nn.ReLU(inplace=True)],
    "pooled": lambda: [nn.Unflatten(1, (1, 2, 2)), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
}


@pytest.mark.parametrize("tail", TAILS)
def test_ops_behind_the_last_layer_do_not_hide_it(tail: str) -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), *TAILS[tail]())
    assert outputs_of(model, torch.randn(5, 3)) == ["2"]


class Residual(nn.Module):
    """No layer behind the residual stream: its last branch is the output layer, the stem is not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x)
        return stream + self.down(F.relu(self.up(stream)))


class Heads(nn.Module):
    """Two heads, one with an auxiliary way; a hidden activation is returned beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.hidden = nn.Linear(3, 6), nn.Linear(6, 5)
        self.early, self.first, self.second = nn.Linear(6, 2), nn.Linear(5, 4), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = F.relu(self.trunk(x))
        features = self.hidden(low)
        high = F.relu(features)
        heads = {"class": self.first(high), "value": self.second(high).squeeze(-1), "early": self.early(low)}
        return {**heads, "features": features}


class Written(nn.Module):
    """A value that a layer writes into another in place; a buffer that a hidden layer's values are kept in."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.aside = nn.Linear(3, 2)
        self.register_buffer("kept", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.low(x))
        result = self.first(hidden)
        result.add_(self.second(hidden))
        self.kept.copy_(self.aside(x).mean(0))
        return result


class Computed(nn.Module):
    """The layer behind has a weight that is computed first; growth cannot follow it, but it is a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.high(torch.tanh(self.low(x)))


class Loss(nn.Module):
    """The loss is made by the model, and attention by products of activations: neither is a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.softmax(self.query(x) @ self.key(x).mT, -1) @ self.value(x)
        return F.cross_entropy(mixed, torch.zeros(len(x), dtype=torch.long))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (Residual, ["down"]),
        (Heads, ["early", "first", "second"]),
        (Written, ["first", "second"]),
        (Computed, []),
        (Loss, ["query", "key", "value"]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_output_layers_have_no_layer_behind_them(kind: type[nn.Module], wanted: list[str]) -> None:
    assert sorted(outputs_of(kind(), torch.randn(5, 3))) == sorted(wanted)


@pytest.mark.parametrize("labels", [False, True], ids=["logits", "loss"])
def test_transformers_classification(labels: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.BertConfig(**sizes, vocab_size=11, num_labels=3, max_position_embeddings=16)
    model = transformers.BertForSequenceClassification(config)
    inputs = {"input_ids": torch.arange(8).view(2, 4)}
    if labels:
        inputs["labels"] = torch.tensor([0, 2])
    assert outputs_of(model, inputs) == ["classifier"]
    vit = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    assert outputs_of(transformers.ViTForImageClassification(vit), torch.randn(2, 3, 8, 8)) == ["classifier"]
    base = transformers.BertModel(config)  # the last hidden state is returned, and the pooler reads it
    assert outputs_of(base, {"input_ids": inputs["input_ids"]}) == ["pooler.dense"]


@pytest.mark.parametrize("tail", ["log_softmax", "unflatten", "squeeze"])
def test_variance_transfer_scales_the_logits_by_the_fan_in(tail: str) -> None:
    torch.manual_seed(0)
    classes = 1 if tail == "squeeze" else 4
    hidden = [nn.Linear(3, 6), nn.BatchNorm1d(6, eps=1e-30), nn.ReLU(), nn.Linear(6, classes, bias=False)]
    ends = {"log_softmax": nn.LogSoftmax(1), "unflatten": nn.Unflatten(1, (2, 2)), "squeeze": nn.Flatten(0)}
    model = nn.Sequential(*hidden, ends[tail]).double()
    x = torch.randn(7, 3).double()
    before = copy.deepcopy(model[:-1])(x)
    fg.grow(model, {"0": 6}, fg.how.VarianceTransfer(noise=0.0), sites=fg.find_sites(model, x))
    torch.testing.assert_close(model[:-1](x), before / 2)  # C_t / C_t+1
    wide = nn.Sequential(nn.Linear(3, 400), nn.ReLU(), nn.Linear(400, classes, bias=False), ends[tail])
    fg.how.VarianceTransfer.initialize_(wide, fg.find_sites(wide, x.float()))
    deviation = wide[2].weight.detach().std(unbiased=False) * 400  # variance 1 / fan-in^2
    assert abs(float(deviation) - 1) < 5 / 800**0.5  # of 400 values or more


class Parted(nn.Module):
    """Two chains that the forward pass joins by code which no export follows."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.middle = nn.Linear(3, 6), nn.Linear(6, 4)
        self.high, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.act, self.act2 = nn.ReLU(), nn.ReLU()
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.middle(self.act(self.low(x)))
        return self.head(self.act2(self.high(torch.tanh(self.kept) * float(self.kept.mean() > 9)))).squeeze()


@pytest.mark.parametrize("trained", [True, False])
def test_by_hand_the_end_of_a_chain_is_an_output_layer_only_where_the_model_ends(trained: bool) -> None:
    model = Parted().requires_grad_(trained)
    sites = fg.name_sites(model, torch.randn(5, 3), [["low", "act", "middle"], ["high", "act2", "head"]])
    assert [name for name, info in sites.layers.items() if info.is_output] == ["head"]
    assert model.kept is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
