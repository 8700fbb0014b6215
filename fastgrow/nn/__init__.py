"""Torch's modules as grown networks need them: equal in the forward pass, with the same parameters."""

from .activations import LeakyReLU, PReLU, ReLU, ReLU6
from .attention import MultiheadAttention
from .twins import attention_opened, attention_traced, is_twin, original, twin

__all__ = [
    "LeakyReLU",
    "MultiheadAttention",
    "PReLU",
    "ReLU",
    "ReLU6",
    "attention_opened",
    "attention_traced",
    "is_twin",
    "original",
    "twin",
]
