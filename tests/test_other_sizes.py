"""Sites solved on batches of other sizes than the example inputs': what sites found with those very inputs give."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gloo import found_by, joined
from tolerances import tolerance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import fastgrow as fg

os.environ["HF_HUB_OFFLINE"] = "1"

Inputs = dict[str, Tensor]
FOUND_WITH = (2, 8)  # samples, length
OTHERS = [(8, 8), (2, 6), (5, 3), (1, 8), (3, 1)]


class Attention(nn.Module):
    """Written by hand, with its mask made in the forward pass."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.num_heads, self.head, self.fused = 2, 8, fused

    def forward(self, x: Tensor, pad: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (layer(x).view(batch, length, -1, self.head).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(batch, 1, length, length)
        if pad is not None:
            mask = mask & pad[:, None, None, :]
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.transpose(-1, -2) / self.head**0.5
            y = scores.masked_fill(~mask, -1e9).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))


class Causal(nn.Module):
    """Its branch is weighted by positions that are counted in the forward pass."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.inner, self.attention = nn.Linear(5, 16), Attention(fused)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        h = self.inner(x)
        h = h + self.attention(h, pad)
        positions = torch.arange(1, 1 + x.shape[1]) / x.shape[1]
        h = h + self.down(F.gelu(self.up(h)) * positions[None, :, None])
        return self.head(h.mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.inner, self.body = nn.Linear(5, 16), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        blocked = None if pad is None else torch.zeros(pad.shape).masked_fill(~pad, -torch.inf)
        return self.head(self.body(self.inner(x), mask=mask, src_key_padding_mask=blocked).mean(1))


def vectors(size: tuple[int, int], masked: bool) -> Inputs:
    samples, length = size
    generator = torch.Generator().manual_seed(samples)
    x: Inputs = {"x": torch.randn(samples, length, 5, generator=generator)}
    if masked:
        x["pad"] = lengths(size)
    return x


def lengths(size: tuple[int, int]) -> Tensor:
    """Which positions are words: every second sample lacks its last third."""
    samples, length = size
    words = torch.where(torch.arange(samples) % 2 == 0, length - length // 3, length)
    return torch.arange(length)[None] < words[:, None]


def words(size: tuple[int, int], masked: bool) -> Inputs:
    ids = torch.randint(0, 40, size, generator=torch.Generator().manual_seed(size[0]))
    return {"input_ids": ids, **({"attention_mask": lengths(size).long()} if masked else {})}


def images(size: tuple[int, int], masked: bool) -> Inputs:
    return {"pixel_values": torch.randn(size[0], 1, 8, 8, generator=torch.Generator().manual_seed(size[0]))}


def hugging_face(kind: str, attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the extra 'test' installs it")
    transformers.logging.set_verbosity_error()
    common = {"num_labels": 3, "attn_implementation": attention}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
    text = {"vocab_size": 40, "max_position_embeddings": 32}
    match kind:
        case "bert":
            config = transformers.BertConfig(**small, **text, **common, num_attention_heads=2)
            return transformers.BertForSequenceClassification(config)
        case "gpt2":
            options = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(**options, **common, use_cache=False))
        case "llama":
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **text, **common, **heads))
        case "vit":
            picture = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_attention_heads": 2}
            return transformers.ViTForImageClassification(transformers.ViTConfig(**small, **picture, **common))
    raise AssertionError(kind)


Case = tuple[Callable[[], nn.Module], Callable[[tuple[int, int], bool], Inputs]]
CASES: dict[str, Case] = {
    f"{kind} {attention}": (lambda kind=kind, attention=attention: hugging_face(kind, attention), inputs)
    for kind, inputs in (("bert", words), ("gpt2", words), ("llama", words), ("vit", images))
    for attention in ("sdpa", "eager")
}
CASES["by hand fused"] = (lambda: Causal(True), vectors)
CASES["by hand"] = (lambda: Causal(False), vectors)
CASES["torch's encoder"] = (Encoder, vectors)


def built(case: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case][0]().eval()


def inner_sites(model: nn.Module, inputs: Inputs) -> fg.Sites:
    """Heads, and what lies on both sides of an activation."""
    sites = fg.find_sites(model, inputs)
    inner = [site.name for site in sites if site.heads or site.activations]
    assert {sites[name].heads for name in inner} == {True, False}
    return sites.without({site.name: "it is the residual stream" for site in sites if site.name not in inner})


def loss_of(model: nn.Module, inputs: Inputs) -> Tensor:
    output = model(**inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    return (logits * torch.linspace(-1, 1, logits.numel()).reshape(logits.shape).sin()).square().mean()


def directions(model: nn.Module, sites: fg.Sites, *batches: Inputs) -> dict[str, fg.Directions]:
    torch.manual_seed(3)  # queries and keys of new heads are drawn
    with fg.observe(model, sites, rank=2) as seen:
        for inputs in batches:
            loss_of(model, inputs).backward()
    return seen.all_directions()


def assert_same(found: dict[str, fg.Directions], wanted: dict[str, fg.Directions]) -> None:
    assert found.keys() == wanted.keys()
    for name, each in wanted.items():
        assert float(each.values[0]) > 0, name
        one = found[name]
        for a, b in ((one.left, each.left), (one.values, each.values), (one.right, each.right)):
            assert torch.equal(a, b), name  # the same ops on the same numbers


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each export of a model."""
    made: list[Any] = []
    plain = torch.export.export

    def counting(*args: Any, **kwargs: Any) -> Any:
        made.append(args[0])
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counting)
    return made


@pytest.mark.parametrize(
    ("case", "masked"),
    [
        (case, masked)
        for case, (_, inputs) in CASES.items()
        for masked in (False, True)
        if inputs is not images or not masked
    ],
)
def test_directions_are_those_of_sites_found_at_the_batch_size(case: str, masked: bool) -> None:
    _, inputs = CASES[case]
    model = built(case)
    sites = inner_sites(model, inputs(FOUND_WITH, masked))
    for size in OTHERS if case == "by hand" else OTHERS[2:3] if "eager" in case else OTHERS[:2]:
        batch = inputs(size, masked)
        assert_same(directions(model, sites, batch), directions(model, inner_sites(model, batch), batch))


def test_batches_of_several_sizes_add_up() -> None:
    model = built("by hand")
    batches = [vectors(size, True) for size in (FOUND_WITH, (3, 8), (2, 5))]
    sites = fg.find_sites(model, batches[0], include="up")
    found = directions(model, sites, *batches)["up"]
    total = 0.0
    for batch in batches:
        own = fg.find_sites(model, batch, include="up")
        with fg.observe(model, own, rank=16, nagn=False) as seen:
            loss_of(model, batch).backward()
        one = seen.directions(16)["up"]
        share = len(batch["x"]) / sum(len(each["x"]) for each in batches)
        total = total + share * one.left @ one.values.diag() @ one.right.T
    values = torch.linalg.svdvals(total)[:2]
    bound = tolerance(torch.float32, 16 * 24) * float(values[0])
    assert float((found.values - values).abs().max()) <= bound


def test_a_size_is_traced_once_and_agreeing_ones_never(exports: list[Any]) -> None:
    model = built("by hand")
    sites = fg.find_sites(model, vectors(FOUND_WITH, True))
    exports.clear()
    directions(model, sites, vectors(FOUND_WITH, True))
    assert not exports
    for size in ((3, 8), (3, 8), (2, 5), (3, 8)):
        directions(model, sites, vectors(size, True))
    assert len(exports) == 2
    assert all(each is model for each in exports)


def test_convolutions_take_any_number_of_samples_without_tracing(exports: list[Any]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = (nn.Conv2d(c, 6, 3, padding=1) for c in (2, 6, 6))
            self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.norm(self.stem(x)))
            h = F.max_pool2d(F.relu(h + self.b(F.relu(self.a(h)))), 2)
            return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))

    torch.manual_seed(0)
    model, x = Block(), torch.randn(7, 2, 6, 6)
    sites, own = fg.find_sites(model, x[:3]), fg.find_sites(model, x)
    exports.clear()
    assert_same(directions(model, sites, {"x": x}), directions(model, own, {"x": x}))
    assert not exports


def test_an_argument_that_the_example_inputs_lack_is_seen_by_attention() -> None:
    for case in ("bert sdpa", "by hand"):
        inputs = CASES[case][1]
        model, batch = built(case), inputs(FOUND_WITH, True)
        without = inner_sites(model, inputs(FOUND_WITH, False))
        assert_same(directions(model, without, batch), directions(model, inner_sites(model, batch), batch))


def test_what_was_traced_serves_the_grown_model(exports: list[Any]) -> None:
    model, batch = built("llama sdpa"), words((3, 5), True)
    sites = inner_sites(model, words(FOUND_WITH, True))
    for name in (site.name for site in sites):
        units = {name: sites[name].multiple}
        fg.grow(model, units, sites=sites, closure=lambda: loss_of(model, batch))
    with torch.no_grad():
        for parameter in model.parameters():  # new units start at zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    exports.clear()
    found = directions(model, sites, batch)
    assert not exports
    assert_same(found, directions(model, inner_sites(model, batch), batch))


@pytest.mark.parametrize("how", ["GradMaxOpt", "TINY", "Splitting", "GradMax"])
def test_every_method_that_replays_takes_other_sizes(how: str) -> None:
    grown = []
    for size in (FOUND_WITH, (3, 5)):
        model, batch = built("gpt2 sdpa"), words((3, 5), True)
        sites = fg.find_sites(model, words(size, True), include="*.mlp.c_fc")
        torch.manual_seed(5)
        fg.grow(model, {sites[0].name: 2}, getattr(fg.how, how)(), sites=sites, closure=lambda: loss_of(model, batch))  # noqa: B023
        grown.append(model.state_dict())
    for name, value in grown[0].items():
        assert torch.equal(value, grown[1][name]), name


def test_the_model_is_left_as_it_was() -> None:
    model, batch = built("by hand").train(), vectors((3, 5), True)
    sites = fg.find_sites(model, vectors(FOUND_WITH, True), include="up")
    called: list[bool] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: called.append(True))
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with fg.observe(model, sites, rank=1) as seen:
        loss_of(model, batch).backward()
        once, drawn = len(called), torch.get_rng_state()
    assert seen.all_directions()
    assert len(called) == once
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_autocast_at_other_sizes() -> None:
    model, batch = built("by hand fused"), vectors((3, 5), True)
    results = []
    for size in (FOUND_WITH, (3, 5)):
        sites = fg.find_sites(model, vectors(size, True), include=("attention.q", "up"))
        low = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16), fg.observe(model, sites, rank=2) as seen:
            loss_of(model, low).float().backward()
        results.append(seen.all_directions())
    assert_same(*results)


class Scaled(nn.Module):
    """Divides by the number of samples: a number or a tensor in the graph; between layers, or stacks of them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.first, self.second = nn.Parameter(torch.randn(4, 5, 8)), nn.Parameter(torch.randn(4, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "stack":
            h = torch.einsum("ngi,gio->ngo", x[:, None].expand(-1, 4, -1), self.first)
            return torch.einsum("ngi,gio->ngo", F.relu(h) / len(x), self.second)
        h = F.gelu(self.a(x))
        return self.b(h / len(x) if self.how == "number" else h * torch.tensor([1.0 / len(x)]))


@pytest.mark.parametrize("how", ["number", "tensor", "stack"])
def test_numbers_computed_from_the_batch_size(how: str) -> None:
    torch.manual_seed(0)
    model, x = Scaled(how), torch.randn(7, 5)
    sites, own = fg.find_sites(model, x[:3]), fg.find_sites(model, x)
    found, wanted = (directions(model, each, {"x": x}) for each in (sites, own))
    assert found.keys() == wanted.keys()
    for name, each in wanted.items():
        bound = tolerance(torch.float32, 7 * 8) * float(each.values[0])
        assert float((found[name].values - each.values).abs().max()) <= bound


class Choosy(nn.Module):
    """Looks at values, which no export follows, when a batch has not the usual size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * torch.arange(len(x))[:, None]
        if len(x) != 4 and bool(h.sum() > 1e9):
            h = h * 2
        return self.b(h)


@pytest.mark.parametrize("inside", [False, True], ids=["at the end", "in the backward pass"])
def test_a_size_that_cannot_be_traced_is_refused_by_name(inside: bool) -> None:
    model = Choosy()
    sites = fg.find_sites(model, torch.randn(4, 5))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with (
        pytest.raises(fg.GrowthError, match=r"'a'.*x \(4, 5\).*x \(3, 5\).*drop_last"),
        fg.observe(model, sites) as seen,
    ):
        seen.backward(model(torch.randn(3, 5)).square().mean(), last=inside)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert directions(model, sites, {"x": torch.randn(4, 5)})


def test_a_sketch_over_batches_of_other_sizes() -> None:
    model = built("by hand")
    batches = [vectors(size, True) for size in ((3, 8), (2, 5), (4, 6))]
    found = []
    for size in (FOUND_WITH, (3, 8)):
        sites = fg.find_sites(model, vectors(size, True), include="up")
        torch.manual_seed(3)
        with fg.observe(model, sites, rank=2, growth="sketch") as seen:
            for batch in batches:
                loss_of(model, batch).backward()
        found.append(seen.all_directions())
    assert_same(*found)


def test_a_loop_grows_on_its_smaller_last_batch() -> None:
    torch.manual_seed(0)
    model = Causal(True)
    x, y = torch.randn(11, 6, 5), torch.randint(0, 3, (11,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    grower = fg.Grower(
        model,
        optimizer,
        example_inputs=x[:4],
        when=fg.when.Every(3, times=1),
        where=fg.where.Everywhere(units={"attention.q": 1, "up": 2}),
    )
    for rows in (slice(0, 4), slice(4, 8), slice(8, 11), slice(0, 4)):
        with grower.observe():
            F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
    (report,) = grower.history
    assert report.step == 3
    assert model.attention.num_heads == 3
    assert model.up.out_features == 26


def ranks_grow(rank: int | None) -> Inputs:
    """Rank 0 has five samples, rank 1 three: none has as many as the sites were found with."""
    model = built("by hand").double()
    batch = {name: v.double() if v.is_floating_point() else v for name, v in vectors((8, 5), True).items()}
    mine = {None: slice(None), 0: slice(0, 5), 1: slice(5, 8)}[rank]
    example = {name: v.double() if v.is_floating_point() else v for name, v in vectors(FOUND_WITH, True).items()}
    sites = fg.find_sites(model, example, include=("attention.q", "up"))
    called = model if rank is None else DDP(model)

    def closure() -> Tensor:
        # each rank's mean over its own samples; the ranks' losses are averaged
        output = called(**{name: value[mine] for name, value in batch.items()})
        weight = 1.0 if rank is None else len(output) * 2 / 8
        return output.square().mean() * weight

    torch.manual_seed(9)
    fg.grow(called, {"attention.q": 1, "up": 2}, sites=sites, closure=closure)
    return model.state_dict()


def worker(rank: int, folder: str) -> None:
    with joined(rank, folder) as path:
        torch.save(ranks_grow(rank), path / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[Inputs]]:
    yield from found_by(worker)


def test_ranks_with_batches_of_their_own_sizes_agree(ranks: list[Inputs]) -> None:
    one, two = ranks
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_hugging_face_trainer_grows_heads_on_the_last_batch(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra 'test' installs it")
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")
    from fastgrow.integrations.transformers import GrowCallback

    model, ids = built("bert sdpa").train(), torch.randint(0, 40, (11, 6))
    rows = [{"input_ids": each, "labels": each[0] % 3} for each in ids]
    callback = GrowCallback(when=fg.when.Every(3, times=1), where=fg.where.Everywhere(units=1), include="*.query")
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=4, seed=0, **options
    )
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert [report.step for report in callback.grower.history] == [3]
    assert model.bert.encoder.layer[0].attention.self.num_attention_heads == 3
