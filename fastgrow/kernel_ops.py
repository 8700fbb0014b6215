"""The ops that kernels carry out: tensors in, tensors out, no autograd. People find them in `fastgrow.ops`.

`backend`: "triton" (GPU kernels; on the CPU only in Triton's interpreter), "torch" (ATen calls, any device),
or "auto": Triton for CUDA tensors of a dtype it takes, ATen otherwise. An explicit choice that cannot be
met raises `GrowthError`; only "auto" falls back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import GrowthError
from .kernels import aten, conv_growth_aten, linear_growth
from .kernels.geometry import ConvGeometry, Plan
from .kernels.launch import products_in, triton_missing

__all__ = [
    "Activation",
    "Backend",
    "ConvGeometry",
    "Precision",
    "activation_backward",
    "activation_backward_bias",
    "conv2d_growth_matrix",
    "linear_growth_matrix",
    "sum_of_squares",
    "sums_of_squares",
]

Backend = Literal["auto", "triton", "torch"]
Precision = Literal["float32", "tf32"]
Activation = Literal["relu", "relu1", "relu6", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh", "identity"]

_BACKENDS, _PRECISIONS, _ACTIVATIONS = (get_args(names) for names in (Backend, Precision, Activation))
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_tensors(op: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise GrowthError(f"{op}: {name} is a {type(x).__name__}, wanted a tensor")
    first = next(iter(tensors.values()))
    for name, x in tensors.items():
        if x.dtype not in _DTYPES:
            raise GrowthError(f"{op}: {name} is {x.dtype}, wanted float16, bfloat16, float32 or float64")
        if x.layout != torch.strided:
            raise GrowthError(f"{op}: {name} has layout {x.layout}, wanted a strided tensor: call .to_dense()")
        if x.device != first.device:
            raise GrowthError(f"{op}: {name} is on {x.device}, the others on {first.device}: move it there")


def _check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise GrowthError(f"{op}: {name}={value!r}, wanted one of {', '.join(map(repr, choices))}")


def _use_triton(op: str, backend: Backend, tensor: Tensor, *, float64: bool = False) -> bool:
    """Whether to run the Triton kernel. Raises GrowthError if it was asked for and cannot run."""
    _check_choice(op, "backend", backend, _BACKENDS)
    if backend == "torch" or (backend == "auto" and not tensor.is_cuda):
        return False
    missing = triton_missing(tensor)
    if missing is None and tensor.dtype == torch.float64 and not float64:
        missing = "the kernel takes float16, bfloat16 and float32"
    if missing is None:
        return True
    if backend == "triton":
        raise GrowthError(f"{op}: backend='triton' cannot run: {missing}. Use backend='auto' or 'torch'")
    return False


def sum_of_squares(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """sum_i x_i^2, the numerator of NAGN_l^2 = E[||dL/dz_l||^2 / T_l]: () float32, float64 for float64.

    Any rank and strides (a tensor with gaps is read in place); accumulated in the result's dtype; two runs
    give the same bits. Raises GrowthError for other dtypes or a backend that cannot run.
    """
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.dtype not in _DTYPES:
        _check_tensors("sum_of_squares", x=x)
    x = x.detach()
    if _use_triton("sum_of_squares", backend, x, float64=True):
        from .kernels.sum_of_squares import sums_of_squares as launch

        return launch([x])[0]
    return aten.sum_of_squares(x)


def sums_of_squares(tensors: Sequence[Tensor], *, backend: Backend = "auto") -> Tensor:
    """`sum_of_squares` of many tensors of one device in one call: (len(tensors),), float64 if any tensor is.

    Each value is the same whatever shares the call.
    """
    if not isinstance(tensors, Iterable):
        raise GrowthError(f"sums_of_squares: tensors is a {type(tensors).__name__}, wanted a list of tensors")
    tensors = list(tensors)
    if not tensors:
        return torch.zeros(0, device="cpu")
    _check_tensors("sums_of_squares", **{f"tensor {i}": x for i, x in enumerate(tensors)})
    tensors = [x.detach() for x in tensors]
    if _use_triton("sum_of_squares", backend, tensors[0], float64=True):
        from .kernels.sum_of_squares import sums_of_squares as launch

        return launch(tensors)
    sums = [aten.sum_of_squares(x) for x in tensors]
    wide = torch.float64 if any(s.dtype == torch.float64 for s in sums) else torch.float32
    return torch.stack([s.to(wide) for s in sums])


def _check_activation(op: str, grad: Tensor, x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    _check_choice(op, "activation", activation, _ACTIVATIONS)
    _check_tensors(op, grad=grad, x=x)
    if grad.shape != x.shape:
        raise GrowthError(
            f"{op}: grad has shape {tuple(grad.shape)}, x {tuple(x.shape)}: wanted the same. x is the "
            "activation's input, grad the gradient of its output"
        )
    return grad.detach(), x.detach()


def activation_backward(
    grad: Tensor,
    x: Tensor,
    activation: Activation,
    *,
    negative_slope: float = 0.01,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """g = grad * f'(x) and sum g^2 (g as stored), in one pass: (any shape, dtype of grad), () float32.

    grad = dL/df(x), x: the activation's input, of one shape. f: "relu", "relu1" (f'(0) = 1), "relu6",
    "leaky_relu" (with `negative_slope`), "gelu" (exact), "gelu_tanh", "silu", "tanh", "identity". The sum is
    float64 for float64. Scales with the loss: sum-loss and mean-loss gradients pass through alike.
    Raises GrowthError for unknown activations, shapes that differ, or a backend that cannot run.
    """
    op = "activation_backward"
    grad, x = _check_activation(op, grad, x, activation)
    if _use_triton(op, backend, grad) and _use_triton(op, backend, x):
        from .kernels.activation_backward import activation_backward as launch

        return launch(grad, x, activation, negative_slope)
    result = _aten_activation(grad, x, activation, negative_slope)
    return result, aten.sum_of_squares(result)


def activation_backward_bias(
    grad: Tensor,
    x: Tensor,
    activation: Activation,
    *,
    channel_dim: int = 1,
    negative_slope: float = 0.01,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`activation_backward`, and the bias gradient: g summed over all dimensions but `channel_dim`.

    Returns g, sum g^2 and the (C,) sums in float32 (float64 for float64).
    """
    op = "activation_backward_bias"
    grad, x = _check_activation(op, grad, x, activation)
    if not -grad.dim() <= channel_dim < grad.dim():
        raise GrowthError(f"{op}: channel_dim={channel_dim} for a tensor of {grad.dim()} dimensions")
    channel_dim %= grad.dim()
    if _use_triton(op, backend, grad) and _use_triton(op, backend, x):
        from .kernels.activation_backward import activation_backward_bias as launch

        return launch(grad, x, activation, channel_dim, negative_slope)
    result = _aten_activation(grad, x, activation, negative_slope)
    others = [d for d in range(grad.dim()) if d != channel_dim]
    wide = torch.promote_types(result.dtype, torch.float32)
    sums = result.sum(others, dtype=wide) if others else result.to(wide)
    return result, aten.sum_of_squares(result), sums


def _aten_activation(grad: Tensor, x: Tensor, activation: str, negative_slope: float) -> Tensor:
    if grad.dtype == x.dtype:
        return aten.activation_backward(grad, x, activation, negative_slope)
    wide = torch.promote_types(grad.dtype, x.dtype)
    return aten.activation_backward(grad.to(wide), x.to(wide), activation, negative_slope).to(grad.dtype)


def _check_out(
    op: str, out: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, grad_output: Tensor, input: Tensor
) -> None:
    if out is None:
        return
    like = grad_output
    if not isinstance(out, Tensor):
        raise GrowthError(f"{op}: out is a {type(out).__name__}, wanted a tensor {shape} {dtype} on {like.device}")
    if any(extent > 1 and stride == 0 for extent, stride in zip(out.shape, out.stride(), strict=True)):
        raise GrowthError(f"{op}: out is expanded, so its entries share memory: call .clone()")
    for name, x in (("grad_output", grad_output), ("input", input)):
        if _overlap(out, x):
            raise GrowthError(f"{op}: out shares memory with {name}, which is read while out is written; clone one")
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != like.device:
        raise GrowthError(
            f"{op}: out is {tuple(out.shape)} {out.dtype} on {out.device}, wanted {shape} {dtype} on {like.device}"
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one storage and their extents in it meet."""
    if not a.numel() or not b.numel() or a.is_meta or b.is_meta:
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    (first, last), (other_first, other_last) = (
        (
            x.data_ptr(),
            x.data_ptr() + x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))),
        )
        for x in (a, b)
    )
    return first < other_last and other_first < last


def linear_growth_matrix(
    grad_output: Tensor,
    input: Tensor,
    out: Tensor | None = None,
    *,
    precision: Precision = "float32",
    backend: Backend = "auto",
) -> Tensor:
    """M = sum_n dz_n h_n^T (GradMax eqs. 9, 10, without the division by the number of samples).

    grad_output: (..., O), dL/dz_{l+1}; input: (..., I), h_{l-1}, with the same leading dimensions, which
    are summed over. Returns (O, I), float32 (float64 for float64); `out`, of that shape and dtype and in
    memory of its own, is added to and returned. A mean loss gives the mean over samples, a sum loss the sum.
    One library GEMM; float32 inputs are multiplied in float32 whatever tf32 switches are set, unless
    precision="tf32".
    Raises GrowthError for shapes that do not fit and for backend="triton" (there is no such kernel).
    """
    op = "linear_growth_matrix"
    _check_tensors(op, grad_output=grad_output, input=input)
    _check_choice(op, "precision", precision, _PRECISIONS)
    _check_choice(op, "backend", backend, _BACKENDS)
    if backend == "triton":
        raise GrowthError(f"{op}: backend='triton' has no kernel; it is a library GEMM. Use 'auto' or 'torch'")
    if grad_output.dim() < 1 or input.dim() < 1 or grad_output.shape[:-1] != input.shape[:-1]:
        raise GrowthError(
            f"{op}: grad_output {tuple(grad_output.shape)}, input {tuple(input.shape)}: wanted (..., O) and "
            "(..., I) with the same leading dimensions"
        )
    dz = grad_output.detach().reshape(-1, grad_output.shape[-1]) if grad_output.numel() else None
    h = input.detach().reshape(-1, input.shape[-1]) if input.numel() else None
    shape = (grad_output.shape[-1], input.shape[-1])
    dtype = torch.promote_types(torch.promote_types(grad_output.dtype, input.dtype), torch.float32)
    _check_out(op, out, shape, dtype, grad_output, input)
    if dz is None or h is None:
        return grad_output.new_zeros(shape, dtype=dtype) if out is None else out
    matrix = linear_growth.linear_growth_matrix(dz, h, None if out is None else out.detach(), precision)
    return matrix if out is None else out


def conv2d_growth_matrix(
    grad_output: Tensor,
    input: Tensor,
    producer: ConvGeometry,
    consumer: ConvGeometry,
    out: Tensor | None = None,
    *,
    precision: Precision = "float32",
    backend: Backend = "auto",
) -> Tensor:
    """The exact growth matrix between two convolutions.

    M[(o,a),(i,b)] = sum_{n, y in hidden map} dz[n, o, (y + p2 - d2 a)/s2] h[n, i, s1 y - p1 + d1 b]; a and b
    run over the two spatial taps of consumer (k2, s2, p2, d2) and producer (k1, s1, p1, d1); terms whose
    index is no integer or leaves its map are zero.

    grad_output: (N, O, Ho, Wo), dL/dz_{l+1}; input: (N, I, H, W), h_{l-1}; any strides, channels_last
    costs no copy on a GPU. 1-d convolutions: (N, O, L) and (N, I, L) with geometries of height 1
    (`ConvGeometry.of(conv1d)`). Returns (O kh2 kw2, I kh1 kw1): rows as
    `consumer.weight[:, j].reshape(-1)`, columns as `producer.weight[j].reshape(-1)`; float32, accumulated in
    float32 (float64 for float64); `out` is added to and returned. A mean loss gives the mean over samples, a
    sum loss the sum. Deterministic on Triton. float32 is multiplied as float32 (tf32x3 on tensor cores)
    unless precision="tf32".
    Raises GrowthError for shapes and geometries that do not fit together, and a backend that cannot run.
    """
    op = "conv2d_growth_matrix"
    _check_tensors(op, grad_output=grad_output, input=input)
    _check_choice(op, "precision", precision, _PRECISIONS)
    for name, geometry in (("producer", producer), ("consumer", consumer)):
        if not isinstance(geometry, ConvGeometry):
            raise GrowthError(f"{op}: {name} is {geometry!r}, wanted a ConvGeometry (ConvGeometry.of(module))")
    dz, h = grad_output.detach(), input.detach()
    if dz.dim() == h.dim() == 3 and producer.along(0) == consumer.along(0) == (1, 1, 0, 1):
        dz, h = dz.unsqueeze(2), h.unsqueeze(2)
    if dz.dim() != 4 or h.dim() != 4:
        raise GrowthError(
            f"{op}: grad_output {tuple(grad_output.shape)}, input {tuple(input.shape)}: wanted "
            "(N, O, Ho, Wo) and (N, I, H, W), or (N, O, L) and (N, I, L) with geometries of height 1"
        )
    plan = Plan.of(tuple(dz.shape), tuple(h.shape), producer, consumer)
    dtype = torch.promote_types(dz.dtype, h.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    _check_out(op, out, plan.shape, wide, dz, h)
    if _use_triton(op, backend, dz) and _use_triton(op, backend, h):
        from .kernels.conv_growth import conv2d_growth_matrix_ as launch

        result = torch.empty(plan.shape, dtype=wide, device=dz.device) if out is None else out.detach()
        launch(dz, h, producer, consumer, result, out is not None, precision)
        return result if out is None else out
    with products_in(precision, dz.device):
        matrix = conv_growth_aten.growth_matrix(dz.to(wide), h.to(wide), plan)
    if out is None:
        return matrix
    out.detach().add_(matrix)
    return out
