"""TINY's matrix: the gradient that no present weight can follow, whitened by the covariance of what is read.

Verbockhaven, Rudkiewicz, Chevallier, Charpiat, "Growing Tiny Networks", TMLR 2024.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from .errors import GrowthError
from .growth_map import growth_map
from .layout import whole_unit_positions
from .operators import LinearMap
from .replay import Capture, Replay, ReplayMap
from .site_view import SiteView
from .sites import LayerCall, Slot
from .sites.nodes import bind
from .solve import Directions, solve

__all__ = ["NaturalDirections", "natural_directions", "own_part", "present_rows"]

_BLOCK = 128  # identity columns that are replayed at once
_CUTOFF = {torch.float32: 1e-5, torch.float64: 1e-10}  # eigenvalues below this share of the largest are noise


@dataclass(frozen=True, slots=True)
class NaturalDirections(Directions):
    """Singular triplets of ``M_perp S^(-1/2)``; right: S^(-1/2) times its right singular vectors.

    slopes: (k,), ``||M^T u_i||``, the plain gradient norm that an outgoing column u_i attains.
    """

    slopes: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0))

    @property
    def rank(self) -> int:
        """Directions with a gradient that is more than rounding."""
        return int((self.values > _CUTOFF[self.values.dtype] * self.values[:1]).sum())


def natural_directions(view: SiteView, project: bool = True) -> NaturalDirections:
    """The leading directions of TINY's matrix N^T S^(-1/2) of one site.

    ``S = E[v v^T]``, v = what each incoming weight of a new unit writes where the consumers read (for a plain
    linear producer its input: S is the input's covariance; for a convolution that of its patches), summed over
    positions; ``N = E[h (dz - dW B)^T]`` with ``dW = argmin ||dz - dW B||`` the best update of the consumers'
    present weights, B what they read (project=False: dz itself, M). sum_i s_i^2 is the decrease of the loss per
    unit of step that k new units bring (mean losses).

    Costs a replay of n incoming weights (n: of one unit) and an n x n eigendecomposition; projecting, a solve of
    the consumers' fan-in. Raises `GrowthError` for consumers other than linear and 2-d convolution layers where
    they are projected.
    """
    growth = view.growth
    if project:
        growth = growth_map(dataclasses.replace(view, captures=_projected(view)))
    root = _inverse_root(_covariance(view), growth.dtype)
    whitened = _Whitened(growth, root)
    (found,) = solve([whitened], min(view.rank, *whitened.shape), names=[view.site.name])
    slopes = view.growth.rmatmat(found.left).norm(dim=0)
    return NaturalDirections(found.left, found.values, root @ found.right.to(root.dtype), found.captured, slopes=slopes)


def _covariance(view: SiteView) -> Tensor:
    """S = J^T J / samples: (n, n), J from incoming weights of one unit to the consumers' inputs."""
    n = view.growth.shape[1]
    total = torch.zeros(n, n, dtype=torch.float64, device=view.growth.device)
    for capture in view.captures:
        replay = view.replay(capture)
        mapping = ReplayMap(replay, 1.0, bias=view.bias)
        eye = torch.eye(n, dtype=mapping.dtype, device=mapping.device)
        for start in range(0, n, _BLOCK):
            columns = eye[:, start : start + _BLOCK]
            written = partial(_written, replay, mapping, columns.shape[1])
            zero = torch.zeros_like(columns)
            images = torch.func.jvp(written, (zero,), (columns,))[1]
            pull = torch.func.vjp(written, zero)[1]
            total[:, start : start + _BLOCK] += pull(images)[0].double()
    return total / view.samples


def _written(replay: Replay, mapping: ReplayMap, units: int, columns: Tensor) -> dict[Node, Tensor]:
    return replay.forward(mapping.rows(columns), units)


def _inverse_root(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """S^(-1/2), zero where S has no weight; dtype: that of the products it was made of."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = values > _CUTOFF[dtype] * values[-1].clamp(min=0)
    scale = torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    return (vectors * scale) @ vectors.T


class _Whitened(LinearMap):
    """M R of a map M and a matrix R."""

    def __init__(self, inner: LinearMap, root: Tensor) -> None:
        largest = float(root.abs().max())
        power = math.frexp(largest)[1] if math.isfinite(largest) and largest > 0 else 0
        self._inner = inner
        self._root = (root * 2.0**-power).to(inner.dtype)
        self.shape, self.dtype, self.device = inner.shape, inner.dtype, inner.device
        self.exponent = inner.exponent + power
        self.column_flops = inner.column_flops + 2.0 * root.shape[0] ** 2
        self.dense_flops = inner.dense_flops + 2.0 * root.shape[0] ** 2 * inner.shape[0]

    def unit_matmat(self, columns: Tensor) -> Tensor:
        return self._inner.unit_matmat(self._root @ columns)

    def unit_rmatmat(self, columns: Tensor) -> Tensor:
        return self._root @ self._inner.unit_rmatmat(columns)


def _projected(view: SiteView) -> list[Capture]:
    """The captures with the part of each consumer's gradient left out that its present weights can follow."""
    site, sizes = view.site, view.sites.sizes(view.model, room=True)
    replays = [view.replay(capture, present=True) for capture in view.captures]
    grams: dict[str, Tensor] = {}
    crosses: dict[str, Tensor] = {}
    patches: list[dict[Node, Tensor]] = []
    for replay in replays:
        values = replay.forward(present_rows(replay), sizes[site.axis])
        read = {node: _patches(node, call, values[node]) for node, (call, _) in replay.consumers.items()}
        patches.append(read)
        for node, (call, number) in replay.consumers.items():
            dz = _by_position(call, replay.capture.gradients[call.name, number])  # (N, out)
            rows = read[node].double()  # (N, fan-in)
            grams[call.name] = grams.get(call.name, 0) + rows.T @ rows
            crosses[call.name] = crosses.get(call.name, 0) + dz.double().T @ rows
    seen = residual = 0.0
    updates = {name: crosses[name] @ torch.linalg.pinv(grams[name], rtol=1e-8, hermitian=True) for name in grams}
    result = []
    for replay, read in zip(replays, patches, strict=True):
        gradients = dict(replay.capture.gradients)
        for node, (call, number) in replay.consumers.items():
            whole = gradients[call.name, number]
            left = _by_position(call, whole).double() - read[node].double() @ updates[call.name].T
            seen, residual = seen + float(whole.double().square().sum()), residual + float(left.square().sum())
            gradients[call.name, number] = _as_output(call, left.to(replay.dtype), whole)
        result.append(dataclasses.replace(replay.capture, gradients=gradients))
    if residual <= _CUTOFF[replays[0].dtype] ** 2 * seen:  # the present weights follow all of it: what is left is noise
        for capture in result:
            for (name, _), gradient in capture.gradients.items():
                if name in updates:
                    gradient.zero_()
    return result


def own_part(replay: Replay, slot: Slot) -> Tensor:
    """The site's own part of a tensor along a slot's dimension."""
    tensor = replay.tensors[slot.tensor].detach().to(replay.dtype)
    own = whole_unit_positions(slot.layout, replay.site.axis, replay.sizes).reshape(-1).sort().values
    return tensor.index_select(slot.dim, own.to(tensor.device))


def present_rows(replay: Replay) -> dict[str, Tensor]:
    """The site's own producers' weights and biases, as `Replay.forward` wants rows."""
    site, rows = replay.site, {}
    for name in site.producers:
        slot = site.weight(name, "producer")
        part = own_part(replay, slot)
        rows[name] = part if slot.dim == 0 else part.transpose(0, 1)
    for slot in site.slots_of("bias"):
        rows[f"{slot.layer}.bias"] = own_part(replay, slot)
    return rows


def _patches(node: Node, call: LayerCall, read: Tensor) -> Tensor:
    """(samples x positions, fan-in): what a consumer multiplies its weights with, and a 1 for its bias."""
    if call.part is not None:
        raise GrowthError(
            f"layer {call.name!r} is called with slices of its weight on different inputs (attention from one sequence "
            "to another), which how.TINY does not project on; use project=False"
        )
    if call.kind == "linear":
        rows = read.reshape(-1, read.shape[-1])
    elif call.kind == "conv" and read.dim() == 4 and not isinstance(bind(node)["padding"], str):
        bound = bind(node)
        kernel = tuple(node.args[1].meta["val"].shape[2:])  # type: ignore[union-attr]
        options = {name: tuple(bound[name]) for name in ("dilation", "padding", "stride")}
        columns = F.unfold(read, kernel, **{name: v * 2 if len(v) == 1 else v for name, v in options.items()})
        rows = columns.transpose(1, 2).reshape(-1, columns.shape[1])
    else:
        raise GrowthError(
            f"layer {call.name!r} ({call.kind}): how.TINY projects on the present weights of linear and 2-d "
            "convolution layers only; use project=False"
        )
    return rows if call.bias is None else torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


def _by_position(call: LayerCall, output: Tensor) -> Tensor:
    """A consumer's output (gradient) as (samples x positions, out)."""
    last = output if call.kind == "linear" else output.movedim(1, -1)
    return last.reshape(-1, last.shape[-1])


def _as_output(call: LayerCall, rows: Tensor, like: Tensor) -> Tensor:
    if call.kind == "linear":
        return rows.reshape(like.shape)
    shape = like.movedim(1, -1).shape
    return rows.reshape(shape).movedim(-1, 1).contiguous()
