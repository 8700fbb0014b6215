"""Growth under DistributedDataParallel or FSDP2: every rank sees its part of the batch, all grow the same network.

NAGN and sample counts are summed over the ranks. Growth matrices stay where they are: rank 0 solves, and
each product it asks for, M X = sum_r M_r X or M^T Y, is the sum of every rank's own. Only rank 0 decides
when to stop iterating, so that no rounding can set the ranks apart; what it found is broadcast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import GrowthError
from .operators import LARGEST_EXPONENT, LinearMap, products_in
from .replay import Capture
from .sharded import group_of
from .solve import Directions, solve

__all__ = ["DistributedMap", "Replicas", "replicas_of", "together", "without_gradient_traffic"]

_STOP, _MATMAT, _RMATMAT, _DENSE = range(4)

_NO_GROWTH = "could not grow, so no rank does"

_KEPT = (
    "device_ids",
    "output_device",
    "dim",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "batched_grad_copy",
    "skip_all_reduce_unused_params",
)
"""Arguments of DistributedDataParallel that stand in attributes of the same name."""


def replicas_of(model: nn.Module) -> Replicas | None:
    """The ranks that train this model together; None where neither DistributedDataParallel nor FSDP2 wraps it."""
    current: nn.Module | None = model
    while current is not None:
        if "module" in current._modules and isinstance(current, nn.parallel.DistributedDataParallel):
            return _Wrapped(current)
        current = current._modules.get("_orig_mod")
    sharded = group_of(model)
    return None if sharded is None else Replicas(*sharded)


def without_gradient_traffic(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Forward passes whose gradients no rank waits for."""
    replicas = replicas_of(model)
    return contextlib.nullcontext() if replicas is None else replicas.quiet()


def together(replicas: Replicas | None, failed: str = _NO_GROWTH) -> contextlib.AbstractContextManager[None]:
    """An error inside the block on one rank is an error at its end on all; failed: what it is called on the others."""
    return contextlib.nullcontext() if replicas is None else _agreeing(replicas, failed)


@contextlib.contextmanager
def _agreeing(replicas: Replicas, failed: str) -> Iterator[None]:
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    replicas.agree(error, failed)


class Replicas:
    """What the ranks that train a model together say to each other about growth.

    Every method is a collective call: all ranks make it, in the same order.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._first = dist.get_global_rank(group, 0)

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """Forward passes whose gradients no rank waits for: FSDP waits for those of parameters alone."""
        return contextlib.nullcontext()

    def check_renewable(self) -> None:
        """Raises `GrowthError` for a wrapper that cannot follow growth."""

    def renew(self) -> None:
        """Have the wrapper follow growth."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on the tensor's own device, the same bits on every rank."""
        total = values.to(self.device, copy=True)
        dist.reduce(total, self._first, group=self.group)
        dist.broadcast(total, self._first, group=self.group)
        return total.to(values.device)

    def mean(self, value: float) -> float:
        """The mean over ranks of one number."""
        return float(self.sum(torch.tensor(value, dtype=torch.float64))) / self.size

    def first(self, value: Any) -> Any:
        """Rank 0's value: plain numbers, strings, lists and dicts."""
        holder = [value]
        dist.broadcast_object_list(holder, self._first, group=self.group, device=self.device)
        return holder[0]

    def share_(self, tensors: Sequence[Tensor]) -> None:
        """Rank 0's values into every rank's tensors."""
        for tensor in tensors:
            sent = tensor.to(self.device).contiguous()
            dist.broadcast(sent, self._first, group=self.group)
            if sent is not tensor:
                tensor.copy_(sent)

    def agree(self, error: Exception | None, failed: str = _NO_GROWTH) -> None:
        """Raise this rank's error, or a `GrowthError` that tells another rank's."""
        failures = torch.tensor(int(error is not None), device=self.device)
        dist.all_reduce(failures, group=self.group)
        if not failures.item():
            return
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, None if error is None else f"{error}", group=self.group)
        if error is not None:
            raise error
        rank, message = next((at, text) for at, text in enumerate(told) if text is not None)
        raise GrowthError(f"rank {rank} {failed}: {message}")

    def solve(self, maps: Sequence[LinearMap], k: int | Sequence[int], *, names: Sequence[str]) -> list[Directions]:
        """`fastgrow.solve.solve` for ``sum_r maps_r``; every rank brings its own maps, in the same order."""
        found: list[Directions] = []
        error: Exception | None = None
        with torch.no_grad():
            shared = DistributedMap.over(self, maps)
            if self.rank == 0:
                try:
                    found = solve(shared, k, names=names)
                except Exception as caught:
                    error = caught
                finally:
                    self.command(_STOP, 0, 0)
            else:
                error = self._serve(shared)
            self.agree(error)
            return self._broadcast(shared, found)

    def on_first(
        self,
        captures: Sequence[Capture],
        weights: Sequence[float],
        function: Callable[[Sequence[Capture], Sequence[float]], Directions],
        *,
        joined: bool = False,
    ) -> Directions:
        """A function of every rank's batches, called on rank 0 with all of them; its answer on every rank.

        joined: the batches that the ranks saw at the same time are one, as SyncBatchNorm saw them.
        """
        mine = ([capture.to("cpu") for capture in captures], list(weights))
        every: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, every, self._first, group=self.group)
        found: Directions | None = None
        with together(self):
            if every is not None:
                pooled = [(capture.to(self.device), w) for part in every for capture, w in zip(*part, strict=True)]
                if joined:
                    pooled = [(_joined(pooled[at :: len(captures)]), 1.0) for at in range(len(captures))]
                found = _moved(function(*zip(*pooled, strict=True)), "cpu")
        return _moved(self.first(found), self.device)

    def command(self, kind: int, index: int, columns: int, rounded: bool = False) -> tuple[int, int, int, bool]:
        """Rank 0 says what is wanted next: a kind of product, of which map, with how many columns, how exact."""
        said = torch.tensor([kind, index, columns, rounded], device=self.device)
        dist.broadcast(said, self._first, group=self.group)
        kind, index, columns, rounded = said.tolist()
        return kind, index, columns, bool(rounded)

    def _serve(self, maps: Sequence[DistributedMap]) -> Exception | None:
        """Multiply as rank 0 asks, until it stops; an error is kept, for it waits for every product."""
        error: Exception | None = None
        with products_in("float32", self.device):
            while True:
                kind, index, columns, rounded = self.command(_STOP, 0, 0)
                if kind == _STOP:
                    return error
                try:
                    with maps[index].rounded() if rounded else contextlib.nullcontext():
                        maps[index].part(kind, maps[index].argument(kind, columns))
                except GrowthError as caught:
                    error = error or caught

    def reduce(self, part: Tensor) -> Tensor:
        """The sum over ranks; complete on rank 0 alone."""
        part = part.contiguous()
        dist.reduce(part, self._first, group=self.group)
        return part

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, into a tensor of its shape."""
        tensor = tensor.contiguous()
        dist.broadcast(tensor, self._first, group=self.group)
        return tensor

    def _broadcast(self, maps: Sequence[DistributedMap], found: Sequence[Directions]) -> list[Directions]:
        counts = [(len(one.values), one.captured) for one in found] or [(0, 0.0)] * len(maps)
        told = self.broadcast(torch.tensor(counts, dtype=torch.float64, device=self.device))
        result = []
        for at, (mapping, (count, captured)) in enumerate(zip(maps, told.tolist(), strict=True)):
            rows, cols = mapping.shape
            shapes = ((rows, int(count)), (int(count),), (cols, int(count)))
            parts = [
                self.broadcast(
                    tuple(found[at])[which] if found else torch.empty(shape, dtype=mapping.dtype, device=mapping.device)
                )
                for which, shape in enumerate(shapes)
            ]
            left, values, right = parts
            result.append(Directions(left, values, right, captured))
        return result


class _Wrapped(Replicas):
    """The ranks of a DistributedDataParallel wrapper."""

    def __init__(self, wrapper: nn.parallel.DistributedDataParallel) -> None:
        super().__init__(wrapper.process_group, wrapper.device)
        self.wrapper = wrapper

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        found: contextlib.AbstractContextManager[None] = self.wrapper.no_sync()
        return found

    def check_renewable(self) -> None:
        """Raises `GrowthError` for what the wrapper cannot be built again with."""
        reason = None
        if self.wrapper.mixed_precision is not None:
            reason = "mixed_precision= installs hooks in the module; use torch.autocast instead"
        elif self.wrapper._delay_all_reduce_params:
            reason = "delay_all_reduce_named_params= names parameters that growth replaces; leave it out"
        for hook, state in self.wrapper._comm_hooks:
            names = [*getattr(type(state), "__slots__", ()), *getattr(state, "__dict__", ())]
            if any(name.endswith(("_dict", "_memory")) for name in names):
                reason = (
                    f"the communication hook {hook.__qualname__} keeps tensors of the gradients' old sizes; grow the "
                    "module inside, wrap it again and register the hook anew"
                )
        if reason is not None:
            raise GrowthError(f"DistributedDataParallel cannot be renewed after growth: {reason}")

    def renew(self) -> None:
        """Build the wrapper again, in place, around replaced parameters; references to it stay valid.

        The constructor's arguments, communication hooks and the user's own hooks are kept.
        """
        wrapper = self.wrapper
        accepted = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
        options: dict[str, Any] = {
            name: getattr(wrapper, name) for name in _KEPT if name in accepted and hasattr(wrapper, name)
        }
        if getattr(wrapper, "device_mesh", None) is not None:
            options["device_mesh"] = wrapper.device_mesh
        else:
            options["process_group"] = wrapper.process_group
        buckets = [size / 2**20 for size in getattr(wrapper, "bucket_bytes_cap_list", ())]
        if buckets:
            options["bucket_cap_mb_list"] = buckets
        elif not wrapper.bucket_bytes_cap_default:
            options["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
        synced = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
        options[synced] = getattr(wrapper, synced)
        module, training, communication = wrapper.module, wrapper.training, list(wrapper._comm_hooks)
        hooks = {key: vars(wrapper)[key] for key in vars(nn.Module()) if "_hook" in key}
        # The old reducer takes its gradient hooks with it; two at once would each average the gradients.
        for held in ("reducer", "logger"):
            vars(wrapper).pop(held, None)
        # No synchronisation: what growth added was broadcast, the rest was equal already.
        nn.parallel.DistributedDataParallel.__init__(wrapper, module, init_sync=False, **options)
        vars(wrapper).update(hooks)
        for hook, state in communication:
            wrapper.register_comm_hook(state, hook)
        wrapper.training = training


def _joined(parts: Sequence[tuple[Capture, float]]) -> Capture:
    """One batch of several ranks' parts, each gradient times its part's weight."""
    first = parts[0][0]
    inputs = {key: torch.cat([part.inputs[key] for part, _ in parts]) for key in first.inputs}
    gradients = {key: torch.cat([weight * part.gradients[key] for part, weight in parts]) for key in first.gradients}
    columns = zip(*(part.arguments for part, _ in parts), strict=True)
    arguments = tuple(_joined_argument(column, first) for column in columns)
    samples = sum(part.samples for part, _ in parts)
    return Capture(samples, inputs, gradients, first.called, arguments, first.hidden, first.flat)


def _joined_argument(column: Sequence[Tensor | None], first: Capture) -> Tensor | None:
    one = column[0]
    if one is None or not one.dim():
        return one
    if first.flat and one.dim() == 1:  # offsets count from the start of each rank's own text
        return None
    return torch.cat([part for part in column if part is not None]) if len(one) == first.samples else one


def _moved(found: Directions, device: torch.device | str) -> Directions:
    every = {entry.name: getattr(found, entry.name) for entry in dataclasses.fields(found)}
    moved: dict[str, Any] = {name: value.to(device) for name, value in every.items() if isinstance(value, Tensor)}
    return dataclasses.replace(found, **moved)


class DistributedMap(LinearMap):
    """``M = sum_r M_r``, one term on each rank; its products are asked for on rank 0 and made on all."""

    def __init__(self, local: LinearMap, replicas: Replicas, index: int, exponent: Tensor) -> None:
        self.local, self.replicas, self.index = local, replicas, index
        self.shape, self.dtype, self.device = local.shape, local.dtype, local.device
        self.exponent = exponent
        limit = LARGEST_EXPONENT[local.dtype]
        self._share = torch.exp2((local.exponent - exponent).clamp(min=-limit)).to(local.dtype)
        self.column_flops, self.dense_flops = local.column_flops, local.dense_flops
        self._rounded = False

    @property
    def may_round(self) -> bool:
        return self.local.may_round

    @contextlib.contextmanager
    def rounded(self) -> Iterator[None]:
        """On the other ranks too."""
        self._rounded = True
        try:
            with self.local.rounded():
                yield
        finally:
            self._rounded = False

    @classmethod
    def over(cls, replicas: Replicas, maps: Sequence[LinearMap]) -> list[DistributedMap]:
        """The sums of all ranks' maps, on the largest of their exponents."""
        if not maps:
            return []
        exponents = torch.stack([one.exponent.to(replicas.device, torch.float32) for one in maps])
        # NaN need not survive a maximum; infinity does.
        exponents = torch.where(exponents.isfinite(), exponents, torch.inf)
        dist.all_reduce(exponents, dist.ReduceOp.MAX, group=replicas.group)
        return [cls(one, replicas, at, exponents[at].to(one.device, one.exponent.dtype)) for at, one in enumerate(maps)]

    def argument(self, kind: int, columns: int) -> Tensor:
        """Room for what rank 0 multiplies with: (n, r), (m, r), or nothing."""
        rows = {_MATMAT: self.shape[1], _RMATMAT: self.shape[0], _DENSE: 0}[kind]
        return torch.empty(rows, columns, dtype=self.dtype, device=self.device)

    def part(self, kind: int, argument: Tensor) -> Tensor:
        """This rank's term of a product; the sum on rank 0."""
        if argument.shape[0]:
            argument = self.replicas.broadcast(argument)
        error: GrowthError | None = None
        try:
            if kind == _DENSE:
                term = self.local.unit_dense() * self._share
            else:
                multiply = self.local.unit_matmat if kind == _MATMAT else self.local.unit_rmatmat
                term = multiply(argument * self._share)
        except Exception as caught:
            error = GrowthError(f"a product with the growth matrix failed: {caught}")
            error.__cause__ = caught
            rows = self.shape[1] if kind == _RMATMAT else self.shape[0]
            columns = self.shape[1] if kind == _DENSE else argument.shape[1]
            term = torch.full((rows, columns), torch.nan, dtype=self.dtype, device=self.device)
        total = self.replicas.reduce(term)
        if error is not None:
            raise error
        return total

    def _asked(self, kind: int, argument: Tensor) -> Tensor:
        self.replicas.command(kind, self.index, argument.shape[1], self._rounded)
        return self.part(kind, argument)

    def unit_matmat(self, columns: Tensor) -> Tensor:
        return self._asked(_MATMAT, columns)

    def unit_rmatmat(self, columns: Tensor) -> Tensor:
        return self._asked(_RMATMAT, columns)

    def unit_dense(self) -> Tensor:
        return self._asked(_DENSE, self.argument(_DENSE, 0))
