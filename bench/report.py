"""docs/performance.md from the rows: every target, what was measured, met or missed, and where we lose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import curves
from .roofline import H200, predictions
from .rows import Row, read_rows

__all__ = ["TARGETS", "Target", "render", "write"]


@dataclass(frozen=True)
class Target:
    """One line of the design's table. bounds: {"cpu": ..., "cuda": ...}, None where there is no target.

    at_least: the value is a gain (baseline / ours), to be at least the bound; otherwise a cost
    (ours / baseline), to be at most it.
    """

    what: str
    against: str
    bounds: dict[str, float | None]
    chosen: Callable[[Row], bool]
    at_least: bool = True
    value: Callable[[Row], float | None] = lambda row: row.ratio
    unit: str = "x"
    predicted: str = ""  # the line of `roofline.predictions` that speaks of it

    def measured(self, row: Row) -> float | None:
        value = self.value(row)
        if value is None or self.at_least:
            return value
        return 1 / value if value else None

    def reached(self, measured: float, bound: float) -> bool:
        return measured >= bound if self.at_least else measured <= bound

    def text(self, kind: str) -> str:
        bound = self.bounds[kind]
        sign = "≥" if self.at_least else "≤"
        return "–" if bound is None else f"{sign} {bound:g}{self.unit}"


def _is(benchmark: str, baseline: str = "", group: str = "", text: str = "") -> Callable[[Row], bool]:
    def chosen(row: Row) -> bool:
        return (
            row.benchmark == benchmark
            and row.baseline.startswith(baseline)
            and (not group or row.group == group)
            and text in row.shape
        )

    return chosen


def _of(cpu: float | None, cuda: float | None) -> dict[str, float | None]:
    return {"cpu": cpu, "cuda": cuda}


def _paired(row: Row) -> float | None:
    """The upper end of the confidence interval of ours / baseline, as a gain."""
    high = row.more.get("high")
    return 1 / high if high else None


def _captured(row: Row) -> float | None:
    return row.more.get("captured")


def _gain(
    what: str, against: str, cpu: float | None, cuda: float | None, chosen: Callable[[Row], bool], predicted: str = ""
) -> Target:
    return Target(what, against, _of(cpu, cuda), chosen, predicted=predicted)


def _cost(
    what: str, against: str, cpu: float | None, cuda: float | None, chosen: Callable[[Row], bool], predicted: str = ""
) -> Target:
    return Target(what, against, _of(cpu, cuda), chosen, at_least=False, predicted=predicted)


_STEP, _COST, _CONV, _RATE = "one training step", "growth cost", "conv growth matrix", "rate-adapted step"
_UNFOLD, _AUXILIARY = "`unfold` + weight gradient", "weight gradient of the inexact auxiliary conv"
_SVD, _NORM = "loop of `torch.linalg.svd`", "torch.linalg.vector_norm"
TARGETS = [
    _gain("growth cost of a GradMax step, widths >= 256, + n/16", "naive", 20, 100, _is(_COST, "naive", "wide")),
    _gain("the same, convolutions", "GroMo", 100, None, _is(_COST, "GroMo", "conv")),
    _gain("the same, linear 2048", "GroMo", 50, None, _is(_COST, "GroMo", "linear")),
    _cost("the same, + n/16", _STEP, 0.5, 0.25, _is(_COST, "training step", "wide", "n/16"), "growth n/16"),
    _cost("the same, + n/4", _STEP, None, None, _is(_COST, "training step", "wide", "n/4"), "growth n/4"),
    _gain("the same, narrower sites too, + n/16", "naive", None, None, _is(_COST, "naive", "narrow")),
    _cost("the same, narrower sites too, + n/16", _STEP, None, None, _is(_COST, "training step", "narrow", "n/16")),
    _cost("the same, residual streams too", _STEP, 0.5, 0.25, _is(_COST, "training step", "streams", "n/16")),
    _gain("exact conv growth matrix, maps >= 28 x 28", _UNFOLD, 3, 3, _is(_CONV, "unfold", "large map"), "unfold"),
    _gain("the same, smaller maps", _UNFOLD, 1.5, 1.5, _is(_CONV, "unfold", "small map"), "unfold"),
    _cost("the same, maps >= 28 x 28", _AUXILIARY, 2, 2, _is(_CONV, "weight gradient", "large map"), "auxiliary"),
    _cost("the same, smaller maps", _AUXILIARY, 3, 3, _is(_CONV, "weight gradient", "small map"), "auxiliary"),
    _gain("implicit-GEMM kernel alone", "the measured matmul peak", None, 0.6, _is("implicit GEMM kernel")),
    _gain("directions of all sites", _SVD, 20, 100, _is("directions", "loop"), "directions"),
    _gain("directions of all sites, matrix-free", _SVD, 20, 100, _is("directions, matrix-free", "loop")),
    Target(
        "captured norm (the true one)",
        "the exact optimum",
        _of(0.999, 0.999),
        lambda row: row.benchmark.startswith("directions"),
        value=_captured,
        unit="",
    ),
    Target(
        "a training step with NAGN on (upper end of the 95 % interval)",
        "without",
        _of(1.02, 1.01),
        _is("NAGN", "training step without"),
        at_least=False,
        value=_paired,
        predicted="nagn",
    ),
    _cost("sum of squares", f"`{_NORM}`", 1.05, None, _is("sum of squares", _NORM, "large")),
    _gain(
        "sum of squares",
        "copy bandwidth",
        None,
        0.9,
        _is("sum of squares", "copy bandwidth", "large"),
        "sum",
    ),
    _cost("rate-adapted SGD / Adam step", "`torch.optim` foreach", 1.2, 1.1, _is(_RATE, group="foreach")),
    _cost("the same", "`torch.optim` fused", 1.2, 1.1, _is(_RATE, group="fused"), "rate-adapted"),
    _cost(
        "peak memory of a growth step, + n/16",
        "of a training step",
        1.2,
        1.1,
        _is("peak memory", "training", text="n/16"),
    ),
    _cost("the same, + n/4", "of a training step", None, None, _is("peak memory", "training", text="n/4")),
]
REASONS = {
    "growth cost": (
        "A growth's cost over its training step is (2/3) R r / w for R rounds of r columns at a site of width"
        " w, if thin products ran at the speed of wide ones; a CPU convolution of 16 channels runs at half "
        "the rate of one of 64. n/16 of 256 needs R <= 12 to stay below half a step, n/16 of 64 R <= 3. "
        "Linear layers add the orthogonalisation of the basis, 4 R m r^2, which outweighs the products once R"
        " r exceeds the rows of the batch. The naive way is close where its matrices are small, for its SVD "
        "grows with the cube of their side."
    ),
    "directions": (
        "A full SVD of n x n is about 20 n^3 FLOPs, block Krylov 4 R r n^2: the gain is 5 n / (R r), so it "
        "falls with the number of directions asked (k = 128 of 2048) and with the rounds that a flat spectrum"
        " takes."
    ),
    "directions, matrix-free": (
        "Products with the two stored tensors instead of the matrix: cheaper where the matrix is never "
        "formed, dearer than products with a matrix that is there already, as in this row."
    ),
    "conv growth matrix": (
        "Distinct distances between taps save most with stride 1 and k = 3 on both sides (25 of 81 products);"
        " a stride or a 1 x 1 side leaves little to save, and the frame of a small map is most of it."
    ),
    "NAGN": (
        "A read of every output gradient is 1 to 2 % of a step in bytes; where a net has many small maps the calls"
        " count: ResNet-50 on 64 x 64 spends 11 ms of a step of 265 in its hooks. `Grower(every=n)` makes that 1/n."
    ),
    "rate-adapted step": (
        "The compiled loop moves the bytes that torch's fused step moves; norms add a read from the first cache, and"
        " Python that is no longer in the caches takes up to a tenth of a ResNet-18-like step. Where the loop is not"
        " built, blocks are stepped apart by torch's kernels."
    ),
    "peak memory": (
        "At n/4 the grown network itself is up to 1.56x the old one, and its own next training step takes as much or "
        "more; widening stays below that, for tensors give way one by one. What is left is the solve at the end of the "
        "backward pass, where all gradients stand: a site's two captured tensors and the factors of its matrix."
    ),
}
"""Why a benchmark's rows miss their targets, where they do."""
_KINDS = {"cpu": "CPU", "cuda": "GPU"}


def _figure(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.4f}" if 0.99 < value < 1 else f"{value:.3g}"


def _cell(target: Target, rows: Sequence[Row], kind: str) -> str:
    """Target, worst and best of what was measured, and the verdict on the worst."""
    bound = target.bounds[kind]
    values = [v for row in rows if target.chosen(row) if (v := target.measured(row)) is not None]
    if not values:
        return "–" if bound is None else f"{target.text(kind)}: not measured"
    worst, best = min(values), max(values)
    if not target.at_least:
        worst, best = best, worst
    shown = _figure(worst) if len(values) == 1 else f"{_figure(worst)} to {_figure(best)}"
    if bound is None:
        return f"no target: {shown}{target.unit}"
    met = [target.reached(value, bound) for value in values]
    if all(met):
        verdict = "**met**"
    else:
        off = bound / worst if target.at_least else worst / bound
        verdict = f"**missed** by {_figure(off)}x at worst, {sum(met)} of {len(met)} rows met"
    return f"{target.text(kind)}: {shown}{target.unit}, {verdict}"


def _predicted(target: Target) -> str:
    if not target.predicted:
        return "–"
    least, most = predictions()[target.predicted]
    shown = _figure(least) if least == most else f"{_figure(least)} to {_figure(most)}"
    return f"{shown}{target.unit}"


def _losses(rows: Sequence[Row]) -> list[tuple[float, Target, Row, float]]:
    """Rows that miss their target, the worst first."""
    missed = []
    for target in TARGETS:
        for row in rows:
            bound = target.bounds.get(row.kind)
            value = target.measured(row) if target.chosen(row) else None
            if bound is not None and value is not None and not target.reached(value, bound):
                missed.append((bound / value if target.at_least else value / bound, target, row, value))
    return sorted(missed, key=lambda entry: -entry[0])


def _three(p20: float | None, p50: float | None, p80: float | None, alone: float | None) -> str:
    if p50 is None:
        return "–" if alone is None else _figure(alone)
    return " / ".join(_figure(value) for value in (p20, p50, p80) if value is not None)


def _row(row: Row) -> str:
    more = ", ".join(
        f"{key} {_figure(value) if isinstance(value, float) else value}"
        for key, value in row.more.items()
        if value is not None and key not in ("threads", "load")
    )
    cells = (
        row.shape,
        _three(row.p20, row.p50, row.p80, row.ours_ms),
        row.baseline,
        _three(row.baseline_p20, row.baseline_p50, row.baseline_p80, row.baseline_ms),
        "–" if row.ratio is None else _figure(row.ratio),
        "–" if row.peak_mb is None else _figure(row.peak_mb),
        "–" if row.baseline_peak_mb is None else _figure(row.baseline_peak_mb),
        more or "–",
    )
    return "| " + " | ".join(cells) + " |"


def _conditions(rows: Sequence[Row]) -> list[str]:
    lines = []
    for kind, name in _KINDS.items():
        own = [row for row in rows if row.kind == kind]
        if not own:
            lines.append(f"- {name}: not measured.")
            continue
        devices, torches, tritons, commits = (
            ", ".join(sorted({str(getattr(row, key)) for row in own}))
            for key in ("device", "torch", "triton", "commit")
        )
        threads = ", ".join(sorted({str(row.more.get("threads")) for row in own}))
        loads = [row.more["load"] for row in own if row.more.get("load") is not None]
        load = f", load of the machine up to {max(loads):g}" if loads else ""
        dates = sorted(row.date for row in own)
        lines.append(
            f"- {name}: {devices}, {threads} threads, torch {torches}, Triton {tritons}, commit {commits}, "
            f"{dates[0]} to {dates[-1]} UTC{load}."
        )
    return lines


def render(rows: Sequence[Row], picture: str | None = None) -> str:
    """The whole page; the same rows give the same text. picture: of the growth costs."""
    lines = [
        "# Performance",
        "",
        "Generated by `make report` from the rows in `bench/results` (`make bench`, `make gpu`).",
        "Each ratio comes from one run, variants taking turns on the same tensors; medians, with p20 / p50 /",
        "p80 below. A growth's cost is the time of an armed Grower step less that of an unarmed one.",
        "",
        *_conditions(rows),
        "",
        "## Targets",
        "",
        "From the worst row to the best; ≥: how many times less ours takes than the baseline, ≤: how many",
        "times the baseline's it takes.",
        "",
        f"GPU, predicted: floors of FLOPs and bytes at the rates of one {H200.name} (`bench/roofline.py`), without",
        "launches or anything that runs below them; a prediction, not a measurement.",
        "",
        "| what | against | CPU | GPU | GPU, predicted |",
        "|---|---|---|---|---|",
    ]
    by_kind = {kind: [row for row in rows if row.kind == kind] for kind in _KINDS}
    for target in TARGETS:
        cells = [_cell(target, by_kind[kind], kind) for kind in _KINDS]
        lines.append(f"| {target.what} | {target.against} | {cells[0]} | {cells[1]} | {_predicted(target)} |")
    if picture is not None:
        lines += ["", "## Width, batch, depth", "", f"![growth cost over a training step]({picture})"]
    lines += ["", "## Where we lose", ""]
    missed = _losses(rows)
    if not rows:
        lines.append("Nothing was measured yet.")
    elif not missed:
        lines.append("No measured row misses its target.")
    for off, target, row, value in missed:
        where = f"{_KINDS[row.kind]}, {row.shape}"
        lines.append(
            f"- {target.what}, against {target.against}: {_figure(value)}{target.unit} where "
            f"{target.text(row.kind)} is wanted ({_figure(off)}x off); {where}."
        )
    reasons = {REASONS[row.benchmark]: None for _, _, row, _ in missed if row.benchmark in REASONS}
    if reasons:
        lines += ["", "Why, by the arithmetic of `bench/NOTES.md`:", "", *(f"- {reason}" for reason in reasons)]
    for kind, name in _KINDS.items():
        for benchmark in dict.fromkeys(row.benchmark for row in by_kind[kind]):
            lines += [
                "",
                f"## {name}: {benchmark}",
                "",
                "| shape | ours, ms | baseline | ms | ratio | MB | baseline MB | more |",
                "|---|---|---|---|---|---|---|---|",
                *(_row(row) for row in by_kind[kind] if row.benchmark == benchmark),
            ]
    return "\n".join(lines) + "\n"


def write(results: Path, page: Path) -> None:
    """Render the rows of a folder into a page, and their curves into a picture beside it."""
    rows = read_rows(results)
    page.parent.mkdir(parents=True, exist_ok=True)
    picture = page.with_name("growth_cost.svg")
    drawn = curves.draw(rows, picture)
    page.write_text(render(rows, picture.name if drawn else None))
