"""Stacks: weights that hold one matrix for each of several members, as experts and ensembles have them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gloo import WORLD, assert_same_bits, found_by, joined
from stack_cases import BATCH, HIDDEN, INS, MEMBERS, OUTS, STYLES, TURNED, Stack, batch, each_loss, member, net
from test_growth_map import capture_of
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import fastgrow as fg
from fastgrow.growth_map import growth_map
from fastgrow.operators import StackedPair
from fastgrow.replay import Replay, ReplayMap
from fastgrow.site_data import SiteData


@pytest.mark.parametrize("style", [*STYLES, *TURNED])
def test_a_stack_is_one_site(style: str) -> None:
    model, (x, _) = net(style), batch()
    sites = fg.find_sites(model, x)
    (site,) = sites
    assert (site.name, site.width, site.multiple, site.separate, site.stacked) == ("0", HIDDEN, 1, True, True)
    assert (site.producers, site.consumers) == (("0",), ("2",))
    assert sites.frozen == {"2": "its output is the model's output"}
    before = model(x)
    fg.grow(model, {"0": 2}, fg.how.Random(), sites=sites)
    assert sites.widths(model) == {"0": HIDDEN + 2}
    assert model[0].bias.shape == (MEMBERS, 1, HIDDEN + 2)
    assert torch.equal(model(x), before)


class Shared(nn.Module):
    """One input for all members, members between batch and channels, a mean over them at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(MEMBERS, INS, HIDDEN) / 2)
        self.gain = nn.Parameter(torch.rand(MEMBERS, 1, HIDDEN) + 0.5)
        self.second = nn.Parameter(torch.randn(HIDDEN, MEMBERS, 7) / 2)
        self.third = nn.Linear(7, OUTS)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.matmul(x, self.first)) * self.gain
        z = torch.einsum("gbi,igo->bgo", h, self.second)
        return self.third(F.gelu(z).mean(1))


class Residual(nn.Module):
    """A stream of members with three axes of samples, and a plain layer that writes all members at once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INS, MEMBERS * HIDDEN)
        self.up = nn.Parameter(torch.randn(MEMBERS, HIDDEN, 7) / 2)
        self.down = nn.Parameter(torch.randn(MEMBERS, 7, HIDDEN) / 2)
        self.head = nn.Linear(MEMBERS * HIDDEN, OUTS)

    def forward(self, x: Tensor) -> Tensor:  # (2, B, INS)
        stream = torch.tanh(self.stem(x)).unflatten(-1, (MEMBERS, -1)).transpose(1, 2)  # (2, G, B, HIDDEN)
        stream = stream + torch.sin(stream @ self.up) @ self.down
        return self.head(stream.transpose(1, 2).flatten(2))


class Mixing(nn.Module):
    """Members that meet between two stacks: a unit is one, with weights in all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(MEMBERS, INS, HIDDEN) / 2)
        self.second = nn.Parameter(torch.randn(MEMBERS, HIDDEN, OUTS) / 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.first)
        return (h + h.mean(0, keepdim=True)) @ self.second


CASES: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, bool]]] = {
    "shared": (Shared, (BATCH, INS), {"first": True, "second": False}),
    "residual": (Residual, (2, BATCH, INS), {"stem": True, "up": True}),
    "mixing": (Mixing, (MEMBERS, BATCH, INS), {"first": False}),
}


def case(name: str) -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor], fg.Sites]:
    torch.manual_seed(3)
    build, shape, _ = CASES[name]
    model, x = build().double(), torch.randn(shape).double()
    target = torch.randn_like(model(x))
    return model, x, lambda output: F.mse_loss(output, target), fg.find_sites(model, x)


@pytest.mark.parametrize("name", list(CASES))
def test_units_are_separate_where_members_never_meet(name: str) -> None:
    *_, sites = case(name)
    assert {site.name: site.separate for site in sites} == CASES[name][2]


class _Probe(fg.how.How):
    """Units with given incoming weights and silent outgoing ones."""

    def __init__(self, column: Tensor) -> None:
        self.column = column

    def start(self, newborns: fg.how.Newborns) -> fg.how.Start:
        return fg.how.Start(newborns.split(self.column[:, None], "producer"))


@pytest.mark.parametrize(("name", "site"), [(name, site) for name, (_, _, found) in CASES.items() for site in found])
def test_the_growth_matrix_is_what_a_new_unit_feels(name: str, site: str) -> None:
    """M X, column by column: the gradient of a unit's outgoing weights for tiny incoming ones."""
    model, x, loss, sites = case(name)
    watching = fg.observe(model, sites, nagn=False)
    kept: list[Any] = []
    watching._solve = lambda batches: kept.extend(b.capture for b in batches)  # type: ignore[method-assign]
    with watching:
        loss(model(x)).backward()
    found = growth_map(SiteData(model, sites, sites[site], kept, [1.0]))
    size = 1e-6
    columns = []
    for number in range(found.shape[1]):
        probed = copy.deepcopy(model)
        column = torch.zeros(found.shape[1], dtype=torch.float64)
        column[number] = size
        fg.grow(probed, {site: 1}, _Probe(column), sites=sites)
        loss(probed(x)).backward()
        parts = []
        for consumer in sites[site].consumers:
            slot = sites[site].weight(consumer, "consumer")
            gradient = slot.canonical(probed.get_parameter(slot.tensor).grad)
            width = sites.sizes(model)[sites[site].axis]
            new = fg.layout.new_positions(
                slot.layout, sites.sizes(model), {**sites.sizes(model), sites[site].axis: width + 1}
            )
            parts.append(gradient[:, new].reshape(-1))
        columns.append(torch.cat(parts) / size)
    truth = torch.stack(columns, 1)
    largest = truth.abs().max().item()
    assert largest > 0
    # differences of order size^2 in the middle's bend, and rounding of float64 divided by size
    torch.testing.assert_close(found.dense(), truth, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(("name", "site"), [(name, site) for name, (_, _, found) in CASES.items() for site in found])
def test_gradmax_attains_what_it_predicts_behind_any_middle(name: str, site: str) -> None:
    model, x, loss, sites = case(name)
    before, width = model(x), sites.sizes(model)[sites[site].axis]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    report = fg.grow(
        model, {site: 2 * sites[site].step}, sites=sites, optimizer=optimizer, closure=lambda: loss(model(x))
    )
    assert_close(model(x), before, torch.float64, 10 * HIDDEN)
    loss(model(x)).backward()
    total = 0.0
    old = {**sites.sizes(model), sites[site].axis: width}
    for producer in sites[site].producers:
        slot = sites[site].weight(producer, "producer")
        gradient = slot.canonical(model.get_parameter(slot.tensor).grad)
        total += gradient[fg.layout.new_positions(slot.layout, old, sites.sizes(model))].square().sum().item()
    assert total > 0
    assert report.sites[0].predicted_gain == pytest.approx(total, rel=1e-9)
    assert report.sites[0].captured is not None
    assert report.sites[0].captured >= 0.999


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("style", ["baddbmm", "einsum_turned", "matmul"])
def test_plain_stacks_need_no_replay(style: str, bias: bool) -> None:
    model, (x, _) = net(style), batch()
    sites = fg.find_sites(model, x)
    labels = torch.arange(MEMBERS * BATCH).reshape(MEMBERS, BATCH) % OUTS
    capture = capture_of(nn.Sequential(*model, nn.Flatten(0, 1)), sites, x, labels.flatten())
    fast = growth_map(SiteData(model, sites, sites[0], [capture, capture], [0.7, 0.2], bias))
    parts = [ReplayMap(Replay(model, sites, sites[0], capture), weight, bias=bias) for weight in (0.7, 0.2)]
    truth = parts[0].dense() + parts[1].dense()
    assert type(growth_map(SiteData(model, sites, sites[0], [capture], [1.0]))) is StackedPair
    assert truth.abs().max() > 0
    for found in (fast.dense(), fast.rmatmat(torch.eye(fast.shape[0], dtype=torch.float64)).mT):
        assert_close(found, truth, torch.float64, BATCH)
    blocks = truth.reshape(OUTS, MEMBERS, -1, MEMBERS)
    apart = ~torch.eye(MEMBERS, dtype=torch.bool)
    assert not blocks.transpose(1, 2)[:, :, apart].any()


def test_costs_count_each_member_once() -> None:
    model, (x, _) = net("baddbmm"), batch()
    sites = fg.find_sites(model, x)
    plan = fg.plan(model, {"0": 3}, sites=sites)
    assert plan.flops == tuple(2.0 * MEMBERS * width * (INS + OUTS) for width in (HIDDEN, HIDDEN + 3))
    grown = copy.deepcopy(model)
    fg.grow(grown, {"0": 3}, fg.how.ZeroOutgoing(), sites=sites)
    assert plan.parameters[1] == sum(p.numel() for p in grown.parameters())


def test_a_diverged_batch_is_told_by_name() -> None:
    model, (x, y) = net("baddbmm"), batch()
    with pytest.raises(fg.GrowthError, match="'2'.*not finite"):
        fg.grow(
            model,
            {"0": 1},
            sites=fg.find_sites(model, x),
            closure=lambda: each_loss(model(x), y).sum() * float("inf"),
        )


def test_gradient_norms_are_per_sample_and_over_all_members() -> None:
    """NAGN^2 of a stack is the mean of its members'."""
    model, (x, y) = net("baddbmm"), batch()
    alone = [member(model, number) for number in range(MEMBERS)]
    with fg.observe(model, fg.find_sites(model, x), growth=False) as seen:
        each_loss(model(x), y).sum().backward()
    assert seen.samples == BATCH
    found = []
    for number, single in enumerate(alone):
        with fg.observe(single, fg.find_sites(single, x[number]), growth=False) as one:
            F.mse_loss(single(x[number]), y[number]).backward()
        found.append(one.nagn)
    for name in ("0", "2"):
        mean = sum(each[name] ** 2 for each in found) / MEMBERS
        assert seen.nagn[name] == pytest.approx(mean**0.5, rel=1e-12)


def test_float32_finds_the_same_directions_at_any_scale_of_the_loss() -> None:
    model, (x, y) = net("baddbmm"), batch()
    sites = fg.find_sites(model, x)
    with fg.observe(model, sites, nagn=False) as seen:
        each_loss(model(x), y).sum().backward()
    truth = seen.directions(2)["0"]
    single = copy.deepcopy(model).float()
    for scale in (1.0, 1e-25, 1e12):
        with fg.observe(single, sites, nagn=False, loss_scale=scale) as narrow:
            (scale * each_loss(single(x.float()), y.float()).sum()).backward()
        found = narrow.directions(2)["0"]
        # a direction turns by the matrix's error over the gap between its values
        assert_close(found.values, truth.values, torch.float32, BATCH * HIDDEN)
        assert_close(found.left, truth.left, torch.float32, 100 * BATCH * HIDDEN)
        assert_close(found.right, truth.right, torch.float32, 100 * BATCH * HIDDEN)


def test_groups_of_a_convolution_take_their_own_norms() -> None:
    """Growing a grouped convolution is growing each group as a convolution of its own."""
    torch.manual_seed(6)
    groups = [nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3)).double() for _ in range(2)]
    with torch.no_grad():
        groups[1][2].weight.mul_(7)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv2d(6, 8, 3, groups=2)).double()
    with torch.no_grad():
        for at in (0, 2):
            model[at].weight.copy_(torch.cat([group[at].weight for group in groups]))
            model[at].bias.copy_(torch.cat([group[at].bias for group in groups]))
    x = torch.randn(2, 4, 7, 7).double()
    target = torch.randn(2, 8, 3, 3).double()
    fg.grow(model, {"0": 2}, sites=fg.find_sites(model, x), closure=lambda: (model(x) - target).square().sum())
    for number, group in enumerate(groups):
        mine, wanted = x[:, 2 * number : 2 * number + 2], target[:, 4 * number : 4 * number + 4]
        fg.grow(group, {"0": 1}, closure=lambda g=group, a=mine, b=wanted: (g(a) - b).square().sum())
        new = model[2].weight.detach()[4 * number : 4 * number + 4, 3]
        assert_close(new.norm(), group[2].weight.detach()[:, 3].norm(), torch.float64, 100)
        # block Krylov until 0.999 of the norm is captured
        assert (new * group[2].weight.detach()[:, 3]).sum().abs() >= 0.99 * new.norm() ** 2


@pytest.mark.parametrize("after", ["0", "1", "2"])
def test_no_layer_is_inserted_between_the_members(after: str) -> None:
    model, (x, _) = net("baddbmm"), batch()
    with pytest.raises(fg.GrowthError, match="for each of several members"):
        fg.insert_layer(model, after, before="2" if after == "1" else None, example_inputs=x)
    assert [type(layer) for layer in model] == [Stack, nn.Tanh, Stack]


class Query(nn.Module):
    """A parameter of three dimensions that is broadcast over the batch is no stack."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 2, HIDDEN))
        self.first, self.last = nn.Linear(INS, HIDDEN), nn.Linear(HIDDEN, OUTS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.softmax(self.query @ h.mT, -1) @ h)


def test_a_broadcast_parameter_is_no_stack() -> None:
    sites = fg.find_sites(Query(), torch.randn(4, 7, INS))
    assert not len(sites)
    assert "query" not in sites.layers


def test_llama4_experts_grow_as_they_are_written() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama4 import modeling_llama4

    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        hidden_size=16,
        intermediate_size=12,
        intermediate_size_mlp=20,
        num_local_experts=3,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=50,
        moe_layers=[0, 1],
        pad_token_id=0,
    )
    experts = modeling_llama4.Llama4TextExperts(config).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, target = torch.randn(3 * 6, 16).double(), torch.randn(3 * 6, 16).double()
    (site,) = sites = fg.find_sites(experts, x)
    assert (site.separate, site.gates) == (True, (fg.sites.site.Gate("gate_up_proj", 0, 2),))
    before = experts(x)
    optimizer = torch.optim.SGD(experts.parameters(), lr=1.0)
    report = fg.grow(
        experts, {site.name: 4}, sites=sites, optimizer=optimizer, closure=lambda: F.mse_loss(experts(x), target)
    )
    assert (experts.intermediate_size, experts.expert_dim) == (16, 16)
    assert_close(experts(x), before, torch.float64, 16)
    F.mse_loss(experts(x), target).backward()
    gate, up = experts.gate_up_proj.grad[..., 12:16], experts.gate_up_proj.grad[..., 28:]
    assert not gate.any()
    assert (up.norm(dim=1) > 0).all()
    assert report.sites[0].predicted_gain == pytest.approx(up.square().sum().item(), rel=1e-6)

    model = transformers.Llama4ForCausalLM(config).eval()
    tokens = torch.randint(1, 50, (2, 8))
    inputs = {"input_ids": tokens, "use_cache": False}
    sites = fg.find_sites(model, inputs)
    stream = sites["model.embed_tokens"]
    assert {"model.layers.0.feed_forward.experts.down_proj"} <= set(stream.producers)
    before = model(**inputs).logits
    with pytest.warns(UserWarning, match="config"):
        fg.grow(model, {s.name: 2 for s in sites}, sites=sites, closure=lambda: model(**inputs, labels=tokens).loss)
    assert model.model.layers[0].feed_forward.experts.gate_up_proj.shape == (3, 18, 28)
    bound = 64 * torch.finfo(torch.float32).eps * before.abs().max().item()
    assert (model(**inputs).logits - before).abs().max().item() <= bound


def grown_by(rank: int | None) -> dict[str, Tensor]:
    """The stack's tensors after growing by GradMax: of all samples, or of one rank's share of them."""
    model, (x, y) = net("baddbmm"), batch()
    sites = fg.find_sites(model, x)
    cut = slice(None) if rank is None else (slice(0, 4), slice(4, BATCH))[rank]
    called: nn.Module = model if rank is None else DDP(model)
    fg.grow(called, {"0": 2}, sites=sites, closure=lambda: each_loss(called(x[:, cut]), y[:, cut]).sum())
    return dict(model.state_dict())


def work(rank: int, folder: str) -> None:
    with joined(rank, folder) as path:
        torch.save({"grown": grown_by(rank)}, path / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[dict[str, dict[str, Tensor]]]]:
    yield from found_by(work)


def test_ranks_with_shares_of_the_samples_grow_as_one_process(ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    assert len(ranks) == WORLD
    assert_same_bits(ranks)
    for name, tensor in grown_by(None).items():
        assert_close(ranks[0]["grown"][name], tensor, torch.float64, BATCH * HIDDEN)
