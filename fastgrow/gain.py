"""What growth brought: the decrease of the loss by the new units' own first step, beside the predicted one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .closures import backpropagated, checked_loss, preserved
from .distributed import replicas_of, together
from .errors import GrowthError
from .growth_report import GrowthReport
from .layout import index_map, new_positions
from .optimizer_state import rates_of
from .sharded import wrapped_modules
from .sites import Site, Sites, tensors_of, unwrap
from .surroundings import as_called

__all__ = ["GainMeter", "check_closure", "check_measurable"]

Steps = Mapping[str, Tensor]

_NO_LOSS = "could not compute the closure's loss, so no rank measures its gain"


def check_closure(closure: Callable[[], Tensor] | None) -> Callable[[], Tensor]:
    """The closure that a gain is measured with; raises `GrowthError` where there is none."""
    if closure is None:
        raise GrowthError(
            "measure_gain=True needs the loss again after growth: give closure=, a function that returns the loss "
            "(grower.step(closure=...) in a loop)"
        )
    return closure


def check_measurable(model: nn.Module, optimizers: Sequence[Any]) -> None:
    """Raises `GrowthError` for a model and optimizers whose gains cannot be measured."""
    if not rates_of(optimizers):
        raise GrowthError(
            "measure_gain=True measures a step of the learning rate: give optimizer=, one whose param groups have lr"
        )
    if wrapped_modules(model):
        raise GrowthError(
            "measure_gain=True moves parameters in place, which fully_shard has sharded: grow without it, or under "
            "DistributedDataParallel"
        )


class GainMeter:
    """Measures one growth on the batch of its closure::

        meter = GainMeter(model, sites, optimizers, closure)   # before the growth: one forward pass
        report = ...                                           # the growth
        meter.fill(report)                                     # after it

    With L the closure's loss, W the network right after growth, g = dL/dW there, lr each tensor's own rate, that of its
    parameter group (0 for tensors that no optimizer holds), and P_s the projection on the entries born with site s
    (weights, biases, norms):

    - `SiteGrowth.measured_gain` = ``L(W) - L(W - lr P_s g)``: only the new units of site s take their first step;
    - `GrowthReport.measured_gain` = ``L(W) - L(W - lr P g)``, P on the new entries of all sites together;
    - `SiteGrowth.predicted_gain`, where the method predicts none, becomes ``sum lr (P_s g)^2``;
    - `GrowthReport.loss_change` = ``L(W) - L(before)``: 0 for methods that keep the function.

    The step is plain gradient descent whatever the optimizer is, so that prediction and measurement speak of
    the same step and old weights, momentum and the next batch have no part in the difference. An entry between the
    new units of two neighbouring sites belongs to both. Losses are in the model's present mode, all after growth
    with the same random numbers; differences below eps * L of the loss's dtype are rounding.

    Costs one forward pass before growth; after it one forward and backward pass, one forward pass for each
    site, and one for all together where there are several. Under DistributedDataParallel loss and gradient are the
    means over the ranks. Raises `GrowthError` without a closure or an optimizer with a learning rate, for a closure
    that backpropagates, and for a model that ``fully_shard`` has sharded; exceptions of the closure pass unchanged, and
    the other ranks raise a `GrowthError` that tells them. Parameters, ``.grad``s, buffers and RNG state are left as
    they were found.
    """

    def __init__(
        self, model: nn.Module, sites: Sites, optimizers: Sequence[Any], closure: Callable[[], Tensor] | None
    ) -> None:
        closure = check_closure(closure)
        check_measurable(model, optimizers)
        self.model = model
        self.sites = sites
        self._optimizers = list(optimizers)
        self._closure = as_called(closure)
        self._sizes = sites.sizes(model)
        self._before = self._loss(first=True)

    def fill(self, report: GrowthReport) -> None:
        """Fills in the gains of this growth, which must be the one that followed."""
        grown = [self.sites[entry.name] for entry in report.sites]
        born = [self._born(site) for site in grown]
        loss, gradients = self._gradients(sorted({name for regions in born for name in regions}))
        report.loss_change = loss - self._before
        steps = [self._step(gradients, [regions]) for regions in born]
        for entry, step in zip(report.sites, steps, strict=True):
            if entry.predicted_gain is None:
                entry.predicted_gain = -sum(
                    float((change.double() * gradients[name].double()).sum()) for name, change in step.items()
                )
            entry.measured_gain = loss - self._loss_after(step)
        if len(steps) == 1:
            report.measured_gain = report.sites[0].measured_gain
        else:
            report.measured_gain = loss - self._loss_after(self._step(gradients, born))

    def _born(self, site: Site) -> dict[str, list[tuple[int, Tensor]]]:
        """Parameter name -> (dimension, positions) of the entries born with a site."""
        now, whole = self.sites.sizes(self.model), self.sites.sizes(self.model, room=True)
        old = {**now, site.axis: self._sizes[site.axis]}
        tensors = tensors_of(self.model)
        regions: dict[str, list[tuple[int, Tensor]]] = {}
        for slot in site.slots:
            tensor = tensors[slot.tensor]
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                fresh = index_map(slot.layout, now, whole)[new_positions(slot.layout, old, now)].to(tensor.device)
                regions.setdefault(slot.tensor, []).append((slot.dim, fresh))
        return regions

    def _gradients(self, names: Sequence[str]) -> tuple[float, dict[str, Tensor]]:
        leaves = tensors_of(self.model)
        replicas = replicas_of(self.model)
        with preserved(self.model), torch.enable_grad(), together(replicas, _NO_LOSS):
            loss = checked_loss(self._closure)
            found = backpropagated(loss, [leaves[name] for name in names])
        gradients = {name: g for name, g in zip(names, found, strict=True) if g is not None}
        if replicas is not None:
            # A rank that did not use a tensor adds zero: every rank makes the same calls.
            for name in names:
                own = gradients.get(name)
                gradients[name] = replicas.sum(torch.zeros_like(leaves[name]) if own is None else own) / replicas.size
        return self._mean(float(loss.detach())), gradients

    def _step(self, gradients: Steps, born: Sequence[Mapping[str, Sequence[tuple[int, Tensor]]]]) -> Steps:
        """-lr g on the entries of these sites, zero elsewhere."""
        steps: dict[str, Tensor] = {}
        tensors, rates = tensors_of(self.model), rates_of(self._optimizers)
        for regions in born:
            for name, places in regions.items():
                if name not in gradients:
                    continue
                gradient, rate = gradients[name], rates.get(id(tensors[name]), 0.0)
                step = steps.setdefault(name, torch.zeros_like(gradient))
                for dim, fresh in places:
                    step.index_copy_(dim, fresh, gradient.index_select(dim, fresh) * -rate)
        return steps

    def _loss_after(self, steps: Steps) -> float:
        with self._moved(steps):
            return self._loss()

    @contextmanager
    def _moved(self, steps: Steps) -> Iterator[None]:
        tensors = tensors_of(self.model)
        kept = {name: tensors[name].detach().clone() for name in steps}
        try:
            with torch.no_grad():
                for name, step in steps.items():
                    tensors[name].add_(step)
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    tensors[name].copy_(value)

    def _loss(self, first: bool = False) -> float:
        """first: while nothing has grown, see to it that the loss can be backpropagated once something has."""
        with preserved(self.model), torch.enable_grad(), together(replicas_of(self.model), _NO_LOSS):
            loss = checked_loss(self._closure)
            left = [p for p in unwrap(self.model).parameters() if p.grad is not None] if first else []
            if left:  # the closure has called backward()
                backpropagated(loss, left)
        return self._mean(float(loss.detach()))

    def _mean(self, loss: float) -> float:
        replicas = replicas_of(self.model)
        return loss if replicas is None else replicas.mean(loss)
