"""Command line: what is installed here, and what can grow in a model."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

import fastgrow as fg

from .errors import GrowthError
from .kernels import block_update_cpu


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastgrow", description="Grow networks while they train.")
    parser.add_argument("--version", action="version", version=f"fastgrow {_version('fastgrow')}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="versions, devices, and the backend that each device gets")
    sites = commands.add_parser("sites", help="what can grow in a model, and what cannot and why")
    sites.add_argument(
        "factory",
        metavar="MODULE:FACTORY",
        help="a callable that returns the model, or the model and its example inputs",
    )
    sites.add_argument(
        "--input",
        nargs="+",
        metavar="SHAPE",
        help="shapes of the example inputs, such as 2x3x32x32; 2x16:int64 for token ids (zeros)",
    )
    options = parser.parse_args(arguments)
    if options.command == "env":
        print(_environment())
        return 0
    try:
        print(_sites(options.factory, options.input))
    except GrowthError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _environment() -> str:
    lines = [
        ("fastgrow", _version("fastgrow")),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} CPU threads"),
        *((name, _version(name)) for name in ("triton", "numpy", "scikit-learn", "matplotlib", "rich")),
        ("device cpu", f"backend torch; fastgrow.optim: {block_update_cpu.missing() or 'the compiled loop'}"),
    ]
    has_triton = importlib.util.find_spec("triton") is not None
    interpreted = has_triton and os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted:
        lines.append(("", "TRITON_INTERPRET=1: Triton kernels asked for by name run in the interpreter"))
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        backend = "triton" if has_triton else "torch (Triton is not installed)"
        lines.append(
            (
                f"device cuda:{index}",
                f"backend {backend}; {device.name}, sm_{device.major}{device.minor}, "
                f"{device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}",
            )
        )
    if not torch.cuda.device_count():
        lines.append(("device cuda", "none"))
    return "\n".join(f"{name:<14}{value}" for name, value in lines)


def _sites(factory: str, shapes: Sequence[str] | None) -> str:
    model, inputs = _build(factory)
    if shapes is not None:
        inputs = tuple(_example(shape) for shape in shapes)
    if inputs is None:
        raise GrowthError(f"{factory} gives a model without example inputs; name their shapes: --input 2x3x32x32")
    sites = fg.find_sites(model.eval(), inputs)
    rows = [("site", "width", "multiple", "producers", "consumers")]
    rows += [
        (site.name, str(site.width), str(site.multiple), ", ".join(site.producers), ", ".join(site.consumers))
        for site in sites
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.append(f"{len(sites)} sites can grow")
    if sites.frozen:
        lines.append(f"\n{len(sites.frozen)} layers cannot grow:")
        lines += [f"  {name}: {reason}" for name, reason in sites.frozen.items()]
    return "\n".join(lines)


def _build(factory: str) -> tuple[nn.Module, Any]:
    """The model that MODULE:FACTORY names or makes, and its example inputs if it comes with some."""
    module_name, separator, path = factory.partition(":")
    if not (separator and module_name and path):
        raise GrowthError(f"{factory!r} was given; wanted MODULE:FACTORY, as in torchvision.models:vgg11")
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise GrowthError(f"{factory} cannot be loaded: {error}") from error
    made = found if isinstance(found, nn.Module) or not callable(found) else found()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise GrowthError(
            f"{factory} gives {type(model).__name__}; wanted an nn.Module, or a pair of it and example inputs"
        )
    return model, inputs


def _example(text: str) -> torch.Tensor:
    """Zeros of the shape and dtype that `text` names: ``2x3x32x32``, ``2x16:int64``."""
    shape, _, dtype_name = text.partition(":")
    dtype = getattr(torch, dtype_name or "float32", None)
    if not re.fullmatch(r"\d+(x\d+)*", shape) or not isinstance(dtype, torch.dtype):
        raise GrowthError(f"--input {text!r} was given; wanted a shape such as 2x3x32x32 or 2x16:int64")
    return torch.zeros(*map(int, shape.split("x")), dtype=dtype)


if __name__ == "__main__":
    sys.exit(main())
