"""Teacher and student: section 4.1 and appendix D of GradMax (Evci et al., ICLR 2022).

A student network learns the function of a random teacher and grows to its size while it trains. Examples:

    python examples/teacher_student.py --case small --seeds 5 --json small.json
    python examples/teacher_student.py --case large --protocol notebook --figure 3b --out figures
    python examples/teacher_student.py --case small --methods gradmax tiny splitting net2net

Protocols: "paper": the text's: teacher weights from U[-1, 1], a teacher and 1000 gaussian points for each seed.
"notebook": the authors' published notebook: 10 input dimensions, one teacher shared by all seeds, the framework's
default initialisation (Keras': Glorot uniform, biases zero). Not in the text, and so options here: the student's
initialisation (--init), the norm of new units (--scale times the mean norm of the present ones), the sizes of the
convolutional case, and GradMaxOpt's learning rate (--opt-rate).

All seeds of a method train at once, stacked into one network of batched products, where the method grows each of them
as it would alone (`teacher_stack.METHODS`, the cases small and large); the other seeds train one by one. A method that
fails is named under "failed" in the JSON; the others run on, what they found is written, and the program ends with the
error. variance_transfer adds units in pairs and is refused where growths are odd, as in all four cases here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one, however it was loaded

from teacher_figures import FIGURES, draw
from teacher_training import BASELINES, CASES, Case, Run, gradient_norms, least_units, methods_of, training_curves


def measure(case: Case, methods: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """What --json writes, of the methods that did not fail.

    Milliseconds are of what is trained: where "stacked" is true, of all seeds at once. growth_cost_ms: growth_ms less
    the forward and backward pass that the method makes in it.
    """
    runs = training_curves(case, methods, options)
    norms: dict[str, list[list[float]]] = {}
    try:
        norms = gradient_norms(case, list(runs), options)
    except Exception as error:
        options.failed["grad_norm_after_growth"] = error
    return {
        "case": options.case,
        "protocol": options.protocol,
        "seeds": options.seeds,
        "options": {name: getattr(options, name) for name in ("rate", "scale", "init", "opt_rate", "tuned_rate")},
        "final_loss": {method: [run.losses[-1] for run in each] for method, each in runs.items()},
        "curves": {method: [run.losses[::10] for run in each] for method, each in runs.items()},
        "relative_norms": {method: [run.norms for run in each] for method, each in runs.items()},
        "grad_norm_after_growth": norms,
        "growth_ms": {
            m: statistics.median(ms) for m, each in runs.items() if (ms := [t for r in each for t in r.growth_ms])
        },
        "growth_cost_ms": {
            m: statistics.median([t for r in each for t in r.growth_ms]) - _pass_ms(m, each, options)
            for m, each in runs.items()
            if any(r.growth_ms for r in each)
        },
        "stacked": {method: each[0].together for method, each in runs.items()},
        "step_ms": {method: statistics.median(run.step_ms for run in each) for method, each in runs.items()},
        "flops_vs_big": {
            method: 1.0
            if method == "baseline_big"
            else case.flops({} if method == "baseline_small" else case.growths, case.start)
            for method in runs
        },
    }


def _pass_ms(method: str, runs: Sequence[Run], options: argparse.Namespace) -> float:
    """The forward and backward pass that a growth by this method makes, as a training step makes it."""
    how = methods_of(options)[method]()
    return statistics.median(run.pass_ms for run in runs) if how.needs_directions or how.needs_closure else 0.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=sorted(CASES), help="default: small, or the figure's")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--protocol", choices=("paper", "notebook"), default="paper")
    parser.add_argument("--methods", nargs="+", help="default: gradmax gradmax_opt random and the baselines")
    parser.add_argument("--figure", choices=list(FIGURES), help="compute (and draw, with matplotlib) this figure")
    parser.add_argument("--out", type=Path, default=Path("out/teacher_student"), help="folder of the figures")
    parser.add_argument("--steps", type=int, help="train for fewer steps than the protocol says")
    parser.add_argument("--rate", type=float, default=0.1, help="SGD's learning rate")
    parser.add_argument("--scale", type=float, default=1.0, help="norm of new units, in mean norms of the present")
    parser.add_argument("--alone", action="store_true", help="train the seeds one by one, not stacked")
    parser.add_argument("--init", choices=("torch", "glorot", "uniform"), help="the student's initialisation")
    parser.add_argument("--opt-rate", type=float, default=1e-3, help="Adam's rate in gradmax_opt")
    parser.add_argument("--tuned-rate", type=float, default=1e-1, help="Adam's rate in gradmax_opt_tuned")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds} was given; wanted at least 1")
    if options.case is None:
        options.case = FIGURES[options.figure][0] if options.figure else "small"
    if options.init is None:
        options.init = "glorot" if options.protocol == "notebook" else "torch"
    case = CASES[options.case]
    if options.steps is not None and options.steps <= case.first:
        parser.error(
            f"--steps {options.steps}: the first growth of --case {options.case} comes after {case.first} steps; "
            f"wanted at least {case.first + 1}"
        )
    options.failed = {}
    known = [*methods_of(options), *BASELINES]
    if options.methods is None:
        options.methods = ["gradmax", "gradmax_opt", "random", *BASELINES]
        if options.figure == "13a":
            options.methods.insert(3, "zero_both")
    for method in options.methods:
        if method not in known:
            parser.error(f"--methods {method}: unknown; choose from {', '.join(known)}")
        if case.units % least_units(method):
            parser.error(
                f"--methods {method}: it adds units in pairs, and --case {options.case} grows by {case.units} at a "
                "time up to the teacher's width"
            )
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.set_num_threads(1)  # products this small only lose by being shared out
    case = CASES[options.case]
    if options.protocol == "notebook" and case.kind == "mlp":
        case = replace(case, inputs=10)
    if options.steps is not None:
        kept = [step for step in case.growths if step < options.steps]
        case = replace(case, steps=options.steps, hidden=case.start + case.units * len(kept))
    if options.figure is not None:
        lines = FIGURES[options.figure][1](case, options.methods, options)
        result: dict[str, Any] = {"case": options.case, "figure": options.figure, "lines": lines}
        if lines:
            draw(options.figure, lines, options.out / f"figure_{options.figure}.png")
            print(f"{options.out / f'figure_{options.figure}.png'} written")
    else:
        result = measure(case, options.methods, options)
        for method, ms in result["growth_ms"].items():
            cost, step = result["growth_cost_ms"][method], result["step_ms"][method]
            of = f" of {options.seeds} seeds at once" if result["stacked"][method] else ""
            print(f"{method:20s} growth {ms:.2f} ms, its cost {cost:.2f} ms, training step {step:.2f} ms{of}")
    result["failed"] = {what: f"{type(error).__name__}: {error}" for what, error in options.failed.items()}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))
    for error in options.failed.values():  # what the others found is written
        raise error
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
