"""fg.insert_layer in models that others wrote, and on two processes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from gloo import found_by, joined
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import fastgrow as fg

transformers = pytest.importorskip("transformers")


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50
    )
    return transformers.BertModel(config), {"input_ids": torch.randint(0, 50, (2, 7))}


def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic")
    return transformers.ResNetModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return transformers.GPT2Model(config), {"input_ids": torch.randint(0, 50, (2, 7))}


CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "bert, GELU": (bert, "encoder.layer.0.intermediate.dense", {"activation": None}),
    "bert, values": (bert, "encoder.layer.1.attention.self.value", {"activation": nn.PReLU(init=1.0)}),
    "bert, units": (bert, "encoder.layer.1.intermediate.dense", {"units": 4}),
    "resnet, inside a block": (resnet, "encoder.stages.0.layers.0.layer.0.convolution", {}),
    "resnet, a block": (resnet, "encoder.stages.0.layers.1", {"kernel_size": 3}),
    "resnet, units": (resnet, "encoder.stages.1.layers.0.layer.0.convolution", {"units": 3}),
    "gpt2, a gated activation": (gpt2, "h.0.mlp.c_fc", {"units": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_models_of_transformers(case: str) -> None:
    build, after, options = CASES[case]
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()

    def output() -> Tensor:
        result: Tensor = model(**inputs)[0]
        return result

    with torch.no_grad():
        before = output()
    target = torch.randn_like(before)

    def closure() -> Tensor:
        return F.mse_loss(output(), target)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a config cannot say inserted layers
        report = fg.insert_layer(model, after, example_inputs=inputs, closure=closure, optimizer=optimizer, **options)
        name = report.sites[0].name
        with torch.no_grad():
            assert torch.equal(output(), before)
        sites = fg.find_sites(model, inputs)
        site = next(site for site in sites if name in site.producers)
        fg.grow(model, {site.name: site.multiple}, sites=sites, closure=closure, optimizer=optimizer)
    with torch.no_grad():
        assert_close(output(), before, torch.float32, 100)
    start = closure()
    start.backward()
    assert model.get_submodule(name).weight.grad.any()
    optimizer.step()
    assert closure() < start


def test_a_config_that_cannot_say_it_warns() -> None:
    model, inputs = bert()
    with pytest.warns(UserWarning, match="its config cannot say"):
        fg.insert_layer(model, "encoder.layer.0.intermediate.dense", activation=None, example_inputs=inputs)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.relu, self.c2 = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2)
        self.out = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.c2(self.relu(self.c1(x)))).flatten(1))


def deepened(rank: int | None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(12, 2, 8, 8, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (12,), generator=generator)
    if rank is not None:
        x, y = x[rank * 6 : rank * 6 + 6], y[rank * 6 : rank * 6 + 6]
    torch.manual_seed(0)
    model = Net().double()
    called = model if rank is None else DDP(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def train() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(called(x), y).backward()
            optimizer.step()

    def closure() -> Tensor:
        return F.cross_entropy(called(x), y)

    train()
    fg.insert_layer(called, "c1", example_inputs=x, optimizer=optimizer)
    train()
    fg.insert_layer(called, "c1", before="relu.1", units=2, closure=closure, optimizer=optimizer)
    train()
    sites = fg.find_sites(called, x)
    fg.grow(called, {"relu.1.branch.0": 1}, sites=sites, closure=closure, optimizer=optimizer)
    train()
    torch.manual_seed(rank or 0)  # what is drawn at random is rank 0's
    fg.insert_layer(called, "c1", before="relu.1.layer", units=2, how=fg.how.Random(), example_inputs=x)
    if rank:
        with pytest.raises(fg.GrowthError, match="Tanh|tanh"):
            fg.insert_layer(called, "c2", example_inputs=x, activation=nn.Tanh())
    elif rank == 0:
        with pytest.raises(fg.GrowthError, match="rank 1 could not"):
            fg.insert_layer(called, "c2", example_inputs=x, activation=None)
    return model.state_dict()


def worker(rank: int, folder: str) -> None:
    with joined(rank, folder) as path:
        torch.save(deepened(rank), path / f"rank{rank}.pt")


def test_two_processes_insert_what_one_inserts() -> None:
    ((one, two),) = found_by(worker)
    alone = deepened(None)
    assert one.keys() == two.keys() == alone.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
        assert_close(value, alone[name], torch.float64, 12 * 64 * 36 * 12)  # samples, positions, fan-in, steps
