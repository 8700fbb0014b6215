"""GradMax at any site: the ops between its layers, replayed on a few probe units."""

from .activations import derivative_from_the_right
from .map import ReplayMap, consumer_gradient, consumer_pullback
from .middle import Capture, Replay
from .reads import tensors_read
from .retrace import same_shapes, sizeless

__all__ = [
    "Capture",
    "Replay",
    "ReplayMap",
    "consumer_gradient",
    "consumer_pullback",
    "derivative_from_the_right",
    "same_shapes",
    "sizeless",
    "tensors_read",
]
