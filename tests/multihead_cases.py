"""Models around one attention module of torch, called in every way it can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastgrow as fg
from fastgrow.sites import Site

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


def heads_of(sites: fg.Sites) -> Site:
    (site,) = [site for site in sites if site.heads]
    return site


def loss_on(model: nn.Module, *inputs: Any) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        output = model(*inputs)
        target = torch.arange(output.numel()).reshape(output.shape).sin()
        return (output - target).square().mean()

    return loss
