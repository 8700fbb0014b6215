"""Sites pickle: what comes back observes, plans and grows exactly as the original, also in another process."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stack_cases import batch
from stack_cases import net as stacked
from test_models import case, growing, loss_of
from torch import Tensor, nn

import fastgrow as fg
from fastgrow.sites import Sites
from fastgrow.sites.carried import pack, unpack

MODELS = (
    "resnext inception shufflenet unet_bilinear vit swin transposed nested dataclass checkpointed in_place cuts "
    "indexed grouped_query film einsum recursive"
).split()


def again(sites: Sites) -> Sites:
    return pickle.loads(pickle.dumps(sites))


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_the_same(name: str) -> None:
    _, _, sites = case(name)
    copied = again(sites)
    assert copied == sites
    assert again(copied) == sites
    assert sites.graph is not None
    assert copied.graph is not None
    nodes, others = sites.graph.trace.nodes, copied.graph.trace.nodes
    assert [str(node.format_node()) for node in others] == [str(node.format_node()) for node in nodes]
    assert [node.target for node in others] == [node.target for node in nodes]
    assert [[user.name for user in node.all_input_nodes] for node in others] == [
        [user.name for user in node.all_input_nodes] for node in nodes
    ]
    assert {node.name: of for node, of in copied.graph.dims.items()} == {
        n.name: of for n, of in sites.graph.dims.items()
    }
    assert all(call.node in copied.graph.dims for call in copied.graph.calls)
    assert copied.graph.tensor_dims == sites.graph.tensor_dims
    assert copied.graph.samples_at == sites.graph.samples_at


@pytest.mark.parametrize("name", MODELS)
def test_they_observe_plan_and_grow_bit_for_bit(name: str) -> None:
    model, x, sites = case(name)
    grows_alike(model, x, sites)


def grows_alike(model: nn.Module, x: Any, sites: Sites) -> None:
    names = [site.name for site in growing(sites)][:4]
    units = {name: sites[name].multiple for name in names}
    assert units
    grown, plans, seen = [], [], []
    for chosen in (sites, again(sites)):
        clone = copy.deepcopy(model)
        plans.append(fg.plan(clone, units, sites=chosen))
        torch.manual_seed(1)
        with fg.observe(clone, chosen, growth=names, rank=1) as observed:
            loss_of(clone, x).backward()
        seen.append((observed.nagn, {name: found.values for name, found in observed.directions(1).items()}))
        torch.manual_seed(1)
        fg.grow(clone, units, sites=chosen, closure=lambda clone=clone: loss_of(clone, x))
        grown.append(clone.state_dict())
    assert plans[0] == plans[1]
    assert seen[0][0] == seen[1][0]
    assert all(torch.equal(seen[1][1][name], values) for name, values in seen[0][1].items())
    assert all(torch.equal(grown[1][name], value) for name, value in grown[0].items())


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def test_stacks_too() -> None:
    model, (x, _) = stacked("bmm").double(), batch()
    grows_alike(model, x.double(), fg.find_sites(model, x.double()))


def test_by_hand_and_left_out_ones_too() -> None:
    model, x = mlp(), torch.randn(7, 3).double()
    by_hand = fg.name_sites(model, x, [["0", "1", "2"]])
    chosen = fg.find_sites(model, x, include="2")
    for sites in (by_hand, chosen):
        assert again(sites) == sites
        one, other = copy.deepcopy(model), copy.deepcopy(model)
        for clone, of in ((one, sites), (other, again(sites))):
            fg.grow(clone, {sites[0].name: 1}, sites=of, closure=lambda clone=clone: loss_of(clone, x))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


_PROCESS = """
import sys, torch, fastgrow as fg
model, x, sites = torch.load(sys.argv[1], weights_only=False)
fg.grow(model, {"0": 2, "2": 1}, sites=sites, closure=lambda: model(x).square().mean())
torch.save(model.state_dict(), sys.argv[2])
"""


def test_another_process_grows_with_them(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(7, 3).double()
    sites = fg.find_sites(model, x)
    torch.save((model, x, sites), tmp_path / "given.pt")
    subprocess.run([sys.executable, "-c", _PROCESS, tmp_path / "given.pt", tmp_path / "grown.pt"], check=True)
    fg.grow(model, {"0": 2, "2": 1}, sites=sites, closure=lambda: model(x).square().mean())
    grown = torch.load(tmp_path / "grown.pt")
    assert all(torch.equal(grown[name], value) for name, value in model.state_dict().items())


def test_a_grower_pickles_with_its_model_and_optimizer() -> None:
    x = torch.randn(7, 3).double()
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    grower = fg.Grower(model, optimizer, example_inputs=x, when=fg.when.Every(2), where=fg.where.Everywhere(units=1))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, grower: fg.Grower) -> list[Tensor]:
        torch.manual_seed(2)
        for _ in range(3):
            with grower.observe():
                loss_of(model, x).backward()
            optimizer.step()
            optimizer.zero_grad()
            grower.step()
        return list(model.parameters())

    train(model, optimizer, grower)
    file = io.BytesIO()
    torch.save((model, optimizer, grower), file)
    file.seek(0)
    others = torch.load(file, weights_only=False)
    assert others[2].model is others[0]
    assert len(others[2].history) == 1
    pairs = zip(train(model, optimizer, grower), train(*others), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert len(others[2].history) == 3


def test_the_pickle_is_small() -> None:
    _, _, sites = case("inception")
    assert sites.graph is not None
    assert len(pickle.dumps(sites)) < 1000 * len(sites.graph.trace.nodes)  # about 350 bytes a node


def test_an_operator_that_nobody_defined_is_named() -> None:
    sites = fg.find_sites(mlp(), torch.randn(7, 3).double())
    assert sites.graph is not None
    records = list(pack(sites.graph.trace.graph))
    at = next(i for i, record in enumerate(records) if record.op == "call_function")
    records[at] = replace(records[at], target=replace(records[at].target, namespace="nowhere", name="mine"))
    with pytest.raises(fg.GrowthError, match=r"nowhere::mine.*import what defines it"):
        unpack(records)
