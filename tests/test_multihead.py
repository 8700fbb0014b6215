"""Torch's multi-head attention and its transformer layers, unmodified: their heads grow."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Blank, incoming_gradients, probe
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow.layout import new_positions
from fastgrow.sites import Site, Sites, tensors_of

E, HEADS = 8, 2


class Wrapped(nn.Module):
    """One attention module between an embedding of its inputs and a readout, called as `call` says."""

    def __init__(self, call: str = "self", need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.kdim, self.vdim = options.get("kdim") or E, options.get("vdim") or E
        self.attention = nn.MultiheadAttention(E, HEADS, **options)
        self.read = nn.Linear(E, 3)
        self.call, self.need_weights = call, need_weights
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)

    def inputs(self, samples: int = 4) -> tuple[Tensor, ...]:
        def sequence(length: int, width: int) -> Tensor:
            shape = (samples, length, width) if self.attention.batch_first else (length, samples, width)
            return torch.randn(shape)

        if self.call == "self":
            return (sequence(5, E),)
        if self.call == "unbatched":
            return torch.randn(5, E), torch.randn(6, E)
        if self.call == "cross":
            return sequence(5, E), sequence(6, E)
        return sequence(5, E), sequence(6, self.kdim), sequence(6, self.vdim)

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        key = query if key is None else key
        value = key if value is None else value
        attended, _ = self.attention(query, key, value, need_weights=self.need_weights)
        return self.read(torch.tanh(attended) if attended.shape != query.shape else attended + query)


CASES: dict[str, Callable[[], Wrapped]] = {
    "self": lambda: Wrapped(batch_first=True),
    "sequence-first": lambda: Wrapped(),
    "weights": lambda: Wrapped(batch_first=True, need_weights=True),
    "no-bias": lambda: Wrapped(batch_first=True, bias=False),
    "cross": lambda: Wrapped("cross", batch_first=True),
    "three": lambda: Wrapped("three"),
    "sizes": lambda: Wrapped("three", batch_first=True, kdim=6, vdim=7),
    "sizes-weights": lambda: Wrapped("three", kdim=6, vdim=7, need_weights=True),
    "bias-row": lambda: Wrapped("cross", batch_first=True, add_bias_kv=True),
    "zero-row": lambda: Wrapped("cross", add_zero_attn=True, need_weights=True),
    "both-rows": lambda: Wrapped("three", add_bias_kv=True, add_zero_attn=True, kdim=6, vdim=7),
    "unbatched": lambda: Wrapped("unbatched"),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def heads_of(sites: Sites) -> Site:
    (site,) = [site for site in sites if site.heads]
    return site


def loss_on(model: nn.Module, *inputs: Any) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        output = model(*inputs)
        target = torch.arange(output.numel()).reshape(output.shape).sin()
        return (output - target).square().mean()

    return loss


# -- the module ----------------------------------------------------------------------------------------


def masks(kind: str, *shape: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "float":
        return torch.randn(shape)
    mask = torch.rand(shape) > 0.5
    mask[..., 0] = False
    return mask


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("attn_mask", ["none", "bool", "float", "by-head"])
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
def test_forward_is_torchs(case: str, attn_mask: str, padding: str) -> None:
    """Outputs, averaged and separate weights, and the dropout drawn, in training and evaluation mode."""
    model = CASES[case]()
    theirs = model.attention
    theirs.dropout = 0.3
    ours = fg.nn.twin(theirs)
    assert type(ours) is fg.nn.MultiheadAttention
    query, *rest = model.inputs()
    key = rest[0] if rest else query
    value = rest[1] if len(rest) > 1 else key
    batched, first = query.dim() == 3, theirs.batch_first
    length, keys = (query.shape[1], key.shape[1]) if batched and first else (query.shape[0], key.shape[0])
    samples = (query.shape[0] if first else query.shape[1]) if batched else 1
    shape = (samples * HEADS, length, keys) if attn_mask == "by-head" else (length, keys)
    options = {
        "attn_mask": masks("bool" if attn_mask == "by-head" else attn_mask, *shape),
        "key_padding_mask": masks(padding, *([samples, keys] if batched else [keys])),
    }
    for training, need_weights, average in itertools.product((True, False), (True, False), (True, False)):
        theirs.train(training)
        ours.train(training)
        results = []
        for module in (theirs, ours):
            torch.manual_seed(1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of masks of two types
                results.append(
                    module(query, key, value, need_weights=need_weights, average_attn_weights=average, **options)
                )
        (expected, expected_weights), (output, weights) = results
        assert_close(output, expected, torch.float32, 64)
        assert (weights is None) == (expected_weights is None)
        if weights is not None:
            assert_close(weights, expected_weights, torch.float32, 64)


@pytest.mark.parametrize("need_weights", [False, True])
def test_rows_that_are_masked_throughout(need_weights: bool) -> None:
    theirs = nn.MultiheadAttention(E, HEADS, batch_first=True)
    ours = fg.nn.twin(theirs)
    assert ours is not None
    x = torch.randn(3, 4, E)
    padding = torch.zeros(3, 4, dtype=torch.bool)
    padding[1] = True
    expected, _ = theirs(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    output, _ = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(output.isnan(), expected.isnan())
    assert_close(output.nan_to_num(), expected.nan_to_num(), torch.float32, 64)


def test_causal_hint_and_its_error() -> None:
    theirs = nn.MultiheadAttention(E, HEADS, batch_first=True, dropout=0.2)
    ours = fg.nn.twin(theirs)
    assert ours is not None
    x, mask = torch.randn(3, 4, E), nn.Transformer.generate_square_subsequent_mask(4)
    padding = torch.tensor([[False] * 4, [False, False, True, True], [False] * 4])
    for options in ({"need_weights": False}, {}, {"key_padding_mask": padding, "need_weights": False}):
        results = []
        for module in (theirs, ours):
            torch.manual_seed(1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(module(x, x, x, attn_mask=mask, is_causal=True, **options)[0])
        assert_close(results[1], results[0], torch.float32, 64)
    for module in (theirs, ours):
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            module(x, x, x, is_causal=True)
        with pytest.raises(RuntimeError, match="2D attn_mask"):  # would broadcast
            module(x, x, x, attn_mask=mask[:1])
        with pytest.raises(AssertionError, match="key_pad"):
            module(x, x, x, key_padding_mask=padding[:, :1])


def test_built_on_its_own() -> None:
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(E, HEADS, kdim=6, add_bias_kv=True)
    torch.manual_seed(3)
    ours = fg.nn.MultiheadAttention(E, HEADS, kdim=6, add_bias_kv=True)
    assert isinstance(ours, nn.MultiheadAttention)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert fg.nn.MultiheadAttention(E, HEADS).in_proj_weight.shape == (3 * E, E)


def test_grown_without_a_module_around_it() -> None:
    query = torch.randn(4, 2, E)
    inputs = {"query": query, "key": query, "value": query, "need_weights": False}
    sites = fg.find_sites(nn.MultiheadAttention(E, HEADS), inputs)
    with pytest.raises(fg.GrowthError, match="the model itself is a torch.nn.MultiheadAttention"):
        fg.grow(nn.MultiheadAttention(E, HEADS), {"in_proj_weight": 1}, Blank(), sites=sites)
    ours = fg.nn.MultiheadAttention(E, HEADS)
    before = ours(**inputs)[0]
    fg.grow(ours, {"in_proj_weight": 1}, sites=sites, closure=lambda: ours(**inputs)[0].square().mean())
    assert ours.num_heads == HEADS + 1
    assert_close(ours(**inputs)[0], before, torch.float32, 64)


# -- discovery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(CASES))
def test_heads_are_found(case: str) -> None:
    model = CASES[case]()
    sites = fg.find_sites(model, model.inputs())
    site = heads_of(sites)
    separate = "sizes" in case or case == "both-rows"
    if separate:
        assert site.producers == tuple(f"attention.{part}_proj_weight" for part in "qkv")
        assert {gate.layer for gate in site.gates} == {"attention.q_proj_weight", "attention.k_proj_weight"}
    else:
        assert site.producers == ("attention.in_proj_weight",)
        assert {(gate.part, gate.parts) for gate in site.gates} == {(0, 3), (1, 3)}
    assert (site.width, site.multiple, site.consumers) == (HEADS, 1, ("attention.out_proj",))
    assert set(sites.layers) == {*site.producers, "attention.out_proj", "read"}
    assert type(model.attention) is nn.MultiheadAttention
    assert torch.backends.mha.get_fastpath_enabled()


def test_most_layers_of_the_transformer_layers_lie_on_sites() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            self.transformer = nn.Transformer(16, 4, 2, 2, 24, batch_first=True)
            self.out = nn.Linear(16, 11)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
            return self.out(self.transformer(self.embed(source), self.embed(target), tgt_mask=mask))

    model = Model()
    sites = fg.find_sites(model, (torch.randint(0, 11, (2, 5)), torch.randint(0, 11, (2, 4))))
    on_sites = {layer for site in sites for layer in site.layers}
    assert len(on_sites & set(sites.layers)) >= 0.9 * len(sites.layers)
    assert len([site for site in sites if site.heads]) == 2 + 2 * 2
    assert len(sites.layers) == 2 * 4 + 2 * 6 + 1


def test_what_cannot_grow_says_why() -> None:
    class Returned(nn.Module):
        def __init__(self, average: bool) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(E, HEADS)
            self.average = average

        def forward(self, x: Tensor) -> Any:
            return self.attention(x, x, x, average_attn_weights=self.average)

    name = "attention.in_proj_weight"
    assert "mean runs along it" in fg.find_sites(Returned(True), torch.randn(4, 2, E)).frozen[name]
    assert "output" in fg.find_sites(Returned(False), torch.randn(4, 2, E)).frozen[name]

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    sites = fg.find_sites(Masked(), (torch.randn(3, 4, E), torch.randn(3 * HEADS, 4, 4)))
    assert "the attention mask has a part for each head" in sites.frozen[name]

    class Alibi(Masked):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x, mask.repeat_interleave(self.attention.num_heads, 0))

    sites = fg.find_sites(Alibi(), (torch.randn(3, 4, E), torch.randn(3, 4, 4)))
    assert "the attention mask has a part for each head" in sites.frozen[name]

    class Own(nn.MultiheadAttention):
        pass

    model = nn.TransformerEncoderLayer(E, HEADS, 12)
    model.self_attn = Own(E, HEADS)
    assert "self_attn.in_proj_weight" in fg.find_sites(model, torch.randn(4, 2, E)).frozen


# -- growth --------------------------------------------------------------------------------------------


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


def test_grown_heads_go_to_onnx(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnxruntime

    model = Wrapped(batch_first=True)
    x = model.inputs()[0]
    sites = fg.find_sites(model, x)
    fg.grow(model, {heads_of(sites).name: 1}, sites=sites, closure=loss_on(model, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fg.finalize(model).eval()
        torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(output), model(x).detach(), torch.float32, 256)


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
