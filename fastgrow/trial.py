"""Trying growth on a throw-away copy that holds shapes only: sizes written into a model's code show here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from .arguments import instance
from .edits import attribute_edits
from .fake import fake_copy, fake_inputs, for_export
from .layout import size
from .nn import attention_traced
from .room import has_room
from .sites import Sites, as_call, discover, open_outputs

__all__ = ["find_sites", "trial"]


def find_sites(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> Sites:
    """Find what can grow in a model as it is written.

    The model is exported once (`torch.export`; nothing is executed on real data), its dimensions are
    followed from op to op, and every site is tried on a widened copy that holds shapes only. The model
    is left as it was found.

    model: any module, also behind ``torch.compile`` or DistributedDataParallel, or wrapped by ``fully_shard``.
    example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments). Batches of other sizes may
    be observed: where directions depend on the sizes (masks, positions), the model is exported once more for each.
    include, exclude: name patterns (``fnmatch``) of the sites wanted, or of any of their producers.
    raises: GrowthError where the model cannot be exported, or where a pattern matches nothing.
    """
    exported, inputs = for_export(instance("find_sites", "model", model, nn.Module), example_inputs)
    sites = _without_room(model, discover(exported, inputs, include=include, exclude=exclude))
    if not sites:
        return sites
    smallest = {site.name: site.multiple for site in sites}
    if trial(model, sites, smallest, example_inputs) is None:
        return sites
    failed = {
        site.name: reason
        for site in sites
        if (reason := trial(model, sites, {site.name: site.multiple}, example_inputs)) is not None
    }
    return sites.without({name: f"its size is written into the code: {reason}" for name, reason in failed.items()})


def _without_room(model: nn.Module, sites: Sites) -> Sites:
    """Sites whose widths count no reserved room."""
    if not has_room(model):
        return sites
    sizes = sites.sizes(model)
    items, left_out = (
        tuple(dataclasses.replace(site, width=sizes[site.axis] * site.step) for site in of)
        for of in (sites.items, sites.left_out)
    )
    return dataclasses.replace(sites, items=items, left_out=left_out)


def _run(model: nn.Module, mode: FakeTensorMode, example_inputs: Any) -> list[tuple[int, ...]]:
    args, kwargs = fake_inputs(mode, as_call(example_inputs))
    with mode, torch.no_grad(), attention_traced(model):
        output = model(*args, **kwargs)
    return [tuple(t.shape) for t in pytree.tree_leaves(open_outputs(output)) if isinstance(t, Tensor)]


def trial(model: nn.Module, sites: Sites, units: Mapping[str, int], example_inputs: Any) -> str | None:
    """Why the model does not run with these units more; None where it does, with outputs as before."""
    assert sites.graph is not None
    present = sites.sizes(model, room=True)
    sizes = dict(present)
    for name, count in units.items():
        sizes[sites[name].axis] += count // sites[name].step
    names = {slot.tensor for name in units for slot in sites[name].slots}
    shapes = {name: [size(dim, sizes) for dim in sites.graph.tensor_dims[name]] for name in names}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        fake = fake_copy(model, mode, shapes)
        for edit in attribute_edits(fake, sites, units, sizes):
            setattr(fake.get_submodule(edit.module), edit.attribute, edit.value)
        after = _run(fake, mode, example_inputs)
        if after == [shape for shape in sites.graph.trace.outputs]:
            return None
        before = _run(fake_copy(model, mode), mode, example_inputs)
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None if before == after else f"the outputs' shapes change from {before} to {after}"
