"""Every Triton kernel as its launcher has it compiled: what `compile_only` builds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from fastgrow.kernels import activation_backward, block_norms, block_update, conv_growth, sum_of_squares
from fastgrow.kernels.block_table import SCALARS
from triton.runtime.jit import JITFunction

CUDA = ("80", "90", "100")
ALL = (*CUDA, "gfx942")
_TYPES = {"fp32": triton.language.float32, "fp64": triton.language.float64, "bf16": triton.language.bfloat16}


@dataclass(frozen=True)
class Spec:
    """One kernel with the types and constants that its launcher gives it."""

    name: str
    kernel: JITFunction
    types: dict[str, str]  # pointers; scalars not named are int32
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    ones: tuple[str, ...] = ()  # integers that are 1: Triton makes constants of them
    odd: bool = False  # no integer is a multiple of 16
    tensor_cores: bool = False
    archs: tuple[str, ...] = ALL


def _conv(
    label: str,
    dtype: str,
    rows: int,
    columns: int,
    batch: int,
    precision: str = "tf32x3",
    **extra: Any,
) -> Spec:
    tile = conv_growth.tile_for(rows, columns, batch, 32 if dtype == "fp32" else 16)
    constants = dict(
        STEP_Y=1,
        STEP_X=2,
        ALIGNED=tile.padded > 0,
        UPCAST=False,
        PRECISION=precision if dtype == "fp32" else "ieee",
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
    )
    types = dict(dz_ptr=dtype, h_ptr=dtype, jobs_ptr="i32", partials_ptr="fp32")
    return Spec(
        f"conv {label} {dtype} {precision}",
        conv_growth._conv_growth_kernel,
        types,
        constants,
        tile.warps,
        tile.stages,
        tensor_cores=True,
        **extra,
    )


def _growth() -> list[Spec]:
    found = [
        _conv("large", "bf16", 512, 512, 128),
        _conv("square", "fp16", 128, 128, 128, archs=CUDA),
        _conv("large", "fp32", 512, 512, 128, archs=CUDA),
        _conv("large", "fp32", 512, 512, 128, "tf32", archs=CUDA),
        _conv("large", "fp32", 512, 512, 128, "ieee", archs=("gfx942",)),
        _conv("middle", "fp32", 64, 64, 32, archs=CUDA),
        _conv("middle", "bf16", 64, 64, 7, archs=CUDA),
        _conv("large, any batch", "fp32", 512, 512, 7, archs=CUDA),
        _conv("small, odd", "fp32", 16, 3, 5, archs=CUDA, odd=True),
        _conv("all ones", "bf16", 1, 1, 1, ones=("batch", "rows", "columns", "stride_gx"), archs=CUDA),
    ]
    gather = dict(partials_ptr="fp32", starts_ptr="i32", lists_ptr="i32", out_ptr="fp32")
    for accumulate in (False, True):
        constants = dict(ACCUMULATE=accumulate, BLOCK=512)
        ones = ("rows", "columns", "row_taps", "column_taps", "longest", "stride_on") if accumulate else ()
        name = f"gather jobs, accumulate={accumulate}"
        archs = CUDA if accumulate else ALL
        kernel = conv_growth._gather_jobs_kernel
        found.append(Spec(name, kernel, gather, constants, ones=ones, archs=archs))
    for dtype, acc in (("fp32", "fp32"), ("fp64", "fp64")):
        wide = triton.language.float64 if acc == "fp64" else triton.language.float32
        pointers = dict(x_ptr=dtype, partials_ptr=acc)
        constants = dict(ACC=wide, BLOCK=sum_of_squares.BLOCK)
        archs = ALL if dtype == "fp32" else CUDA
        kernel = sum_of_squares._sum_of_squares_kernel
        found.append(Spec(f"squares {dtype}", kernel, pointers, constants, 8, archs=archs))
    pointers = dict(x_ptr="fp32", partials_ptr="fp32")
    constants = dict(ACC=triton.language.float32, BLOCK=sum_of_squares.BLOCK)
    one = dict(ones=("elements",), archs=CUDA)
    found += [
        Spec("squares of one", sum_of_squares._sum_of_squares_kernel, pointers, constants, 8, **one),
        Spec(
            "squares, strided",
            sum_of_squares._strided_sum_of_squares_kernel,
            pointers,
            constants,
            8,
            ones=("size_1", "size_2", "stride_3"),
            odd=True,
        ),
        Spec(
            "squares, many",
            sum_of_squares._sums_of_squares_kernel,
            dict(table_ptr="i64", partials_ptr="fp32"),
            dict(DTYPE=triton.language.bfloat16, **constants),
            8,
        ),
        Spec(
            "add partials",
            sum_of_squares._add_partials_kernel,
            dict(partials_ptr="fp32", out_ptr="fp32"),
            dict(SLOTS=1024),
            ones=("programs",),
        ),
        Spec(
            "add rows",
            activation_backward._add_rows_kernel,
            dict(rows_ptr="fp32", out_ptr="fp32"),
            dict(BLOCK_C=128),
            ones=("rows", "channels"),
        ),
    ]
    for activation, dtype in (("relu1", "bf16"), ("gelu", "fp32"), ("gelu_tanh", "fp16")):
        pointers = dict.fromkeys(("grad_ptr", "x_ptr", "out_ptr"), dtype) | {"slope": "fp32"}
        flat = dict(ACTIVATION=activation, BLOCK=4096)
        archs = ALL if activation == "gelu" else CUDA
        found.append(
            Spec(
                f"activation {activation} {dtype}",
                activation_backward._activation_backward_kernel,
                pointers | {"partials_ptr": "fp32"},
                flat,
                8,
                archs=archs,
            )
        )
        last = activation != "gelu"
        block_c, block_i, _ = activation_backward.bias_tiles(32, 64, 3136, last)
        found.append(
            Spec(
                f"activation and bias {activation} {dtype}",
                activation_backward._activation_backward_bias_kernel,
                pointers | {"squares_ptr": "fp32", "channels_ptr": "fp32"},
                dict(ACTIVATION=activation, BLOCK_C=block_c, BLOCK_I=block_i),
                8,
                ones=("outer", "stride_c") if last else ("stride_i",),
                archs=archs,
            )
        )
    return found


def _optimizers() -> list[Spec]:
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


def specs() -> list[Spec]:
    return [*_growth(), *_optimizers()]
