"""Modules that a growing model may hold where torch has none; `fastgrow.finalize` takes them out again."""

from .activations import LeakyReLU, PReLU, ReLU, ReLU6
from .attention import MultiheadAttention
from .beside import Beside
from .twins import attention_opened, attention_traced, is_twin, original, twin

__all__ = [
    "Beside",
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
