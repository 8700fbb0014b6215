"""Activations equal to torch's in the forward pass, whose derivative at 0 is that of 0+.

GradMax's new units start at exactly zero. ``torch.nn.ReLU`` has the subgradient 0 there, so they would never learn;
with the derivative from the right they do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LeakyReLU", "PReLU", "ReLU", "ReLU6"]


def relu(input: Tensor) -> Tensor:
    """max(x, 0) with derivative 1 at x = 0 (float dtypes; the input is kept for the backward pass).

    ``x > -tiny`` holds for exactly the x that are >= 0, tiny being the smallest number of the dtype.
    """
    if input.is_nested and not (torch.is_grad_enabled() and input.requires_grad):
        return F.relu(input)  # nested tensors have no threshold; nn.TransformerEncoder makes them for inference
    return F.threshold(input, -torch.finfo(input.dtype).smallest_normal * torch.finfo(input.dtype).eps, 0.0)


class ReLU(nn.ReLU):
    """``torch.nn.ReLU`` with derivative 1 at 0. ``inplace`` is kept as an attribute and has no effect."""

    def forward(self, input: Tensor) -> Tensor:
        return relu(input)


class ReLU6(nn.ReLU6):
    """``torch.nn.ReLU6`` with derivative 1 at 0 (and 0 at 6, as torch's)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardtanh(relu(input), -1.0, 6.0)


class LeakyReLU(nn.LeakyReLU):
    """``torch.nn.LeakyReLU`` with derivative 1 at 0."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.where(input < 0, input * self.negative_slope, input)


class PReLU(nn.PReLU):
    """``torch.nn.PReLU`` with derivative 1 at 0."""

    def forward(self, input: Tensor) -> Tensor:
        slope = self.weight.reshape(-1, *[1] * (input.dim() - 2)) if input.dim() > 1 else self.weight
        return torch.where(input < 0, input * slope, input)
