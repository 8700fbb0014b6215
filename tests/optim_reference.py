"""The optimizers of fastgrow.optim as plain loops over blocks, and growth of a parameter by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def stage_map(shape: tuple[int, ...], stages: dict[int, Tensor]) -> Tensor:
    """The stage of each element: the largest of its indices'."""
    result = torch.zeros(shape, dtype=torch.int64)
    for dim, vector in stages.items():
        view = [1] * len(shape)
        view[dim] = -1
        result = torch.maximum(result, vector.view(view).expand(shape))
    return result


@dataclass
class One:
    """A parameter of the reference, in float64."""

    value: Tensor
    stages: Tensor
    births: dict[int, int] = field(default_factory=lambda: {0: 0})
    waiting: dict[int, bool] = field(default_factory=dict)
    step: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    def blocks(self) -> list[int]:
        return sorted(set(self.stages.view(-1).tolist()))

    def moment(self, name: str) -> Tensor:
        return self.state.setdefault(name, torch.zeros_like(self.value))


class Reference:
    """method: "SGD", "Adam", "AdamW" or "AvaGrad", with the options of fastgrow.optim's."""

    def __init__(self, method: str, values: list[Tensor], **options: Any) -> None:
        self.method, self.o = method, options
        self.all = [One(v.detach().double().clone(), torch.zeros(v.shape, dtype=torch.int64)) for v in values]

    def grow(self, at: int, value: Tensor, index: dict[int, Tensor], stages: dict[int, Tensor]) -> None:
        """Replace a value by a larger one whose old positions are at `index`."""
        one = self.all[at]
        for name, old in one.state.items():
            one.state[name] = move(old, value.shape, index)
        one.value = value.detach().double().clone()
        one.stages = stage_map(tuple(value.shape), stages)
        for stage in one.blocks():
            if stage not in one.births:
                one.births[stage] = one.step
                mine, seed = one.value[one.stages == stage], one.value[one.stages == 0]
                one.waiting[stage] = bool(mine.square().mean() < seed.square().mean() / 32**2)

    def rate(self, one: One, stage: int) -> float:
        options = self.o.get("stage_options", {}).get(stage, {})
        rate = self.o["lr"] * options.get("lr", 1.0)
        if options.get("warmup"):
            rate *= min(1.0, (one.step - one.births[stage] + 1) / options["warmup"])
        if stage == 0 and one.value.dim() > 1:
            rate *= self.o.get("output_scale", 1.0)
        if not self.o.get("rate_adaptation") or one.value.dim() < 2 or stage == 0:
            return rate
        mine, seed = one.value[one.stages == stage], one.value[one.stages == 0]
        if mine.square().mean() >= seed.square().mean():
            one.waiting[stage] = False
        return rate if one.waiting[stage] or seed.norm() == 0 else rate * (mine.norm() / seed.norm()).item()

    def step(self, gradients: list[Tensor | None]) -> None:
        held = [(one, g.double()) for one, g in zip(self.all, gradients, strict=True) if g is not None]
        normaliser = self.normalisers([one for one, _ in held]) if self.method == "AvaGrad" else {}
        for one, gradient in held:
            value = one.value.clone()
            for stage in one.blocks():
                mask = one.stages == stage
                self.update(one, value, gradient, stage, mask, normaliser.get(stage, 1.0))
            one.value = value
            one.step += 1

    def normalisers(self, ones: list[One]) -> dict[int, float]:
        squares: dict[int, float] = {}
        elements: dict[int, int] = {}
        for one in ones:
            for stage in one.blocks():
                eta = self.eta(one, stage)
                squares[stage] = squares.get(stage, 0.0) + eta.square().sum().item()
                elements[stage] = elements.get(stage, 0) + eta.numel()
        return {stage: math.sqrt(elements[stage] / squares[stage]) for stage in squares}

    def eta(self, one: One, stage: int) -> Tensor:
        before = one.step - one.births[stage]
        second = one.moment("exp_avg_sq")[one.stages == stage]
        return (
            1 / ((second / (1 - self.o["betas"][1] ** before)).sqrt() + self.o["eps"])
            if before
            else (torch.full_like(second, 1 / self.o["eps"]))
        )

    def update(self, one: One, value: Tensor, gradient: Tensor, stage: int, mask: Tensor, normaliser: float) -> None:
        o, w, g = self.o, one.value[mask], gradient[mask]
        rate, age = self.rate(one, stage), one.step - one.births[stage] + 1
        decay = o.get("stage_options", {}).get(stage, {}).get("weight_decay", o.get("weight_decay", 0.0))
        g = -g if o.get("maximize") else g
        if self.method == "AdamW":
            w = w - rate * decay * w
        else:
            g = g + decay * w
        if self.method == "SGD":
            if o.get("momentum"):
                buffer = one.moment("momentum_buffer")
                first = age == 1
                buffer[mask] = o["momentum"] * buffer[mask] + (1 if first else 1 - o.get("dampening", 0)) * g
                g = g + o["momentum"] * buffer[mask] if o.get("nesterov") else buffer[mask]
            value[mask] = w - rate * g
            return
        beta1, beta2 = o["betas"]
        eta = self.eta(one, stage) if self.method == "AvaGrad" else None
        first, second = one.moment("exp_avg"), one.moment("exp_avg_sq")
        first[mask] = beta1 * first[mask] + (1 - beta1) * g
        second[mask] = beta2 * second[mask] + (1 - beta2) * g * g
        mean = first[mask] / (1 - beta1**age)
        if eta is not None:
            value[mask] = w - rate * normaliser * eta * mean
        else:
            used = second[mask]
            if o.get("amsgrad"):
                top = one.moment("max_exp_avg_sq")
                top[mask] = torch.maximum(top[mask], used)
                used = top[mask]
            value[mask] = w - rate * mean / ((used / (1 - beta2**age)).sqrt() + o["eps"])


def move(old: Tensor, shape: torch.Size, index: dict[int, Tensor]) -> Tensor:
    """Zeros of the new shape with the old values at their new positions."""
    new = old.new_zeros(shape)
    where = [index.get(dim, torch.arange(n)) for dim, n in enumerate(old.shape)]
    new[torch.meshgrid(*where, indexing="ij")] = old
    return new


def grow(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    value: Tensor,
    index: dict[int, Tensor],
    stages: dict[int, Tensor],
) -> nn.Parameter:
    """What widening does to an optimizer: a new parameter, its state moved, the optimizer told."""
    new = nn.Parameter(value.clone(memory_format=torch.preserve_format))
    for group in optimizer.param_groups:
        group["params"] = [new if one is parameter else one for one in group["params"]]
    if parameter in optimizer.state:
        state = optimizer.state.pop(parameter)
        optimizer.state[new] = {
            name: move(entry, value.shape, index)
            if isinstance(entry, Tensor) and entry.shape == parameter.shape
            else entry
            for name, entry in state.items()
        }
    optimizer.grown(new, stages)  # type: ignore[attr-defined]
    return new
