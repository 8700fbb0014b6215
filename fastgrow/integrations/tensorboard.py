"""TensorBoard scalars of a growing network: widths, NAGN, and what growth cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..grower import Grower

__all__ = ["GrowthWriter"]


class GrowthWriter:
    """Writes what a Grower has done since the last call::

        writer = GrowthWriter(SummaryWriter("runs/1"), grower)
        ...
        grower.step()
        writer.write()

    writer: a ``SummaryWriter`` of torch or tensorboardX, or anything with its ``add_scalar``.
    Scalars: ``fastgrow/width/<site>`` at the first call and at each growth; at each growth also
    ``fastgrow/parameters``, ``fastgrow/growth_ms``, ``fastgrow/nagn/<layer>`` and ``fastgrow/nagn_after_norm/<layer>``
    where the policy reads them, and for each site that grew
    ``fastgrow/captured``, ``fastgrow/predicted_gain`` and ``fastgrow/measured_gain``, where they are known.
    """

    def __init__(self, writer: Any, grower: Grower) -> None:
        self.writer = writer
        self.grower = grower
        self._written = 0
        self._begun = False

    def write(self) -> None:
        """Once after ``grower.step()``, as often as you like."""
        if not self._begun:
            self._begun = True
            first = self.grower.history[0] if self.grower.history else None
            before = {site.name: site.old_width for site in first.sites} if first is not None else {}
            widths = self.grower.sites.widths(self.grower.model)
            for name, width in {**widths, **before}.items():
                self._add(f"width/{name}", width, 0 if first is not None else self.grower.steps)
        for report in self.grower.history[self._written :]:
            step = report.step or 0
            self._add("parameters", report.parameters, step)
            self._add("growth_ms", 1e3 * report.seconds, step)
            for place in ("nagn", "nagn_after_norm"):
                for layer, value in report.evidence.get(place, {}).items():
                    self._add(f"{place}/{layer}", value, step)
            for site in report.sites:
                self._add(f"width/{site.name}", site.new_width, step)
                for what in ("captured", "predicted_gain", "measured_gain"):
                    self._add(f"{what}/{site.name}", getattr(site, what), step)
        self._written = len(self.grower.history)

    def _add(self, tag: str, value: float | None, step: int) -> None:
        if value is not None:
            self.writer.add_scalar(f"fastgrow/{tag}", value, step)
