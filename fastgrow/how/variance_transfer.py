"""Variance transfer: signed pairs, and old weights re-scaled to the new width (Yuan et al., NeurIPS 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import number
from ..errors import GrowthError
from ..newborns import Newborns, Start
from ..sites import Site, Sites, tensors_of
from .base import How, refuse_mixing

__all__ = ["VarianceTransfer"]

_NOISE = 1e-3


class VarianceTransfer(How):
    """New units in pairs whose outputs cancel; all weights as if the network had been born at its new width.

    With fan-in C (channels x kernel) growing from C_t to C_t+1 at a layer that reads the new units (eqs. 1-4):
    producers ``[W; V; V]``, hidden consumers ``[[c W, Z, -Z]; V; V]``, the output layer ``[c W, Z, -Z]``.
    Old weights are multiplied by c = sqrt(C_t / C_t+1) in hidden layers, C_t / C_t+1 in the output layer, 1 in the
    input layer (Table 1); new ones are gaussian with variance 1 / fan-in, 1 / fan-in^2 in the output layer. The
    statistics of the batch norm behind a re-scaled layer follow: mean <- c (mean - b) + b with the layer's bias b,
    var <- c^2 var. Output layers are those that no other layer with a weight follows (`LayerInfo.is_output`), each
    head of a model with several; what stands behind them (softmax, views) does not matter.

    exact: leave the old weights as they are (c = 1), so that the function stays.
    constraint: App. A's VT-constraint instead: c = 1 / sqrt(C_t+1 Var[W]) in hidden and input layers, from the
    weights as they are.
    noise: breaks the pairs' symmetry, a fraction of the new weights' standard deviation on the second unit of each
    pair; None: the paper's 0.001, 0 with exact.
    reset_momentum: drop SGD's momentum buffers at growth, as the paper does; adaptive optimizers keep their state.
    The first network wants the same variances: `initialize_`.

    Keeps the function to float rounding with exact=True (noise 0, dropout aside); otherwise the logits are
    C_t / C_t+1 times the old ones where batch norms follow the hidden layers and the output layer has no bias, up to
    the norms' eps. Costs nothing. Raises `GrowthError` for an odd number of units and where norms mix the channels.
    """

    rewrites = True

    def __init__(
        self,
        exact: bool = False,
        constraint: bool = False,
        noise: float | None = None,
        reset_momentum: bool = True,
    ) -> None:
        if exact and constraint:
            raise GrowthError("how.VarianceTransfer: exact re-scales nothing, constraint all; choose one")
        self.exact = bool(exact)
        self.constraint = bool(constraint)
        chosen = (0.0 if exact else _NOISE) if noise is None else noise
        self.noise = number("how.VarianceTransfer", "noise", chosen, least=0)
        self.reset_momentum = bool(reset_momentum)

    def check(self, site: Site, units: int) -> None:
        refuse_mixing(self, site)
        if site.stacked:
            raise GrowthError(
                f"site {site.name!r}: how.VarianceTransfer scales a layer by one fan-in, not the members of a "
                "stack; use how.GradMax or how.ZeroOutgoing"
            )
        if (units // site.step) % 2:
            raise GrowthError(
                f"site {site.name!r}: {units} units were asked for, but variance transfer adds them in pairs; ask for "
                f"a multiple of {2 * site.step}"
            )
        if any(norm.kind == "group_norm" for norm in site.norms) and units % (2 * site.multiple):
            raise GrowthError(
                f"site {site.name!r}: each half of the {units} new channels must fill whole groups of its GroupNorm; "
                f"ask for a multiple of {2 * site.multiple}"
            )

    def multiple(self, site: Site, width: int) -> int:
        whole_groups = any(norm.kind == "group_norm" for norm in site.norms)
        return 2 * site.multiple if whole_groups else math.lcm(site.multiple, 2 * site.step)

    def start(self, newborns: Newborns) -> Start:
        site, start = newborns.site, Start()
        for name in site.producers:
            shape = newborns.shape(name, "producer")
            deviation = max(1, torch.Size(shape[1:]).numel()) ** -0.5
            start.incoming[name] = self._pairs(newborns, name, "producer", deviation, 1.0)
            if self.constraint and not any(name in other.consumers for other in newborns.sites):
                self._rescale(newborns, start, name, "producer", self._unit_variance(newborns, name, "producer", 0))
        for name in site.consumers:
            shape = newborns.shape(name, "consumer")
            present = newborns.weight(name, "consumer").shape[1]
            ratio = present / (present + shape[1])
            fan_in = (present + shape[1]) * torch.Size(shape[2:]).numel()
            output = _is_output(newborns.sites, name)
            start.outgoing[name] = self._pairs(newborns, name, "consumer", 1 / fan_in if output else fan_in**-0.5, -1.0)
            if self.constraint and not output:
                factor = self._unit_variance(newborns, name, "consumer", shape[1])
            else:
                factor = 1.0 if self.exact else ratio if output else ratio**0.5
            self._rescale(newborns, start, name, "consumer", factor)
        return start

    def _pairs(self, newborns: Newborns, name: str, role: str, deviation: float, sign: float) -> Tensor:
        """A layer's new part: a gaussian half, and `sign` times the same with a little noise."""
        weight = newborns.weight(name, role)
        positions = newborns.positions(name, role)  # (steps, positions of one)
        half = len(positions) // 2
        along = 0 if role == "producer" else 1
        result = torch.zeros(newborns.shape(name, role), dtype=torch.float64)
        shape = list(result.shape)
        shape[along] = positions[:half].numel()
        first = torch.randn(shape, dtype=torch.float64) * deviation
        first = first.to(weight.dtype).double()  # so that the pair is equal bit for bit
        noise = torch.randn(shape, dtype=torch.float64) * (deviation * self.noise)
        result.index_copy_(along, positions[:half].reshape(-1), first)
        result.index_copy_(along, positions[half:].reshape(-1), sign * first + noise)
        return result.to(weight.device, weight.dtype)

    def _unit_variance(self, newborns: Newborns, name: str, role: str, columns: int) -> float:
        weight = newborns.weight(name, role).double()
        fan_in = (weight.shape[1] + columns) * weight[0, 0].numel()
        variance = float(weight.var(unbiased=False))
        return 1.0 if variance == 0 else (fan_in * variance) ** -0.5

    def _rescale(self, newborns: Newborns, start: Start, name: str, role: str, factor: float) -> None:
        """Old weights times a factor, and the statistics of the batch norm that reads them."""
        if factor == 1.0:
            return
        start.rescale[newborns.site.weight(name, role).tensor] = factor
        info = newborns.sites.layers.get(name)
        if info is None or info.norm is None or f"{info.norm}.running_mean" not in newborns.tensors:
            return
        mean, variance = f"{info.norm}.running_mean", f"{info.norm}.running_var"
        start.rescale[mean], start.rescale[variance] = factor, factor**2
        bias = newborns.tensors.get(f"{name}.bias")
        if bias is not None:
            start.shift[mean] = (1 - factor) * bias.detach().to(newborns.tensors[mean])

    def settle(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        if not self.reset_momentum:
            return
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.SGD):
                for state in optimizer.state.values():
                    state.pop("momentum_buffer", None)

    @staticmethod
    @torch.no_grad()
    def initialize_(model: nn.Module, sites: Sites) -> nn.Module:
        """Gaussian weights for the first stage: variance 1 / fan-in, 1 / fan-in^2 in the output layer; biases zero.

        Every linear and convolution layer on a site, in place; norms and other layers are left alone. Returns
        the model.
        """
        tensors = tensors_of(model)
        done: set[str] = set()
        for site in sites:
            for role, names in (("producer", site.producers), ("consumer", site.consumers)):
                for name in names:
                    slot = site.weight(name, role)
                    if slot.tensor in done or name not in sites.layers:
                        continue
                    done.add(slot.tensor)
                    weight = tensors[slot.tensor]
                    out = weight.shape[slot.dim if role == "producer" else 1 - slot.dim]
                    fan_in = weight.numel() // max(1, out)
                    weight.normal_(0.0, 1 / fan_in if _is_output(sites, name) else fan_in**-0.5)
                    bias = tensors.get(f"{name}.bias")
                    if bias is not None:
                        bias.zero_()
        return model


def _is_output(sites: Sites, name: str) -> bool:
    return name in sites.layers and sites.layers[name].is_output
