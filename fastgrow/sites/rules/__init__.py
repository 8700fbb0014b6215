"""What each ATen op says about the dimensions of its inputs and outputs; importing registers the rules."""

from . import layers, shapes, stacked, values

__all__ = ["layers", "shapes", "stacked", "values"]
