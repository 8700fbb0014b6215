"""``python -m bench [--suite ...] [--device ...] [--quick] [--out DIR]``, ``methods`` and ``report``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory; it need not announce itself

import torch

from . import compiling, curves, directions, growth, memory, methods, nagn, ops, optim, report, streaming
from .rows import ROOT, Row, Settings, table, write_rows

SUITES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "ops": ops.run,
    "directions": directions.run,
    "growth": growth.run,
    "streaming": streaming.run,
    "nagn": nagn.run,
    "optim": optim.run,
    "memory": memory.run,
    "curves": curves.run,
    "compiling": compiling.run,
}
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure what growing costs. python -m bench methods --help: compare how and where to grow.",
    )
    parser.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--suite", nargs="+", choices=(*SUITES, "all"), default=["all"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds; rows only with --out")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of what is worth that many")
    parser.add_argument("--out", type=Path, help=f"folder of the JSON rows ({RESULTS.relative_to(ROOT)})")
    parser.add_argument("--docs", type=Path, default=PAGE, help="the page that report writes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run suites, print their rows as they come, write one file for each; or write the report; or `methods`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["methods"]:
        return methods.main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "report":
        report.write(options.out or RESULTS, options.docs)
        print(f"{options.docs} written")
        compared, page = (options.out or RESULTS) / methods.RESULTS.name, options.docs.with_name("methods.md")
        if compared.exists():
            from . import methods_page  # draws: needs matplotlib

            methods_page.write(compared, page)
            print(f"{page} written")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: wanted at least 2, for a median of differences")
    out = options.out or (None if options.quick else RESULTS)
    settings = Settings(torch.device(options.device), options.quick, options.rounds)
    print(table([]))
    for suite in SUITES if "all" in options.suite else dict.fromkeys(options.suite):
        started = time.perf_counter()
        rows = []
        for row in SUITES[suite](settings):
            rows.append(settings.complete(row))
            print(table([row], header=False), flush=True)
            if out is not None:
                write_rows(out, suite, options.device, rows)
        print(f"# {suite}: {len(rows)} rows in {time.perf_counter() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
