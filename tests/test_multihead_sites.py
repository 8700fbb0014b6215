"""`fastgrow.nn.MultiheadAttention` computes what torch's does, and discovery sees its heads."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from multihead_cases import CASES, HEADS, E, heads_of
from nets import Blank
from tolerances import assert_close
from torch import Tensor, nn

import fastgrow as fg


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
