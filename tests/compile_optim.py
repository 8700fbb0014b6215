"""Compiles the optimizers' kernels ahead of time, as `compile_only` does; one JSON object per line."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import compile_only
import triton
from compile_only import CUDA, Spec
from fastgrow.kernels import block_norms, block_update
from fastgrow.kernels.block_table import SCALARS

_TYPES = {"fp32": triton.language.float32, "fp64": triton.language.float64, "bf16": triton.language.bfloat16}


def specs() -> list[Spec]:
    """Each kernel in one dtype, and Adam, the longest, in all of them and unaligned."""
    found = []
    flags = dict(MAXIMIZE=False, NORMS=True, SCALARS=SCALARS)
    adam = dict(AMSGRAD=True, DECOUPLED=True, **flags)
    sgd = dict(MOMENTUM=True, NESTEROV=True, **flags)
    for name, kernel, extra, dtype, aligned, archs in (
        ("block norms", block_norms.block_norms_kernel, {}, "bf16", True, CUDA),
        ("sgd", block_update._sgd_kernel, sgd, "fp32", True, CUDA),
        ("adam", block_update._adam_kernel, adam, "fp32", True, CUDA),
        ("adam", block_update._adam_kernel, adam, "bf16", False, CUDA),
        ("adam", block_update._adam_kernel, adam, "fp64", True, CUDA),
        ("avagrad", block_update._avagrad_kernel, flags, "fp32", True, CUDA),
    ):
        acc = "fp64" if dtype == "fp64" else "fp32"
        types = dict(pointers_ptr="i64", geometry_ptr="i64", blocks_ptr="i32", tiles_ptr="i32")
        types |= dict.fromkeys(("scalars_ptr", "ratio_ptr", "partial_ptr", "eta_ptr"), acc)
        constants: dict[str, Any] = dict(DTYPE=_TYPES[dtype], ACC=_TYPES[acc], POINTERS=5, MAX_BLOCKS=4)
        constants |= dict(FIELDS=block_norms.FIELDS, BLOCK_A=block_norms.BLOCK_A, BLOCK_B=block_norms.BLOCK_B)
        constants |= dict(ALIGNED=aligned, **extra)
        found.append(Spec(f"{name} {dtype}", kernel, types, constants, archs=archs))
    finish = dict.fromkeys(("partial_ptr", "sums_ptr", "counts_ptr", "waiting_ptr", "ratio_ptr"), "fp32")
    constants = dict(FIELDS=block_norms.FIELDS, MAX_BLOCKS=4, ROWS=128, RATIO=True)
    types = dict(geometry_ptr="i64", adapt_ptr="i32", **finish)
    found.append(Spec("finish", block_norms.finish_kernel, types, constants, archs=CUDA))
    return found


def main() -> None:
    compile_only.specs = specs
    for index, spec in enumerate(specs()):
        for arch in spec.archs:
            print(json.dumps(asdict(compile_only.build(index, arch))), flush=True)


if __name__ == "__main__":
    sys.exit(main())
