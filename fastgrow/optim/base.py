"""What every optimizer here knows of growth: stages, ages, rates, and where a step is carried out.

Parameters that never grew take torch.optim's own step. A grown one keeps in ``optimizer.state[parameter]``
"stages" ({dimension: [[length, stage], ...]}), "births" ({stage: the value of "step" at its birth}), "step"
and, for rate adaptation, "waiting" (a flag for each block): plain numbers, which ``state_dict()`` keeps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import GrowthError
from ..stages import ROOM
from . import fused
from .blocks import UNDECIDED, Blocks, born_small, runs_of
from .entry import BlockNumbers, Entry, unwrap

__all__ = ["Backend", "GrowingOptimizer", "State"]

Backend = Literal["auto", "triton", "cpu", "torch"]
Group = dict[str, Any]
State = dict[str, Any]

_STAGE_OPTIONS = {"lr": 1.0, "weight_decay": 0.0, "warmup": 0}


class GrowingOptimizer(torch.optim.Optimizer):
    r"""The part of an optimizer that knows growth; mixed into each of `fastgrow.optim`.

    rate_adaptation: block k of a weight takes the rate
    :math:`\eta_k = \eta_0 \|W_{\Delta k}\|_F / \|W_{\Delta 0}\|_F`, recomputed each step (eq. 5, Table 1 of
    "Accelerated Training via Incrementally Growing Neural Networks using Variance Transfer and Learning Rate
    Adaptation"; Table 1's norm is a likely reading). Ours, an open reading: a block born zero, or small (below 1/32 of
    block 0's root mean square, as GradMax's outgoing weights behind a batch norm and the incoming ones of signed pairs:
    the rule would all but freeze them), takes :math:`\eta_0` until its norm per element reaches block 0's, and
    1-dimensional parameters always do.
    output_scale: an open reading of Table 1: the stage-0 block of the group's weights takes
    output_scale * lr; give the output layer its own group with 1 / C_{h,0}.
    stage_options: {stage: {"lr": factor, "weight_decay": value, "warmup": steps}}, as `set_stage`.
    backend: "triton" updates all grown parameters of a GPU in one kernel launch, "cpu" those of a CPU in one
    compiled loop (float32, float64, bfloat16; built at installation where there is a C++ compiler), "torch"
    each block by torch's own fused kernels, whatever `foreach` and `fused` say of parameters that never grew.
    "auto" takes the launch on a GPU unless foreach=True, the loop on a CPU where it is built, and "torch" for
    what these do not take. The norms of the next step are taken during this one and dropped
    when a parameter's version counter or address has changed since. Writes through ``parameter.data`` change
    neither: the next step's rates are then those of the values before; write under ``torch.no_grad()``.
    """

    _moment_names: tuple[str, ...] = ()

    def _start(
        self,
        rate_adaptation: bool,
        output_scale: float,
        stage_options: Mapping[int, Mapping[str, float]] | None,
        backend: Backend,
        **more: Any,
    ) -> None:
        if backend not in get_args(Backend):
            raise GrowthError(f"backend is {backend!r}; wanted {', '.join(map(repr, get_args(Backend)))}")
        options = {stage: _checked(stage, of) for stage, of in (stage_options or {}).items()}
        self.defaults.update(rate_adaptation=rate_adaptation, output_scale=output_scale, stage_options=options, **more)
        self.backend = backend
        self._reset()
        self._fill_groups()

    def _reset(self) -> None:
        self._entries: dict[Tensor, Entry] = {}
        self._batches: dict[object, fused.Batch] = {}
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _fill_groups(self) -> None:
        for group in self.param_groups:
            for name in self._group_options:
                if name in self.defaults:
                    group.setdefault(name, copy.copy(self.defaults[name]))

    _kept: tuple[str, ...] = ("backend",)  # attributes that a pickled or copied optimizer takes along
    _group_options: tuple[str, ...] = ("rate_adaptation", "output_scale", "stage_options")

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()
        self._fill_groups()

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return super().state_dict()

    def _settle(self) -> None:
        for batch in self._batches.values():
            batch.settle()

    # -- growth ---------------------------------------------------------------------------------------

    def check_growth(self, parameter: Tensor) -> None:
        """Raise `GrowthError` where these options leave no way to update the parameter once it has grown."""
        for name in ("capturable", "differentiable"):
            if self.defaults.get(name):
                raise GrowthError(
                    f"{type(self).__name__}({name}=True) cannot update grown parameters; give {name}=False"
                )
        if hasattr(parameter, "device_mesh"):
            raise GrowthError(
                f"{type(self).__name__} updates a grown parameter block by block and cannot where it is sharded "
                "(fully_shard); use an optimizer of torch.optim"
            )
        if parameter.is_complex():
            raise GrowthError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}; fastgrow.optim updates "
                "grown parameters that are real, torch.optim complex ones too"
            )

    def growing(self) -> None:
        """Let go of all that is remembered of parameters between steps: growth is about to replace some of them."""
        self._settle()
        self._reset()

    def grown(self, parameter: Tensor, stages: Mapping[int, Tensor]) -> None:
        """Learn that a parameter has grown; its state has been moved and stands under the new tensor.

        stages: dimension -> (size,) int64, the stage at which each index was born, 0 for the seed. Element
        (i, j, ..) belongs to the largest stage of its indices. The stages not known before are born now.
        """
        self._group_of(parameter)
        for dim, vector in stages.items():
            if not 0 <= dim < parameter.dim() or tuple(vector.shape) != (parameter.shape[dim],):
                raise GrowthError(
                    f"a parameter of shape {tuple(parameter.shape)} cannot have {tuple(vector.shape)} stages "
                    f"along dimension {dim}"
                )
        self.check_growth(parameter)
        self._settle()
        state = self._counted(parameter)
        now = int(state["step"])
        known: dict[int, int] = state.get("births", {})
        flags = dict(zip(sorted(known), state["waiting"], strict=True)) if known else {}
        entry = Entry(parameter, {dim: runs_of(vector) for dim, vector in stages.items()})
        present = entry.blocks.stages
        # told of growth for the first time, it takes the newest stage for new and the others for its seed
        units = [k for k in present if k != ROOM]
        born = {k for k in units if k not in known} if known else {k for k in units[-1:] if k > 0}
        state["stages"] = entry.stages
        state["births"] = {k: now if k in born else known.get(k, 0) for k in present}
        state["waiting"] = [UNDECIDED if k in born else flags.get(k, 0.0) for k in present]
        self._reset()

    def set_stage(
        self,
        stage: int,
        *,
        lr: float = 1.0,
        weight_decay: float | None = None,
        warmup: int = 0,
        group: int | None = None,
    ) -> None:
        """Give the units of a stage their own learning-rate factor, weight decay and warm-up.

        Their rate is lr times the rule's, times min(1, age / warmup) over their first `warmup` steps;
        weight_decay None: the group's. group: an index into param_groups; None: all of them.
        """
        given = {
            "lr": lr,
            "warmup": warmup,
            **({} if weight_decay is None else {"weight_decay": weight_decay}),
        }
        options = _checked(stage, given)
        for chosen in self.param_groups if group is None else [self.param_groups[group]]:
            chosen["stage_options"] = {**chosen["stage_options"], stage: options}

    def stage_rates(self, parameter: Tensor) -> dict[int, float]:
        """The learning rate of each stage's block at the next step, rate adaptation included."""
        self._settle()
        group, state = self._group_of(parameter), self.state[parameter]
        entry = self._entry(parameter)
        numbers = self._numbers(group, parameter, state, entry.blocks)
        self._apply_ratios(group, parameter, state, entry, numbers)
        rates = {stage: of.rate for stage, of in zip(entry.blocks.stages, numbers, strict=True)}
        rates.pop(ROOM, None)  # entries without a unit
        return rates

    def _group_of(self, parameter: Tensor) -> Group:
        for group in self.param_groups:
            if any(parameter is one for one in group["params"]):
                return group
        raise GrowthError(f"the optimizer holds no such parameter (shape {tuple(parameter.shape)})")

    # -- the step -------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, if given, is called once with gradients enabled and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
            self._before_step()
            for group in self.param_groups:
                plain: list[Tensor] = []
                blocked: list[Tensor] = []
                grown_from, others_from = self._blocked_from(group)
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        state = self.state.get(parameter)
                        least = others_from if state is None or "stages" not in state else grown_from
                        (blocked if parameter.dim() >= least else plain).append(parameter)
                if plain:
                    self._plain_update(group, plain)
                if blocked:
                    self._block_update(group, blocked)
        return loss

    def _before_step(self) -> None:
        """Called once a step, before any group."""

    def _blocked_from(self, group: Group) -> tuple[float, float]:
        """The ranks from which on grown parameters, and others, are stepped block by block."""
        return 0, 2 if group["output_scale"] != 1 else math.inf

    def _gradient(self, parameter: Tensor) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        return gradient

    def _plain_update(self, group: Group, parameters: list[Tensor]) -> None:
        raise NotImplementedError

    def _moments(self, group: Group, parameter: Tensor, state: State) -> list[Tensor]:
        """The state tensors of the parameter's shape, made where missing, in `_step_list`'s order."""
        raise NotImplementedError

    def _coefficients(self, group: Group, of: BlockNumbers) -> tuple[float, ...]:
        """What the kernel needs of a block, in its order."""
        raise NotImplementedError

    def _step_list(self, group: Group, of: BlockNumbers, tensors: Sequence[list[Tensor]]) -> None:
        """The step of dense tensors that share their numbers: parameters, gradients, then each moment."""
        raise NotImplementedError

    def _fused_step(self, group: Group, batch: fused.Batch, rows: Sequence[float], norms: bool) -> None:
        raise NotImplementedError

    def _entry(self, parameter: Tensor) -> Entry:
        entry = self._entries.get(parameter)
        stages = self.state[parameter].get("stages")
        if entry is None or entry.stages is not stages or entry.given_strides != parameter.stride():
            entry = self._entries[parameter] = Entry(parameter, stages)
        return entry

    def _buffer(self, like: Tensor) -> Callable[[int], Tensor]:
        def take(size: int) -> Tensor:
            key = (like.device, like.dtype)
            held = self._buffers.get(key)
            if held is None or held.numel() < size:
                held = self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
            return held

        return take

    def _block_update(self, group: Group, parameters: list[Tensor]) -> None:
        if self._unscale(parameters):
            return
        states, gradients = [], []
        for parameter in parameters:
            if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
                raise GrowthError("a grown parameter's step cannot be captured in a CUDA graph: its rates change")
            gradient = self._gradient(parameter)
            if gradient.layout != torch.strided:
                raise GrowthError(
                    f"the gradient of a grown parameter of shape {tuple(parameter.shape)} is "
                    f"{gradient.layout}; a grown embedding needs sparse=False"
                )
            gradients.append(gradient)
            states.append(self._counted(parameter))
        key, choice = (id(group), parameters[0].device, parameters[0].dtype), self._choice(group)
        batch = self._batches.get(key)
        if batch is not None and batch.holds(parameters, states, choice):
            self._kernel_update(group, batch, states, gradients)
            return
        batches: dict[tuple[int, torch.device, torch.dtype], list[int]] = {}
        rest: list[Tensor] = []
        for at, parameter in enumerate(parameters):
            self.check_growth(parameter)
            if self._takes_kernel(group, parameter):
                batches.setdefault((id(group), parameter.device, parameter.dtype), []).append(at)
            else:
                rest.append(parameter)
        if rest:
            self._aten_update(group, rest)
        for key, members in batches.items():
            mine, of = [parameters[at] for at in members], [states[at] for at in members]
            batch = self._batches.get(key)
            if batch is None or not batch.holds(mine, of, choice):
                if batch is not None:
                    batch.settle()
                blocks = [self._entry(parameter).blocks for parameter in mine]
                adapt = [self._adapts(group, p, b) for p, b in zip(mine, blocks, strict=True)]
                route = self._route(group, key[1])
                assert route is not None
                batch = self._batches[key] = fused.Batch(mine, blocks, adapt, of, choice, route)
            self._kernel_update(group, batch, of, [gradients[at] for at in members])

    def _unscale(self, parameters: Sequence[Tensor]) -> bool:
        """What a GradScaler leaves to optimizers with fused=True: gradients divided in place; True: no step."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found is not None and found.item():
            return True
        if scale is not None:
            for parameter in parameters:
                gradient = self._gradient(parameter)
                gradient.div_(scale.to(gradient.device))
        return False

    def _counted(self, parameter: Tensor) -> State:
        state: State = self.state[parameter]
        step = state.get("step")
        if step is None:
            # torch's SGD counts no steps: one stands for all of them, so that a seed does not pass for new
            state["step"] = torch.tensor(
                float(any(state.get(name) is not None for name in self._moment_names)), device="cpu"
            )
        elif not step.is_cpu:
            # loading into fused=True puts it on the GPU, where reading it would wait for the GPU each step
            state["step"] = step.cpu()
        return state

    def _takes_kernel(self, group: Group, parameter: Tensor) -> bool:
        route = self._route(group, parameter.device)
        if route is None:
            return False
        entry, asked = self._entry(parameter), (route, parameter.dtype, parameter.device)
        if entry.asked != asked:
            entry.asked, entry.refusal = asked, fused.refusal(parameter, entry.blocks, route)
        reason = entry.refusal
        if reason is not None and self.backend != "auto":
            raise GrowthError(f"backend={route!r}, but {reason}; build the optimizer with backend='auto'")
        return reason is None

    def _route(self, group: Group, device: torch.device) -> fused.Route | None:
        """The kernels that grown parameters of a device are meant for; None: torch's own."""
        if self.backend == "triton" or (self.backend == "auto" and device.type == "cuda" and not group.get("foreach")):
            return "triton"
        if self.backend == "cpu" or (self.backend == "auto" and device.type == "cpu"):
            return "cpu"
        return None

    def _numbers(self, group: Group, parameter: Tensor, state: State, blocks: Blocks) -> list[BlockNumbers]:
        lr, decay, done = float(unwrap(group["lr"])), float(unwrap(group["weight_decay"])), int(state["step"])
        births, options = state.get("births", {}), group["stage_options"]
        numbers = []
        for stage in blocks.stages:
            of = options.get(stage, {})
            age = done - births.get(stage, 0) + 1
            rate = lr * of.get("lr", 1.0)
            if of.get("warmup"):
                rate *= min(1.0, age / of["warmup"])
            if stage == 0 and parameter.dim() > 1:
                rate *= group["output_scale"]
            numbers.append(BlockNumbers(rate, of.get("weight_decay", decay), age))
        return numbers

    def _adapts(self, group: Group, parameter: Tensor, blocks: Blocks) -> bool:
        return bool(group["rate_adaptation"]) and parameter.dim() > 1 and len(blocks.stages) > 1

    def _apply_ratios(
        self, group: Group, parameter: Tensor, state: State, entry: Entry, numbers: list[BlockNumbers]
    ) -> None:
        if not self._adapts(group, parameter, entry.blocks):
            return
        stamp = (parameter._version, parameter.data_ptr())
        squares = entry.sums_of("norms", stamp)
        if squares is None:
            self._measure(entry, "norms", stamp, parameter)
            squares = entry.sums_of("norms", stamp)
            assert squares is not None
        seed, counts = squares[0], entry.blocks.counts
        flags = state["waiting"]
        for k in range(1, len(numbers)):
            if flags[k] == UNDECIDED:
                flags[k] = float(born_small(squares[k], counts[k], seed, counts[0]))
            if squares[k] * counts[0] >= seed * counts[k]:
                flags[k] = 0.0
            if not flags[k] and seed > 0:
                numbers[k].rate *= (squares[k] / seed) ** 0.5

    def _measure(self, entry: Entry, name: str, stamp: object, tensor: Tensor) -> None:
        for at, (slab, values) in enumerate(
            zip(entry.blocks.slabs, entry.blocks.cut(entry.blocks.laid_out(tensor)), strict=True)
        ):
            for number, part in enumerate(slab.parts):
                entry.measure(name, at, number, part.of(values))
        entry.remember(name, stamp)

    def _aten_update(self, group: Group, parameters: Sequence[Tensor]) -> None:
        """Each block by torch's own fused step at its own numbers, slab after slab."""
        together: dict[object, tuple[BlockNumbers, list[Sequence[Tensor]]]] = {}
        written: list[Tensor] = []
        copied: list[tuple[Tensor, Tensor]] = []
        adapting: list[tuple[Tensor, Entry]] = []
        for parameter in parameters:
            state, entry = self.state[parameter], self._entry(parameter)
            blocks = entry.blocks
            tensors = [parameter, *self._moments(group, parameter, state)]
            numbers = self._numbers(group, parameter, state, blocks)
            self._apply_ratios(group, parameter, state, entry, numbers)
            written += tensors
            names: list[str | None] = []
            columns = []
            for at, tensor in enumerate(tensors):
                held = blocks.laid_out(tensor)
                names.append(str(at) if held is tensor else None)
                columns.append(entry.views(str(at), tensor) if held is tensor else blocks.cut(held))
                if held is not tensor:
                    copied.append((tensor, held))
            gradient = self._gradient(parameter).to(parameter.dtype)
            columns.insert(1, blocks.cut(blocks.laid_out(gradient)))
            names.insert(1, None)
            adapts = self._adapts(group, parameter, blocks)
            for at, (slab, pieces) in enumerate(zip(blocks.slabs, zip(*columns, strict=True), strict=True)):
                if len(slab.parts) == 1 and not adapts and not self._measures_moments:
                    of = numbers[slab.main]
                    key = (of.rate, of.decay, of.age, of.gain, parameter.device, parameter.dtype)
                    together.setdefault(key, (of, []))[1].append(pieces)
                    continue
                self._slab_step(group, entry, at, numbers, pieces, names)
                for number, part in enumerate(slab.parts):
                    if adapts:
                        entry.measure("norms", at, number, entry.part(names[0], at, number, pieces[0]))
                    if self._measures_moments:
                        moment = entry.part(names[-1], at, number, pieces[-1])
                        self._measure_moments(group, entry, (at, number), numbers[part.block], moment)
            if adapts:
                adapting.append((parameter, entry))
        for of, members in together.values():
            self._step_list(group, of, [list(column) for column in zip(*members, strict=True)])
        for tensor, held in copied:
            tensor.copy_(held)
        # torch's fused kernels leave the version counters alone
        torch.autograd.graph.increment_version(written)
        for parameter, entry in adapting:
            entry.remember("norms", (parameter._version, parameter.data_ptr()))
        torch._foreach_add_([self.state[parameter]["step"] for parameter in parameters], 1)

    def _slab_step(
        self,
        group: Group,
        entry: Entry,
        at: int,
        numbers: Sequence[BlockNumbers],
        pieces: Sequence[Tensor],
        names: Sequence[str | None],
    ) -> None:
        """One step of slab `at`: whole at its main block's numbers, other blocks anew from contiguous copies.

        pieces: the slab of the parameter, its gradient and each moment; names: under which `Entry.views` keeps
        them, None where it does not.
        """
        slab = entry.blocks.slabs[at]
        of = numbers[slab.main]
        apart = [(number, part) for number, part in enumerate(slab.parts) if numbers[part.block] != of]
        views = [
            [entry.part(name, at, number, piece) for name, piece in zip(names, pieces, strict=True)]
            for number, _ in apart
        ]
        rooms = entry.rooms(self._buffer(pieces[0]), views) if apart else []
        if apart:
            torch._foreach_copy_([one for row in rooms for one in row], [one for row in views for one in row])
        self._step_list(group, of, [[piece] for piece in pieces])
        for (_, part), room in zip(apart, rooms, strict=True):
            own = numbers[part.block]
            self._step_list(group, own, [[one] for one in room])
            part.put(pieces[0], room[0])
            if (own.decay, own.gain) != (of.decay, of.gain):
                for piece, one in zip(pieces[2:], room[2:], strict=True):
                    part.put(piece, one)

    _measures_moments = False

    def _measure_moments(
        self, group: Group, entry: Entry, at: tuple[int, int], of: BlockNumbers, moment: Tensor
    ) -> None:
        """Called behind the step of each part with its last moment, while it lies in the cache."""

    def _choice(self, group: Group) -> object:
        """What the kernels and what they adapt are chosen by, beside the parameters."""
        return bool(group["rate_adaptation"]), group.get("foreach"), self.backend

    def _kernel_update(
        self, group: Group, batch: fused.Batch, states: Sequence[State], gradients: Sequence[Tensor]
    ) -> None:
        moments = [self._moments(group, p, state) for p, state in zip(batch.parameters, states, strict=True)]
        batch.bind(gradients, list(zip(*moments, strict=True)))
        known: dict[Hashable, list[float]] = {}  # most parameters share their numbers with others
        rows: list[float] = []
        for at, (kind, count, state) in enumerate(zip(batch.kinds, batch.steps.values(), states, strict=True)):
            key = kind, count, state.get("momentum_birth")
            own = known.get(key)
            if own is None:
                own = known[key] = []
                for of in self._numbers(group, batch.parameters[at], state, batch.blocks[at]):
                    numbers = self._coefficients(group, of)
                    own += (*numbers, *[0.0] * (fused.SCALARS - len(numbers)))
            rows += own
        self._fused_step(group, batch, rows, batch.refresh())
        batch.finish()
        batch.steps.add()


def _checked(stage: int, options: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(stage, int) or stage < 1:
        raise GrowthError(f"stage options for stage {stage!r}; stages count from 1, 0 is the seed (use the group's)")
    for name, value in options.items():
        if name not in _STAGE_OPTIONS or value < 0:
            raise GrowthError(f"stage {stage}: {name}={value!r}; wanted non-negative {', '.join(_STAGE_OPTIONS)}")
    return dict(options)
