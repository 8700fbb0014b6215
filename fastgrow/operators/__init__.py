"""Growth matrices that are never formed: linear maps known by their products alone.

A growth matrix ``M = E_D[dL/dz_{l+1} h_{l-1}^T]`` (GradMax, eqs. 9, 10) has as many entries as the layers'
product, but a product ``M X`` with r columns costs no more than two layers with r hidden units. The maps
here hold the two tensors of a site and multiply; `fastgrow.solve` needs nothing else.
"""

from .base import (
    LARGEST_EXPONENT,
    LinearMap,
    exponent_of,
    power_of_two,
    products_in,
    scale_by_power,
    split_scale,
)
from .conv import ConvFlattenLinearPair, ConvPair, Geometry
from .linear import DenseMap, LinearPair, ScaledMap, SumMap
from .stacked import StackedPair

__all__ = [
    "LARGEST_EXPONENT",
    "ConvFlattenLinearPair",
    "ConvPair",
    "DenseMap",
    "Geometry",
    "LinearMap",
    "LinearPair",
    "ScaledMap",
    "StackedPair",
    "SumMap",
    "exponent_of",
    "power_of_two",
    "products_in",
    "scale_by_power",
    "split_scale",
]
