"""Models as people write them: what is found, that growth keeps their function, and that GradMax is the optimum."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from nets import Blank, incoming_gradients
from tolerances import tolerance
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo_parts import StochasticDepth
from zoo_vision import IMAGES, Generator, GroupedGenerator
from zoo_writing import WRITTEN

import fastgrow as fg
from fastgrow.how import Newborns
from fastgrow.layout import new_positions, unit_positions
from fastgrow.sites import Site, as_call, open_outputs, tensors_of

CASES: dict[str, tuple[Any, Any]] = {
    **{name: (build, lambda: torch.randn(3, 3, 16, 16)) for name, build in IMAGES.items()},
    **WRITTEN,
    "generator": (Generator, lambda: torch.randn(4, 6)),
    "grouped_generator": (GroupedGenerator, lambda: torch.randn(3, 4, 6)),
}
UNSHARED = {"tied_autoencoder": "is tied, producer and consumer at once"}


def converted(inputs: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


@functools.cache
def case(name: str) -> tuple[nn.Module, Any, fg.Sites]:
    """The model in float64 and training mode, its inputs and its sites."""
    torch.manual_seed(0)
    build, make = CASES[name]
    model, inputs = build().double(), converted(make(), torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its mask is drawn for another number of channels after growth
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, inputs, fg.find_sites(model, inputs)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(11)
    args, kwargs = as_call(inputs)
    return [leaf for leaf in pytree.tree_leaves(open_outputs(model(*args, **kwargs))) if isinstance(leaf, Tensor)]


def loss_of(model: nn.Module, inputs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    total: Any = 0.0
    for output in outputs(model, inputs):
        target = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        total = total + (output - target).square().flatten(1).sum(1).mean()
    return total


def _backward(model: nn.Module, inputs: Any) -> None:
    for parameter in model.parameters():  # the loss need not depend on all of them
        parameter.grad = torch.zeros_like(parameter)
    loss_of(model, inputs).backward()


def growing(sites: fg.Sites) -> list[Site]:
    """Those that gradients may grow: a LayerNorm's stream grows by full duplication alone."""
    return [site for site in sites if not any(norm.kind == "layer_norm" for norm in site.norms)]


def grown_matrix(model: nn.Module, sites: fg.Sites, site: Site, inputs: Any) -> Tensor:
    """M by brute force: as many new units as the outgoing vector has entries, each with one of them set to 1."""
    newborns = Newborns(model, sites, site, site.step)
    shapes = {name: newborns.shape(name, "consumer") for name in site.consumers}
    count = sum(map(math.prod, shapes.values()))
    old_width = sites.width(model, site)
    grown = copy.deepcopy(model)
    fg.grow(grown, {site.name: count * site.step}, Blank(), sites=sites)
    tensors, sizes, offset = tensors_of(grown), sites.sizes(grown), 0
    for name, shape in shapes.items():
        slot = site.weight(name, "consumer")
        weight = tensors[slot.tensor].detach().movedim(slot.dim, 1)
        positions = new_positions(slot.layout, {**sizes, site.axis: old_width // site.step}, sizes)
        units = unit_positions(slot.layout, site.axis, {**sizes, site.axis: count})
        for entry in range(math.prod(shape)):
            out, place, *taps = (int(at) for at in torch.unravel_index(torch.tensor(entry), shape))
            weight[(out, int(positions[units[offset + entry, place]]), *taps)] = 1.0
        offset += math.prod(shape)
    _backward(grown, inputs)
    return incoming_gradients(grown, sites, site, old_width)


def trainable(model: nn.Module, site: Site) -> bool:
    tensors = tensors_of(model)
    return all(tensors[slot.tensor].requires_grad for slot in site.slots_of("producer"))


@pytest.mark.parametrize("name", [name for name in CASES if name not in UNSHARED])
def test_every_site_keeps_the_function_and_attains_the_optimum(name: str) -> None:
    original, inputs, sites = case(name)
    random = any(isinstance(module, StochasticDepth) and module.p for module in original.modules())
    for site in growing(sites):
        model = copy.deepcopy(original).train(not random)
        # Their norm keeps the loss, and so its gradients, away from overflow behind batch norm's 1 / sqrt(eps).
        how, units = fg.how.GradMax(norm="fixed", scale=0.3), 2 * site.multiple
        before = {mode: outputs(copy.deepcopy(model).train(mode), inputs) for mode in (True, False)}
        old_width = sites.width(model, site)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        report = fg.grow(
            model,
            {site.name: units},
            how,
            sites=sites,
            optimizer=optimizer,
            closure=lambda model=model: loss_of(model, inputs),
        ).sites[0]
        for mode in (True, False):
            after = outputs(copy.deepcopy(model).train(mode), inputs)
            for one, other in zip(after, before[mode], strict=True):
                error = float((one - other).detach().abs().max())
                assert error <= tolerance(torch.float64, 1 << 20) * float(other.detach().abs().max()), (site.name, mode)
        if not trainable(model, site):
            continue
        _backward(model, inputs)
        gradient = incoming_gradients(model, sites, site, old_width)
        attained = float(gradient.norm())
        assert attained > 0, site.name
        if site.gates or how.signed(site):
            continue
        assert report.predicted_gain == pytest.approx(attained**2, rel=1e-6), site.name
        if site.separate or report.random_units:
            continue
        matrix = grown_matrix(copy.deepcopy(original).train(not random), sites, site, inputs)
        optimum = 0.3 * float(torch.linalg.svdvals(matrix)[: units // site.step].norm())
        assert 0.999 * optimum <= attained <= optimum * (1 + 1e-6), site.name


@pytest.mark.parametrize("name", UNSHARED)
def test_what_gradients_cannot_grow_is_refused_by_name(name: str) -> None:
    original, inputs, sites = case(name)
    model = copy.deepcopy(original)
    with pytest.raises(fg.GrowthError, match=UNSHARED[name]):
        fg.grow(model, {sites[0].name: 2}, sites=sites, closure=lambda: loss_of(model, inputs))


@pytest.mark.parametrize("name", [name for name in CASES if name not in UNSHARED])
def test_grows_whole_on_a_batch_of_another_size_and_trains_on(name: str) -> None:
    original, inputs, sites = case(name)
    units = {site.name: 2 * site.multiple for site in growing(sites)}
    if not units:
        return
    model = copy.deepcopy(original).float()
    batch = converted(inputs, torch.float32)
    if name != "embedding_bag":  # whose offsets are no samples
        smaller = pytree.tree_map_only(Tensor, lambda t: t[:-1] if t.dim() else t, batch)
        batch = smaller
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss_of(model, batch).backward()
    optimizer.step()
    before = outputs(model.eval(), batch)
    model.train()
    fg.grow(model, units, sites=sites, optimizer=optimizer, closure=lambda: loss_of(model, batch))
    after = outputs(model.eval(), batch)
    for one, other in zip(after, before, strict=True):
        error = float((one - other).detach().abs().max())
        assert error <= 64 * torch.finfo(torch.float32).eps * float(other.detach().abs().max())
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
    assert math.isfinite(float(loss))
    assert all(sites.widths(model)[key] == sites[key].width + count for key, count in units.items())


OUTPUT = "its output is the model's output"
RECURRENT = "recurrent layers cannot grow: their hidden state feeds back into every gate"
FROZEN: dict[str, dict[str, str]] = {
    "resnet": {"fc": OUTPUT},
    "mobilenet_v3": {"classifier.3": OUTPUT},
    "shufflenet": {
        "stage.0.branch1.2": "a view cuts across it",
        "stage.0.branch2.5": "a view cuts across it",
        "stage.1.branch2.5": "a view cuts across it",
        "fc": OUTPUT,
    },
    "unet": {"outc": OUTPUT},
    "pixel_shuffle": {"conv3": OUTPUT},
    "vit": {"head": OUTPUT},
    "swin": {
        **dict.fromkeys(
            ("embed.0", *(f"stage1.{at}.{layer}" for at in (0, 1) for layer in ("attn.proj", "mlp.fc2"))),
            "merge.norm normalises it together with other channels",
        ),
        "head": OUTPUT,
    },
    "lstm": {"rnn": RECURRENT, "fc2": OUTPUT},
    "gru": {"rnn": RECURRENT, "fc2": OUTPUT},
    "bilinear": {
        "left": "bilinear mixes or reorders its channels in a way fastgrow does not know",
        "right": "bilinear mixes or reorders its channels in a way fastgrow does not know",
        "bilinear": "bilinear mixes its channels in a way fastgrow does not know",
        "fc": OUTPUT,
    },
    "pruned": {
        "0": "the weight of '2', which shares its channels, is computed by a hook (pruning); make it permanent to grow",
        "2": "its weight is computed by a hook (pruning); make it permanent to grow",
        "4": OUTPUT,
    },
    "maxout": {"fc1": "max runs along it", "fc2": OUTPUT},
    "indexed": {"fc1": "it is indexed", "fc3": OUTPUT},
    "softmaxed": {"fc1": "softmax runs along it", "fc2": "linalg_vector_norm runs along it", "fc4": OUTPUT},
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_grow_says_why(name: str) -> None:
    assert dict(case(name)[2].frozen) == FROZEN[name]


def test_nearly_every_layer_lies_on_a_site_and_the_rest_says_why() -> None:
    on, every = 0, 0
    for name in CASES:
        _, _, sites = case(name)
        found = {layer for site in sites for layer in site.layers}
        missing = [layer for layer in sites.layers if layer not in found]
        assert all(sites.frozen.get(layer) for layer in missing), name
        on, every = on + len(sites.layers) - len(missing), every + len(sites.layers)
    assert on >= 0.9 * every
