"""Unmodified models of the `transformers` library grow, keep their output and state, and train on."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="the extra 'test' installs it")

import fastgrow as fg  # noqa: E402

transformers.logging.set_verbosity_error()

Build = Callable[[], tuple[nn.Module, dict[str, Tensor]]]


def image(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, size, size)}


def words() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, (4, 7))}


def resnet(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type=kind, num_labels=3
    )
    return transformers.ResNetForImageClassification(config), image(32)


def mobilenet() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.MobileNetV1Config(depth_multiplier=0.25, num_labels=3, classifier_dropout_prob=0.0)
    return transformers.MobileNetV1ForImageClassification(config), image(64)


def convnext() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3, layer_scale_init_value=0.5
    )
    return transformers.ConvNextForImageClassification(config), image(32)


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config), image(16)


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config), words()


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(
        vocab_size=50,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_positions=16,
        use_cache=False,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config), words()


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config), words()


MODELS: dict[str, Build] = {
    "resnet-basic": lambda: resnet("basic"),
    "resnet-bottleneck": lambda: resnet("bottleneck"),
    "mobilenet": mobilenet,
    "convnext": convnext,
    "vit": vit,
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
}


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    logits = model(**inputs).logits
    if logits.dim() == 3:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])


@pytest.fixture(params=MODELS, scope="module")
def traced(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Tensor], fg.Sites]:
    torch.manual_seed(0)
    model, inputs = MODELS[request.param]()
    return model, inputs, fg.find_sites(model, inputs)


@pytest.fixture
def built(
    traced: tuple[nn.Module, dict[str, Tensor], fg.Sites],
) -> tuple[nn.Module, dict[str, Tensor], fg.Sites]:
    """A copy of its own for each test; the sites serve every copy."""
    model, inputs, sites = traced
    return copy.deepcopy(model), inputs, sites


def growing(sites: fg.Sites) -> dict[str, int]:
    """Two steps at every site that a LayerNorm does not tie to full duplication."""
    return {s.name: 2 * s.multiple for s in sites if not any(norm.kind == "layer_norm" for norm in s.norms)}


def test_layers_lie_on_sites_or_have_a_reason(built: tuple[nn.Module, dict[str, Tensor], fg.Sites]) -> None:
    model, _, sites = built
    kinds = (nn.Linear, nn.Conv2d, transformers.pytorch_utils.Conv1D)
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    assert layers
    on_sites = {layer for site in sites for layer in site.layers}
    assert len(on_sites.intersection(layers)) >= 0.9 * len(layers)
    for name in set(layers) - on_sites:
        assert sites.frozen[name], name


def test_grows_keeps_its_output_its_state_and_trains_on(
    built: tuple[nn.Module, dict[str, Tensor], fg.Sites],
) -> None:
    model, inputs, sites = built
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()
    model.eval()
    before = model(**inputs).logits.detach()
    model.train()
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    units = growing(sites)
    assert units
    report = fg.grow(model, units, sites=sites, optimizer=optimizer, closure=lambda: loss_of(model, inputs))
    assert sites.widths(model) == {s.name: s.width + units.get(s.name, 0) for s in sites}
    for site in report.sites:
        assert site.predicted_gain is not None
        assert site.predicted_gain > 0, site.name
        assert site.captured is not None
        assert site.captured >= 0.999, site.name
    model.eval()
    after = model(**inputs).logits.detach()
    assert (after - before).abs().max() <= 256 * torch.finfo(torch.float32).eps * before.abs().max()
    model.train()
    for name, parameter in model.named_parameters():
        new, old = optimizer.state[parameter]["exp_avg"], moments[name]
        # what was there is there still, wherever the new units lie
        assert torch.equal(new[new != 0].sort().values, old[old != 0].sort().values), name
    first = loss_of(model, inputs).item()
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()
    assert loss_of(model, inputs).item() < first


def test_the_gradient_attained_is_the_one_predicted(
    built: tuple[nn.Module, dict[str, Tensor], fg.Sites],
) -> None:
    """The new units' incoming gradient, read off the grown model in float64, site by site."""
    model, inputs, sites = built
    model = model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    for name, units in growing(sites).items():
        grown = copy.deepcopy(model)
        optimizer = torch.optim.SGD(grown.parameters(), lr=1.0)
        report = fg.grow(
            grown, {name: units}, sites=sites, optimizer=optimizer, closure=lambda g=grown: loss_of(g, inputs)
        )
        loss_of(grown, inputs).backward()
        attained = new_gradient(grown, sites, sites[name])
        assert attained > 0
        # Llama's RMSNorm computes in float32 whatever the model's dtype
        assert attained == pytest.approx(report.sites[0].predicted_gain, rel=1e-4), name


def new_gradient(grown: nn.Module, sites: fg.Sites, site: fg.Site) -> float:
    """Squared gradient at the new units' incoming weights, gates left out."""
    from fastgrow.layout import new_positions
    from fastgrow.sites import tensors_of

    sizes = sites.sizes(grown)
    before = {**sizes, site.axis: site.width // site.step}
    total = 0.0
    for producer in site.producers:
        slot = site.weight(producer, "producer")
        gradient = tensors_of(grown)[slot.tensor].grad
        assert gradient is not None
        rows = gradient.movedim(slot.dim, 0)[new_positions(slot.layout, before, sizes)]
        gates = [gate for gate in site.gates if gate.layer == producer]
        parts = rows.chunk(gates[0].parts) if gates else (rows,)
        total += sum(
            part.square().sum().item()
            for number, part in enumerate(parts)
            if number not in {gate.part for gate in gates}
        )
    return total


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_head_counts_follow(name: str) -> None:
    model, inputs = MODELS[name]()
    sites = fg.find_sites(model, inputs)
    heads = [site for site in sites if site.heads]
    assert len(heads) == 2
    fg.grow(model, {site.name: 1 for site in heads}, sites=sites, closure=lambda: loss_of(model, inputs))
    counts: list[Any] = [
        value
        for module in model.modules()
        for key, value in vars(module).items()
        if key in ("num_heads", "num_attention_heads") and isinstance(value, int)
    ]
    assert counts
    assert set(counts) == {5}
