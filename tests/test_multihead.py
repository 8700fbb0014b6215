"""Torch's multi-head attention and its transformer layers, unmodified: their heads grow."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from multihead_cases import CASES, HEADS, E, Wrapped, heads_of, loss_on
from nets import Blank, incoming_gradients, probe
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow.layout import new_positions
from fastgrow.sites import Site, Sites, tensors_of


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def head_matrix(model: nn.Module, sites: Sites, site: Site, old_width: int, loss_of: Callable[[], Tensor]) -> Tensor:
    """M of a grown model's only new head: its first value's gradient for every unit vector of its outgoing column."""
    slot = site.weight(site.consumers[0], "consumer")
    weight, sizes = tensors_of(model)[slot.tensor], sites.sizes(model)
    columns = new_positions(slot.layout, {**sizes, site.axis: old_width}, sizes)
    rows = []
    with torch.no_grad():
        kept = weight[:, columns].clone()
        weight[:, columns] = 0.0
    for out in range(weight.shape[0]):
        with torch.no_grad():
            weight[out, columns[0]] = 1.0
        model.zero_grad()
        loss_of().backward()
        gradient = incoming_gradients(model, sites, site, old_width)[0]
        rows.append(gradient[gradient != 0])
        with torch.no_grad():
            weight[out, columns[0]] = 0.0
    with torch.no_grad():
        weight[:, columns] = kept
    return torch.stack(rows)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", sorted(CASES))
def test_a_new_head_attains_the_optimum(case: str) -> None:
    """Against brute-force probing of the head's own map, whose queries and keys were drawn."""
    model = CASES[case]()
    inputs = model.inputs()
    sites = fg.find_sites(model, inputs)
    site, loss_of = heads_of(sites), loss_on(model, *inputs)
    before, output = loss_of().item(), model(*inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    report = fg.grow(model, {site.name: 1}, fg.how.GradMax(norm="fixed", scale=1.0), sites=sites, closure=loss_of)
    assert report.swapped == ["attention"]
    assert type(model.attention) is fg.nn.MultiheadAttention
    assert model.attention.num_heads == HEADS + 1
    assert_close(model(*inputs), output, torch.float64, 64)
    matrix = head_matrix(model, sites, site, HEADS, loss_of)
    model.zero_grad()
    loss_of().backward()
    gradient = incoming_gradients(model, sites, site, HEADS)
    attained = gradient.square().sum().item()
    slot = site.weight("attention.out_proj", "consumer")
    sizes = sites.sizes(model)
    new = model.attention.out_proj.weight[:, new_positions(slot.layout, {**sizes, site.axis: HEADS}, sizes)]
    size = new.square().sum(0)
    best = (torch.linalg.svdvals(matrix)[: E // HEADS].square() * size).sum().item()
    assert attained > 0
    assert attained >= 0.999**2 * best
    assert attained <= best * (1 + 1e-9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.step()
    assert loss_of().item() < before


@pytest.mark.usefixtures("double")
def test_layers_before_attention_are_solved_through_its_packed_weight() -> None:
    """The consumers' weight is called in slices, on two sequences."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = nn.Linear(3, E), nn.Linear(3, E)
            self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.attention(torch.tanh(self.near(x)), *[torch.tanh(self.far(y))] * 2, need_weights=False)[0]

    model, x, y = Model(), torch.randn(4, 3, 3), torch.randn(4, 5, 3)
    sites = fg.find_sites(model, (x, y))
    site = sites["near"]  # one width: they share the columns of the packed weight
    assert site.producers == ("near", "far")
    assert {rule.attribute for rule in site.attributes if rule.module == "attention"} == {"embed_dim", "kdim", "vdim"}
    with fg.observe(model, sites) as seen:
        loss_on(model, x, y)().backward()
    found = seen.directions(4)["near"]
    exact = torch.linalg.svdvals(probe(model, sites, site, lambda grown: loss_on(grown, x, y)()))
    assert exact[0] > 0
    torch.testing.assert_close(found.values, exact[:4], rtol=1e-9, atol=0)
    with pytest.raises(fg.GrowthError, match="slices of its weight"):
        fg.grow(model, {"near": 1}, fg.how.TINY(), sites=sites, closure=loss_on(model, x, y))


@pytest.mark.usefixtures("double")
def test_gradient_norms_of_the_parts() -> None:
    """Of the projections, one layer in two calls, and of the output, against hooks on the activations."""
    model = Wrapped("cross", batch_first=True)
    x, y = model.inputs()
    sites = fg.find_sites(model, (x, y))
    with fg.observe(model, sites, growth=False) as seen:
        loss_on(model, x, y)().backward()
    assert list(seen.nagn) == ["attention.in_proj_weight", "attention.out_proj", "read"]
    attention = model.attention
    q = F.linear(x, attention.in_proj_weight[:E], attention.in_proj_bias[:E])
    kv = F.linear(y, attention.in_proj_weight[E:], attention.in_proj_bias[E:])
    q, kv = (part.detach().requires_grad_() for part in (q, kv))
    heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, *kv.chunk(2, -1))]
    z = attention.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2))
    z.retain_grad()
    output = model.read(z + x)
    target = torch.arange(output.numel()).reshape(output.shape).sin()
    (output - target).square().mean().backward()
    n = len(x)
    for name, parts in {"attention.in_proj_weight": (q, kv), "attention.out_proj": (z,)}.items():
        total = sum(part.grad.square().sum() for part in parts)  # type: ignore[union-attr, misc]
        elements = sum(part.numel() for part in parts)
        assert seen.nagn[name] == pytest.approx((n**2 * total / elements).sqrt().item(), rel=1e-12)


@pytest.mark.parametrize(
    "how", [fg.how.Random(), fg.how.ZeroOutgoing(), fg.how.Net2Net(), fg.how.Firefly()], ids=lambda how: how.name
)
@pytest.mark.parametrize("case", ["self", "both-rows"])
def test_other_methods(how: fg.how.How, case: str) -> None:
    model = CASES[case]().eval()
    inputs = model.inputs()
    sites = fg.find_sites(model, inputs)
    before = model(*inputs)
    fg.grow(model, {heads_of(sites).name: 2}, how, sites=sites, closure=loss_on(model, *inputs))
    assert model.attention.num_heads == HEADS + 2
    after = model(*inputs)
    if how.name in ("ZeroOutgoing", "Net2Net"):
        assert_close(after, before, torch.float32, 64)
    assert torch.isfinite(after).all()


class Classifier(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(16, 3)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.out(self.encoder(self.embed(tokens), src_key_padding_mask=padding).mean(1))


def batch(samples: int = 4) -> tuple[Tensor, Tensor]:
    padding = torch.zeros(samples, 6, dtype=torch.bool)
    padding[0, 4:] = True
    padding[1, 1:] = True
    return torch.randint(0, 11, (samples, 6)), padding


def task(model: nn.Module, *inputs: Any) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(*inputs), torch.arange(len(inputs[0])) % 3)


@pytest.mark.parametrize("activation", ["relu", "module", "gelu"])
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
def test_fused_inference_is_left_where_heads_have_grown(activation: str, layers: tuple[int, ...]) -> None:
    """In evaluation without gradients torch nests padded batches and runs fused layers: outputs stay, padding too."""
    model = Classifier(activation=nn.ReLU() if activation == "module" else activation)
    inputs = batch()
    sites = fg.find_sites(model, inputs)
    slow = model.eval()(*inputs)
    with torch.no_grad():
        fused = model(*inputs)
    assert (slow - fused).abs().max() > 1e-3  # nested: padded positions read zero
    units = {f"encoder.layers.{i}.self_attn.in_proj_weight": 2 for i in layers}
    units |= {f"encoder.layers.{i}.linear1": 2 for i in layers}
    fg.grow(model, units, sites=sites, closure=task(model, *inputs))
    assert_close(model(*inputs), slow, torch.float32, 256)
    with torch.no_grad():
        assert_close(model(*inputs), fused, torch.float32, 256)
        alone = model.encoder(model.embed(inputs[0]), src_key_padding_mask=inputs[1])
    assert not alone[inputs[1]].any()


def test_nested_tensors_otherwise_are_refused() -> None:
    attention = fg.nn.MultiheadAttention(E, HEADS, batch_first=True)
    x = torch.nested.as_nested_tensor([torch.randn(3, E), torch.randn(2, E)])
    with pytest.raises(AssertionError, match="nested tensors for self-attention alone"):
        attention(x, x, x, need_weights=True)


def test_optimizer_state_and_copies_follow() -> None:
    model = Classifier(dropout=0.0)
    inputs = batch()
    ema = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        task(model, *inputs)().backward()
        optimizer.step()
    sites = fg.find_sites(model, inputs)
    name = "encoder.layers.1.self_attn.in_proj_weight"
    moment = optimizer.state[model.encoder.layers[1].self_attn.in_proj_weight]["exp_avg"]
    averaged, before = ema(*inputs), model(*inputs)
    old = ema.module.encoder.layers[1].self_attn.out_proj
    fg.grow(model, {name: 1}, sites=sites, optimizer=optimizer, also=[ema], closure=task(model, *inputs))
    attention = model.encoder.layers[1].self_attn
    copied = ema.module.encoder.layers[1].self_attn
    assert type(copied) is fg.nn.MultiheadAttention
    assert copied.out_proj is old  # its own, not another copy of the model's
    assert copied.in_proj_weight.shape == attention.in_proj_weight.shape == (60, 16)
    assert_close(model(*inputs), before, torch.float32, 256)
    assert torch.isfinite(ema(*inputs)).all()
    assert averaged.shape == ema(*inputs).shape
    grown = optimizer.state[attention.in_proj_weight]["exp_avg"].unflatten(0, (3, 20))
    assert torch.equal(grown[:, :16], moment.unflatten(0, (3, 16)))
    assert not grown[:, 16:].any()
    for _ in range(3):
        optimizer.zero_grad()
        task(model, *inputs)().backward()
        optimizer.step()
    assert attention.in_proj_weight[16:20].ne(0).all()


def test_checkpoints_swap_the_seeds_modules(tmp_path: Path) -> None:
    model, inputs = Classifier(dropout=0.0), batch()
    optimizer = torch.optim.AdamW(model.parameters())
    sites = fg.find_sites(model, inputs)
    name = "encoder.layers.0.self_attn.in_proj_weight"
    for _ in range(2):  # a second growth of the same site
        fg.grow(model, {name: 1}, sites=sites, optimizer=optimizer, closure=task(model, *inputs))
        task(model, *inputs)().backward()
        optimizer.step()
    fg.save(tmp_path / "grown.pt", model, optimizer)
    seed = Classifier(dropout=0.0)
    other = torch.optim.AdamW(seed.parameters())
    fg.load(tmp_path / "grown.pt", seed, other)
    assert type(seed.encoder.layers[0].self_attn) is fg.nn.MultiheadAttention
    assert type(seed.encoder.layers[1].self_attn) is nn.MultiheadAttention
    assert seed.encoder.layers[0].self_attn.num_heads == 6
    assert torch.equal(seed(*inputs), model(*inputs))
    for one, one_optimizer in ((model, optimizer), (seed, other)):
        one_optimizer.zero_grad()
        task(one, *inputs)().backward()
        one_optimizer.step()
    assert torch.equal(seed(*inputs), model(*inputs))
    with pytest.raises(fg.GrowthError, match="another architecture"):
        fg.load(tmp_path / "grown.pt", nn.Linear(3, 3))


def test_a_grown_model_is_copied_pickled_compiled_and_autocast() -> None:
    model, inputs = Classifier(dropout=0.0), batch()
    sites = fg.find_sites(model, inputs)
    name = "encoder.layers.0.self_attn.in_proj_weight"
    with torch.autocast("cpu", torch.bfloat16):
        fg.grow(model, {name: 1}, sites=sites, closure=task(model, *inputs))
        assert torch.isfinite(model(*inputs)).all()
    output = model(*inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*inputs), output)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(*inputs), output, torch.float32, 256)
    fg.grow(compiled, {name: 1}, sites=sites, closure=task(compiled, *inputs))
    assert model.encoder.layers[0].self_attn.num_heads == 6
    assert_close(compiled(*inputs), output, torch.float32, 256)


def test_the_width_of_the_stream_doubles_and_nothing_else() -> None:
    model, inputs = Classifier(dropout=0.0), batch()
    sites = fg.find_sites(model, inputs)
    before = model(*inputs)
    model.eval()
    with torch.no_grad():
        fused = model(*inputs)
    with pytest.raises(fg.GrowthError, match="multiples of 16"):
        fg.grow(model, {"embed": 4}, fg.how.Net2Net(), sites=sites)
    with pytest.raises(fg.GrowthError, match="mixes its channels"):
        fg.grow(model, {"embed": 16}, sites=sites, closure=task(model, *inputs))
    report = fg.grow(model, {"embed": 16}, fg.how.Net2Net(), sites=sites)
    assert report.swapped == [f"encoder.layers.{i}.self_attn" for i in (0, 1)]
    attention = model.encoder.layers[0].self_attn
    assert (attention.embed_dim, attention.kdim, attention.vdim, attention.num_heads) == (32, 32, 32, 4)
    assert attention.head_dim == 4
    with torch.no_grad():
        assert_close(model(*inputs), fused, torch.float32, 256)
    heads = {f"encoder.layers.{i}.self_attn.in_proj_weight": 4 for i in (0, 1)}
    fg.grow(model, heads, sites=sites, closure=task(model, *inputs))
    assert attention.fits_torch  # 8 heads of 4 channels: torch's kernels serve again
    with torch.no_grad():
        assert_close(model(*inputs), fused, torch.float32, 256)
    model.train()
    assert_close(model(*inputs), before, torch.float32, 256)
    fg.finalize(model)
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert_close(model(*inputs), before, torch.float32, 256)


def test_a_whole_transformers_width_doubles() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            self.transformer = nn.Transformer(16, 4, 1, 1, 24, 0.0, batch_first=True, norm_first=True)
            self.out = nn.Linear(16, 11)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            return self.out(self.transformer(self.embed(source), self.embed(target)))

    model, inputs = Model(), (torch.randint(0, 11, (2, 5)), torch.randint(0, 11, (2, 4)))
    sites = fg.find_sites(model, inputs)
    before = model(*inputs)
    fg.grow(model, {"embed": 16}, fg.how.Net2Net(), sites=sites)
    assert model.transformer.d_model == 32
    assert_close(model(*inputs), before, torch.float32, 256)


def test_finalize_names_what_torch_cannot_express() -> None:
    model, inputs = Classifier(dropout=0.0, activation=nn.ReLU()), batch()
    sites = fg.find_sites(model, inputs)
    units = {"encoder.layers.0.self_attn.in_proj_weight": 1, "encoder.layers.1.linear1": 2}
    fg.grow(model, units, sites=sites, closure=task(model, *inputs))
    output = model(*inputs)
    with pytest.warns(UserWarning, match="encoder.layers.0.self_attn: torch.nn.MultiheadAttention cannot have"):
        fg.finalize(model)
    assert type(model.encoder.layers[0].self_attn) is fg.nn.MultiheadAttention
    assert type(model.encoder.layers[1].activation) is nn.ReLU
    model.eval()
    expected = model(*inputs)
    assert_close(expected, output, torch.float32, 256)
    exported = torch.export.export(model, inputs)
    assert "fastgrow" not in str(exported.graph)
    assert_close(exported.module()(*inputs), expected, torch.float32, 256)


def test_a_batch_of_another_size() -> None:
    model = Classifier(dropout=0.0)
    sites = fg.find_sites(model, batch())
    other = batch(7)
    report = fg.grow(model, {site.name: 1 for site in sites if site.heads}, sites=sites, closure=task(model, *other))
    assert all(site.captured is not None and site.captured > 0.999 for site in report.sites)


@pytest.mark.parametrize("padded", [False, True])
def test_masked_models_grow(padded: bool) -> None:
    """A language model with a causal mask, which torch compares with a causal one value by value; padded samples."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True), 2)
            self.out = nn.Linear(16, 11)

        def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]).isinf()
            return self.out(self.encoder(self.embed(tokens), mask=mask, src_key_padding_mask=padding))

    model, (tokens, padding) = Model(), batch()
    padding[2] = True  # a sample without any token
    inputs = (tokens, padding) if padded else (tokens,)

    def loss() -> Tensor:
        output = model(*inputs)
        return F.cross_entropy(output[~padding], tokens[~padding])

    sites = fg.find_sites(model, inputs)
    before = model(*inputs)
    units = {site.name: 1 if site.heads else 2 for site in sites if not site.norms}
    assert len(units) == 4
    report = fg.grow(model, units, sites=sites, closure=loss)
    assert_close(model(*inputs), before, torch.float32, 256)
    assert all(site.captured is not None and site.captured > 0.999 for site in report.sites)


def test_a_grower_adds_heads_as_it_trains() -> None:
    model, inputs = Classifier(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sites = fg.find_sites(model, inputs, include="*.in_proj_weight")
    grower = fg.Grower(model, optimizer, sites=sites, when=fg.when.Every(2, times=2), where=fg.where.Everywhere(1))
    for _ in range(6):
        with grower.observe():
            task(model, *inputs)().backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
    assert len(grower.history) == 2
    assert {layer.self_attn.num_heads for layer in model.encoder.layers} == {6}


def test_watching_leaves_the_modules_as_they_were() -> None:
    model, inputs = Classifier(), batch()
    sites = fg.find_sites(model, inputs)
    attention = model.encoder.layers[0].self_attn
    heads = [site.name for site in sites if site.heads]
    with fg.observe(model, sites, growth=heads):
        assert isinstance(attention, fg.nn.MultiheadAttention)
        task(model, *inputs)().backward()
    assert type(attention) is nn.MultiheadAttention
    with pytest.raises(ZeroDivisionError), fg.observe(model, sites, growth=heads):
        raise ZeroDivisionError
    assert type(attention) is nn.MultiheadAttention
    with fg.observe(model, sites, growth=False):
        fg.grow(model, {"encoder.layers.1.self_attn.in_proj_weight": 1}, Blank(), sites=sites)
    assert type(model.encoder.layers[1].self_attn) is fg.nn.MultiheadAttention
    fg.grow(model, {"encoder.layers.0.linear1": 2}, Blank(), sites=sites)
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    fg.plan(model, {"encoder.layers.0.self_attn.in_proj_weight": 1}, sites=sites)


def test_flops_count_each_slice_once() -> None:
    model = Wrapped("cross", batch_first=True)
    inputs = model.inputs(1)
    sites = fg.find_sites(model, inputs)
    plan = fg.plan(model, {heads_of(sites).name: 1}, sites=sites)
    d = E // HEADS
    before = 2 * (5 * E * E + 6 * 2 * E * E + 5 * E * E + 5 * E * 3)
    assert plan.flops == (before, before + 2 * d * (5 * E + 6 * 2 * E + 5 * E))
