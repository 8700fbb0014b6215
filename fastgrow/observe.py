"""What the backward pass tells: gradient norms of activations, and the factors of growth matrices."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import ops
from .cuda_graphs import check_not_captured
from .distributed import replicas_of, together
from .errors import GrowthError
from .names import find_module
from .replay import Capture
from .site_solving import SiteSolving
from .site_view import Solver
from .sites import Sites, argument_paths, tensors_of, unwrap
from .solve import Directions

__all__ = ["Observation", "observe"]


@dataclass
class _Reading:
    """Sum of squared gradients at one layer's output in one batch."""

    total: Tensor
    elements: int


@dataclass
class _Batch:
    capture: Capture = field(default_factory=Capture)
    own: dict[str, dict[int, _Reading]] = field(default_factory=dict)  # layer -> number of its call -> reading
    after_norm: dict[str, dict[int, _Reading]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    versions: dict[tuple[str, int], int] = field(default_factory=dict)


class Observation:
    """What one or several batches showed; filled while the ``with`` block runs.

    samples: how many were seen. dropped: batches left out because their gradients overflowed under a
    GradScaler.
    """

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self.samples = 0
        self.dropped = 0
        self._own: dict[str, Tensor] = {}
        self._after: dict[str, Tensor] = {}
        self._directions: dict[str, Directions] | None = None
        self._rank: dict[str, int] = {}
        self._edges: list[Any] = []
        self._solved: dict[str, dict[str, Directions]] = {}

    @property
    def nagn(self) -> dict[str, float]:
        """sqrt(E ||dL/dz_l||^2 / T_l) of every linear and convolution layer, at its own output, in forward order.

        L is the loss of one sample, T_l the elements of z_l for one sample (NAGN paper). Reading it
        synchronises with the device.
        """
        return self._read(self._own)

    @property
    def nagn_after_norm(self) -> dict[str, float]:
        """The same, at the output of the normalisation behind the layer (the activation's input)."""
        return self._read({**self._own, **self._after})

    def _read(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        if not self.samples:
            return {}
        names = [name for name in self.sites.layers if name in totals]
        if not names:
            return {}
        values = torch.stack([totals[name].reshape(()).to(torch.float64) for name in names]).tolist()
        return {name: math.sqrt(value / self.samples) for name, value in zip(names, values, strict=True)}

    @property
    def has_directions(self) -> bool:
        """Whether growth matrices were observed."""
        return self._directions is not None

    def all_directions(self) -> dict[str, Directions]:
        """Every observed site's directions, as many as were solved."""
        return dict(self._directions or {})

    def directions(self, k: int) -> dict[str, Directions]:
        """The k leading singular triplets of every site's growth matrix, {site name: Directions}.

        M is the mean over samples for a mean loss, the sum for a sum loss, in units of the unscaled loss.
        raises: GrowthError where k exceeds the ``rank`` that was observed.
        """
        if self._directions is None:
            raise GrowthError("no growth matrix was observed: use observe(..., growth=True) around a backward pass")
        return {name: self.site_directions(name, k) for name in self._directions}

    def site_directions(self, name: str, k: int) -> Directions:
        """`directions` of one site, at most k of them: as many as its matrix has."""
        if self._directions is None or name not in self._directions:
            raise GrowthError(f"site {name!r}: its growth matrix was not observed; observe with growth=True")
        found = self._directions[name]
        if k > self._rank[name]:
            raise GrowthError(f"site {name!r}: {k} directions were asked for, rank={self._rank[name]} observed")
        return _first(found, k)

    def solved(self, solver: str) -> bool:
        """Whether one of the further ``solvers`` has run."""
        return solver in self._solved

    def natural(self, k: int) -> dict[str, Directions]:
        """The k leading directions of every site's matrix in TINY's metric, where `natural_directions` was a solver."""
        return {name: self.solution("natural", name, k) for name in self._solved.get("natural", {})}

    def solution(self, solver: str, name: str, k: int) -> Directions:
        """The first k directions that one of the further ``solvers`` found for a site."""
        if name not in self._solved.get(solver, {}):
            raise GrowthError(f"site {name!r}: {solver} was not solved; observe with the growth method that is used")
        return _first(self._solved[solver][name], k)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate to the observed outputs alone: no ``.grad`` is touched, no weight gradient computed."""
        edges = [edge for edge in self._edges]
        if not edges:
            raise GrowthError(
                "the loss was computed without calling any observed layer of the model, or none of them needs a "
                "gradient (requires_grad=False up to their outputs)"
            )
        try:
            torch.autograd.grad(loss, edges, allow_unused=True)
        except RuntimeError as error:
            if "heckpoint" not in str(error):
                raise
            raise GrowthError(
                "the model checkpoints activations with use_reentrant=True, which cannot backpropagate to chosen "
                "tensors; use use_reentrant=False, or observe your own backward pass and give seen="
            ) from error


def _first(found: Directions, k: int) -> Directions:
    """The first k directions: every tensor of directions has them along its last dimension."""
    tensors: dict[str, Any] = {entry.name: getattr(found, entry.name) for entry in dataclasses.fields(found)}
    cut: dict[str, Any] = {name: v[..., :k] for name, v in tensors.items() if isinstance(v, Tensor)}
    return dataclasses.replace(found, **cut)


class observe:
    """Watch a model's forward and backward passes::

        with fg.observe(model, sites) as seen:
            criterion(model(x), y).backward()

    model: the module that is called; sites: as found by `find_sites`.
    nagn: read gradient norms of activations. growth: solve growth matrices at the end of the block
    (True: of every site; or the names of the sites wanted). rank: directions kept, clipped to the
    matrix; one number, or one for each site.
    loss_reduction: "mean" or "sum", of the batch loss over samples. loss_scale: a factor that the
    loss was multiplied by, or the GradScaler that did it: divided out of everything that is read.
    bias: count the producers' bias gradients as a column of M. signed: sites whose directions are wanted
    for signed pairs behind a live ReLU. solvers: name -> another way to solve every site (`SiteView`), read
    by `Observation.solution`. unmapped: sites that only these solvers look at.

    Any number of batches: they are weighted by their samples. The hooks are gone when the block ends;
    if it ends in an exception nothing is solved.
    raises: GrowthError for a gradient that is not finite (naming the layer; under a GradScaler the batch
    is dropped and counted instead), and for activations overwritten in place before they could be used.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        nagn: bool = True,
        growth: bool | Sequence[str] = True,
        rank: int | Mapping[str, int] = 32,
        *,
        loss_reduction: str = "mean",
        loss_scale: float | Any = 1.0,
        bias: bool = False,
        signed: Sequence[str] = (),
        solvers: Mapping[str, Solver] | None = None,
        unmapped: Sequence[str] = (),
    ) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise GrowthError(f"loss_reduction={loss_reduction!r} was given; wanted 'mean' or 'sum'")
        self.model = unwrap(model)
        self.sites = sites
        self.seen = Observation(sites)
        self._replicas = replicas_of(model)
        names = [site.name for site in sites] if growth is True else list(growth or ())
        self._targets = [sites[name] for name in names]
        self._rank = dict(rank) if isinstance(rank, Mapping) else {name: int(rank) for name in names}
        for name in names:
            if self._rank.get(name, 0) < 1:
                raise GrowthError(f"site {name!r}: rank={self._rank.get(name)} was given; wanted at least 1")
        self._nagn = nagn
        self._mean = loss_reduction == "mean"
        self._scale = loss_scale
        self._bias = bias
        self._signed = frozenset(signed)
        self._solvers = dict(solvers or {})
        self._unmapped = frozenset(unmapped)
        self._batches: list[_Batch] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Observation:
        try:
            self._install()
        except BaseException:
            self._stack.close()
            raise
        return self.seen

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        try:
            if kind is None:
                self._finish()
        finally:
            self._forget()

    def _forget(self) -> None:
        self._batches.clear()
        self.seen._edges.clear()

    @contextlib.contextmanager
    def block(self, last: bool) -> Iterator[Observation]:
        """One of several blocks that belong together (micro-batches); solved when the last one ends."""
        try:
            with self._stack:
                self._install()
                yield self.seen
            if last:
                self._finish()
        except BaseException:
            self._forget()
            raise
        if last:
            self._forget()

    # -- hooks ----------------------------------------------------------------------------------------

    def _install(self) -> None:
        check_not_captured(self.model)
        if "torch._dynamo" in sys.modules:  # compiled code was traced without the hooks
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        producers = {name for site in self._targets for name in site.producers}
        consumers = {name for site in self._targets for name in site.consumers}
        watched = producers | consumers | (set(self.sites.layers) if self._nagn else set())
        self._hook(self.model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
        by_weight: dict[int, str] = {}
        calls = self.sites.graph.calls if self.sites.graph is not None else ()
        weights = {call.name: call.weight for call in calls if call.bare}
        for name in watched:
            module = find_module(self.model, name)
            if module is not None and name not in weights:
                watch = self._watcher(name, name in producers, name in consumers)
                self._hook(module.register_forward_hook(watch, with_kwargs=True))
            else:
                weight = tensors_of(self.model).get(weights.get(name, name))
                if weight is None:
                    raise GrowthError(f"layer {name!r} is not in this model: the sites were found in another one")
                by_weight[id(weight)] = name
        if by_weight:
            self._stack.enter_context(_FunctionalLayers(by_weight, producers, consumers, self._saw))
        if self._nagn:
            for info in self.sites.layers.values():
                if info.norm is not None and (norm := find_module(self.model, info.norm)) is not None:
                    self._hook(norm.register_forward_hook(self._norm_watcher(info.name)))

    def _hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._stack.callback(handle.remove)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = _Batch()
        given = {p: leaf for p, leaf in argument_paths(self.model, args, kwargs) if isinstance(leaf, Tensor)}
        graph = self.sites.graph
        batch.capture.arguments = tuple(given.get(path) for path in graph.trace.paths) if graph is not None else ()
        batch.capture.samples = next((tensor.shape[0] for tensor in given.values() if tensor.dim()), 1)
        self._batches.append(batch)

    def _batch(self, output: Tensor) -> _Batch:
        if not self._batches:  # a part of the model was called on its own
            batch = _Batch()
            batch.capture.samples = output.shape[0] if output.dim() else 1
            self._batches.append(batch)
        return self._batches[-1]

    def _watcher(self, name: str, produces: bool, consumes: bool) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(output, Tensor) and isinstance(x, Tensor):
                self._saw(name, produces, consumes, x, output)

        return watch

    def _saw(self, name: str, produces: bool, consumes: bool, x: Tensor, output: Tensor) -> None:
        # Not by output.requires_grad alone: a frozen producer's input is read all the same.
        if not torch.is_grad_enabled():
            return
        batch = self._batch(output)
        number = batch.calls.get(name, 0)
        batch.calls[name] = number + 1
        key = (name, number)
        if produces:
            batch.capture.inputs[key] = x.detach()
            batch.versions[key] = x._version
        if not output.requires_grad:
            return

        if consumes:
            batch.capture.called.add(key)

        def arrived(gradient: Tensor) -> None:
            if consumes:
                kept = batch.capture.gradients.get(key)
                batch.capture.gradients[key] = gradient.detach() if kept is None else kept + gradient.detach()
            if self._nagn and name in self.sites.layers:
                self._measure(batch.own, name, number, gradient)

        output.register_hook(arrived)
        self.seen._edges.append(torch.autograd.graph.get_gradient_edge(output))

    def _norm_watcher(self, layer: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                batch = self._batch(output)
                number = batch.calls.get(f"{layer} (norm)", 0)
                batch.calls[f"{layer} (norm)"] = number + 1
                output.register_hook(lambda g: self._measure(batch.after_norm, layer, number, g))

        return watch

    def _measure(self, into: dict[str, dict[int, _Reading]], name: str, number: int, gradient: Tensor) -> None:
        readings = into.setdefault(name, {})
        if number in readings:
            raise GrowthError(
                f"layer {name!r}: a second backward pass went through the same forward pass, so its gradient norm "
                "would be read in parts; add the losses and call backward once, or observe with nagn=False"
            )
        readings[number] = _Reading(ops.sum_of_squares(gradient.detach()), gradient.numel())

    # -- at the end -----------------------------------------------------------------------------------

    def _finish(self) -> None:
        scale = self._loss_scale()
        batches = [b for b in self._batches if b.own or b.after_norm or b.capture.gradients]
        with together(self._replicas):
            batches = self._finite(batches)
        batches = self._counted(batches)
        for batch in batches:
            self._add_norms(batch, scale)
        if self._replicas is not None:
            for totals in (self.seen._own, self.seen._after):
                self._sum_norms(totals)
        if self._targets and batches:
            self._solve(batches, scale)

    def _counted(self, batches: list[_Batch]) -> list[_Batch]:
        """Counts samples over all ranks; no batch stays where one rank has none to add."""
        samples = sum(batch.capture.samples for batch in batches)
        if self._replicas is not None:
            known = torch.tensor([samples, not batches, self.seen.dropped])
            samples, without, self.seen.dropped = self._replicas.sum(known).tolist()
            if without:
                samples, batches = 0, []
        self.seen.samples = samples
        return batches

    def _sum_norms(self, totals: dict[str, Tensor]) -> None:
        """Over the ranks, each of which may have called other layers."""
        assert self._replicas is not None
        device, names = self._replicas.device, list(self.sites.layers)
        zero = torch.zeros((), dtype=torch.float64, device=device)
        values = [totals[name].to(device).reshape(()) if name in totals else zero for name in names]
        called = [torch.ones_like(zero) if name in totals else zero for name in names]
        summed, counts = self._replicas.sum(torch.stack([*values, *called])).split(len(names))
        totals.update({name: value for name, value, count in zip(names, summed, counts.tolist(), strict=True) if count})

    def _loss_scale(self) -> float:
        if hasattr(self._scale, "get_scale"):
            return float(self._scale.get_scale())
        value = float(self._scale)
        if not math.isfinite(value) or value == 0:
            raise GrowthError(f"loss_scale={self._scale!r} was given; wanted a finite number other than 0")
        return value

    def _finite(self, batches: list[_Batch]) -> list[_Batch]:
        """Batches whose gradients are all finite; one read from the device for all of them."""
        checks: list[tuple[_Batch, str, Tensor]] = []
        for batch in batches:
            known: set[str] = set()
            for name, readings in batch.own.items():
                known.add(name)
                checks += [(batch, name, reading.total) for reading in readings.values()]
            for (name, _), gradient in batch.capture.gradients.items():
                if name not in known:
                    checks.append((batch, name, ops.sum_of_squares(gradient)))
        if not checks:
            return batches
        fine = torch.stack([torch.isfinite(total).reshape(()) for _, _, total in checks]).tolist()
        bad = [(batch, name) for (batch, name, _), ok in zip(checks, fine, strict=True) if not ok]
        if not bad:
            return batches
        if not hasattr(self._scale, "get_scale"):
            raise GrowthError(
                f"layer {bad[0][1]!r}: its output's gradient is not finite (or its square overflows float32); "
                "check the loss, or give loss_scale=the GradScaler if there is one"
            )
        dropped = {id(batch) for batch, _ in bad}
        self.seen.dropped += len(dropped)
        return [batch for batch in batches if id(batch) not in dropped]

    def _add_norms(self, batch: _Batch, scale: float) -> None:
        """Adds sum over samples of ||dL/dz||^2 / T, which is N sum(g^2) / elements, times N^2 for a mean loss."""
        n = batch.capture.samples
        weight = (n * n if self._mean else 1) * n / scale**2
        for source, target in ((batch.own, self.seen._own), (batch.after_norm, self.seen._after)):
            for name, readings in source.items():
                elements = sum(reading.elements for reading in readings.values())
                total = torch.stack([reading.total.reshape(()) for reading in readings.values()]).double().sum()
                value = total * (weight / max(elements, 1))
                target[name] = target[name] + value if name in target else value

    def _solve(self, batches: list[_Batch], scale: float) -> None:
        total = self.seen.samples
        weights = [(batch.capture.samples / total if self._mean else 1.0) / scale for batch in batches]
        with together(self._replicas):
            for batch in batches:
                self._check_versions(batch)
        solving = SiteSolving(self.model, self.sites, self._rank, self._bias, self._signed, self._replicas)
        captures = [batch.capture for batch in batches]
        mapped = [site for site in self._targets if site.name not in self._unmapped]
        self.seen._directions = solving.directions(mapped, captures, weights)
        self.seen._rank = {name: self._rank[name] for name in self.seen._directions}
        for label, solver in self._solvers.items():
            self.seen._solved[label] = solving.by(solver, self._targets, captures, weights)

    def _check_versions(self, batch: _Batch) -> None:
        for (name, number), version in batch.versions.items():
            if batch.capture.inputs[name, number]._version != version:
                raise GrowthError(
                    f"layer {name!r}: its input was overwritten in place after the layer had read it, so the growth "
                    "matrix cannot be formed; make the op behind it out of place"
                )


class _FunctionalLayers(TorchFunctionMode):
    """Sees F.linear, F.conv2d, ... with weights that no layer module owns."""

    def __init__(
        self, by_weight: Mapping[int, str], producers: set[str], consumers: set[str], saw: Callable[..., None]
    ) -> None:
        super().__init__()
        self._by_weight = by_weight
        self._producers = producers
        self._consumers = consumers
        self._saw = saw

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kind = getattr(func, "__name__", "")
        if kind not in _WEIGHTED or not isinstance(result, Tensor):
            return result
        name, at = ("mat1", 1) if kind == "addmm" else ("input", 0)  # addmm takes the bias first
        x = kwargs.get(name, args[at] if len(args) > at else None)
        for operand in (*args[at + 1 :], *kwargs.values()):
            if not isinstance(operand, Tensor) or operand is x or operand.dim() < 2:
                continue
            layer = self._by_weight.get(id(operand)) or self._by_weight.get(id(operand._base))
            if layer is not None and isinstance(x, Tensor):
                self._saw(layer, layer in self._producers, layer in self._consumers, x, result)
        return result


_WEIGHTED = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d embedding addmm mm matmul "
    "__matmul__".split()
)
