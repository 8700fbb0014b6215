"""The functional ops: tensors in, tensors out, no autograd; for people who write their own loop."""

from .kernel_ops import (
    Activation,
    Backend,
    ConvGeometry,
    Precision,
    activation_backward,
    activation_backward_bias,
    conv2d_growth_matrix,
    linear_growth_matrix,
    sum_of_squares,
    sums_of_squares,
)
from .solve import Directions, top_directions

__all__ = [
    "Activation",
    "Backend",
    "ConvGeometry",
    "Directions",
    "Precision",
    "activation_backward",
    "activation_backward_bias",
    "conv2d_growth_matrix",
    "linear_growth_matrix",
    "sum_of_squares",
    "sums_of_squares",
    "top_directions",
]
