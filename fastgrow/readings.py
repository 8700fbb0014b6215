"""Sums of squared gradients, kept on the device until somebody reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cores import to_host
from .errors import GrowthError

__all__ = ["NormSums", "Readings"]


@dataclass
class Readings:
    """One batch's sums of squares. scale: what its loss was multiplied by, known once a gradient arrives.

    marks: for each total its place, the layer, and the elements summed; place: "own" (the layer's output), "norm"
    (the output of the norm behind it), or "check" (read to see whether it is finite).
    """

    totals: list[Tensor] = field(default_factory=list)
    marks: list[tuple[str, str, int]] = field(default_factory=list)
    scale: float | Tensor | None = None
    taken: set[tuple[str, str, int]] = field(default_factory=set)

    def note(self, place: str, layer: str, number: int, total: Tensor, elements: int) -> None:
        """The reading of the layer's call of this number."""
        if place != "check":
            if (place, layer, number) in self.taken:
                raise GrowthError(
                    f"layer {layer!r}: a second backward pass went through the same forward pass, so its gradient norm "
                    "would be read in parts; add the losses and call backward once, or observe with nagn=False"
                )
            self.taken.add((place, layer, number))
        self.totals.append(total)
        self.marks.append((place, layer, elements))


class NormSums:
    """Sum over samples of ||dL/dz_l||^2 / T_l for every layer l, over any number of batches.

    scaled: whether a GradScaler scales the loss: a batch that overflowed is then dropped and counted, else it is an
    error. own, after: by layer; samples: those behind the sums. All of them stand once `settle` was called.
    """

    def __init__(self, mean: bool, scaled: bool) -> None:
        self.mean, self.scaled = mean, scaled
        self.own: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.samples = self.dropped = 0
        self._pending: list[tuple[Tensor, list[tuple[str, str, int]], int, float | None]] = []

    @property
    def pending(self) -> int:
        """Batches that wait to be read from the device."""
        return len(self._pending)

    def put(self, readings: Readings, samples: int) -> Tensor:
        """Takes a batch; its readings, which are finite where the batch is, on their device."""
        scale = readings.scale
        device = readings.totals[0].device
        wide = torch.float64 if any(t.dtype == torch.float64 for t in readings.totals) else torch.float32
        totals = [*readings.totals, scale] if isinstance(scale, Tensor) else readings.totals
        buffer = torch.stack([total.to(device, wide) for total in totals])
        self._pending.append((buffer, readings.marks, samples, None if isinstance(scale, Tensor) else scale))
        return buffer

    def settle(self) -> list[bool]:
        """Reads what is pending, one copy from the device; for each batch whether it counts."""
        pending, self._pending = self._pending, []
        if not pending:
            return []
        counts = []
        buffers = to_host([buffer for buffer, *_ in pending])
        for (_, marks, samples, scale), buffer in zip(pending, buffers, strict=True):
            read = buffer.tolist()
            bad = [mark[1] for value, mark in zip(read, marks, strict=False) if not abs(value) < float("inf")]
            if bad and not self.scaled:
                raise GrowthError(
                    f"layer {bad[0]!r}: its output's gradient is not finite (or its square overflows float32); "
                    "check the loss, or give loss_scale=the GradScaler if there is one"
                )
            counts.append(not bad)
            if bad:
                self.dropped += 1
            else:
                self.samples += samples
                self._add(read, marks, samples, read[-1] if scale is None else scale)
        return counts

    def _add(self, values: list[float], marks: list[tuple[str, str, int]], samples: int, scale: float) -> None:
        """N sum(g^2) / elements, times N^2 for a mean loss."""
        weight = (samples * samples if self.mean else 1) * samples / scale**2
        for place, into in (("own", self.own), ("norm", self.after)):
            squares: dict[str, float] = {}
            elements: dict[str, int] = {}
            for value, (where, layer, count) in zip(values, marks, strict=False):
                if where == place:
                    squares[layer] = squares.get(layer, 0.0) + value
                    elements[layer] = elements.get(layer, 0) + count
            for layer, value in squares.items():
                into[layer] = into.get(layer, 0.0) + value * (weight / max(elements[layer], 1))

    def means(self, *sums: Mapping[str, float]) -> dict[str, float]:
        """The root of the mean over samples of each layer's sum; of several mappings the last that has it."""
        joined = {layer: value for each in sums for layer, value in each.items()}
        return {layer: (value / self.samples) ** 0.5 for layer, value in joined.items()} if self.samples else {}
