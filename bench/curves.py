"""What a growth costs as a network gets wider, its batch larger, its chain longer; `draw` plots it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import fastgrow as fg

from .growth import armed, grown, naive_step, prepared, step
from .measure import Variant, compare
from .models import Case, conv_chain, mlp, mlp_pairs, vgg_pairs
from .rows import Row, Settings

__all__ = ["draw", "run"]

BENCHMARK = "growth cost by "
_NAIVE = ", naive"


@dataclass(frozen=True)
class _Net:
    """A chain of `depth` layers of one width, on batches of one size."""

    kind: str
    width: int
    depth: int
    batch: int

    def case(self, settings: Settings) -> Case:
        torch.manual_seed(0)
        side = 8 if settings.quick else 16
        shape = (self.batch, 3, side, side) if self.kind == "conv" else (self.batch, self.width)
        x, y = torch.randn(shape), torch.randint(0, 10, (self.batch,))
        build: Callable[[], nn.Module]
        if self.kind == "conv":
            build, pairs = lambda: conv_chain(self.width, self.depth), vgg_pairs([self.width] * self.depth)
        else:
            build, pairs = lambda: mlp(self.width, self.depth), mlp_pairs(self.depth)
        return Case(self.kind, build, x.to(settings.device), y.to(settings.device), pairs)


def _curves(settings: Settings) -> Iterator[tuple[str, int, _Net]]:
    """(what varies, its value, the network)."""
    many = 4 if settings.cuda else 1
    sizes: dict[str, tuple[Sequence[int], _Net]] = {
        "conv": ((32, 64, 128, 256), _Net("conv", 128, 3, 16 * many)),
        "linear": ((256, 512, 1024, 2048), _Net("linear", 512, 3, 256 * many)),
    }
    for kind, (widths, base) in sizes.items():
        depths, batches = (2, 4, 8, 16), (base.batch // 4, base.batch, base.batch * 4)
        if settings.quick:
            base, widths, depths, batches = _Net(kind, 8, 2, 4), (8, 16), (2,), (4,)
        for width in widths:
            yield "width", width, _Net(kind, width, base.depth, base.batch)
        for batch in batches:
            yield "batch", batch, _Net(kind, base.width, base.depth, batch)
        for depth in depths:
            yield "depth", depth, _Net(kind, base.width, depth, base.batch)


def run(settings: Settings) -> Iterator[Row]:
    for what, value, net in _curves(settings):
        case = net.case(settings)
        model = case.build().to(settings.device)
        sites = fg.find_sites(model, case.x, include=[pair.producer for pair in case.pairs])
        units = {name: max(1, width // 16) for name, width in sites.widths(model).items()}
        variants = {
            "step": Variant(step, lambda _, c=case, m=model, s=sites: prepared(c, m, s, 1 / 16)),
            "armed": Variant(grown, lambda _, c=case, m=model, s=sites: armed(c, m, s, 1 / 16)),
        }
        if what == "width":
            variants["naive"] = Variant(
                lambda state, u=units: naive_step(state, u),
                lambda _, c=case, m=model, s=sites: prepared(c, m, s, 1 / 16),
                most=settings.times(1),
            )
        timings = compare(variants, settings.device, settings.times(settings.rounds))
        cost = timings["armed"].minus(timings["step"])
        shape = f"{net.kind}, {net.depth} layers of {net.width}, b{net.batch}, n/16"
        more = {"kind": net.kind, "at": value, "step_ms": timings["step"].p50}
        yield settings.row(BENCHMARK + what, shape, "training step", cost, timings["step"], **more)
        if "naive" in timings:
            other = timings["naive"].minus(timings["step"])
            yield settings.row(BENCHMARK + what, shape, "naive", cost, other, **more)


def draw(rows: Sequence[Row], path: Path) -> bool:
    """A panel for each thing that varies, a line for each network and way; False, and no file, without such rows."""
    own = [row for row in rows if row.benchmark.startswith(BENCHMARK)]
    if not own:
        return False
    import matplotlib
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(f"{row.more['kind']}, {row.kind}" for row in own))
    varied = list(dict.fromkeys(row.benchmark for row in own))
    figure = Figure(figsize=(4 * len(varied), 3.4), layout="constrained")
    panels = figure.subplots(1, len(varied), squeeze=False, sharey=True)[0]
    for axes, benchmark in zip(panels, varied, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in own:
            if row.benchmark == benchmark:
                ours = row.baseline == "training step"
                name = f"{row.more['kind']}, {row.kind}" + ("" if ours else _NAIVE)
                spent = (row.ours_ms if ours else row.baseline_ms) or 0.0
                lines.setdefault(name, []).append((row.more["at"], spent / row.more["step_ms"]))
        for name, points in lines.items():
            places, costs = zip(*points, strict=True)
            colour = f"C{networks.index(name.removesuffix(_NAIVE))}"
            axes.plot(places, costs, "--x" if name.endswith(_NAIVE) else "-o", color=colour, label=name)
        axes.set(xscale="log", yscale="log", xlabel=benchmark.removeprefix(BENCHMARK))
        places = sorted({row.more["at"] for row in own if row.benchmark == benchmark})
        axes.set_xticks(places, [str(place) for place in places], fontsize="small", rotation=60)
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.grid(True, which="both", alpha=0.2)
    panels[0].set_ylabel("growth cost / training step")
    panels[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "fastgrow"}):  # the same rows, the same file
        figure.savefig(path, metadata={"Date": None})
    return True
