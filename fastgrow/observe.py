"""What the backward pass tells: gradient norms of activations, and the factors of growth matrices."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import kernel_ops
from .arguments import choice, number, whole
from .closures import ran_hidden
from .cuda_graphs import check_not_captured
from .distributed import replicas_of, together
from .errors import GrowthError
from .functional import FlatTexts, FunctionalLayers
from .growth_map import check_mapped
from .names import find_module, find_tensor, modules_in
from .nn import attention_opened
from .observation import Observation
from .readings import NormSums
from .replay import Capture
from .riding import carried_sum, carry, riding
from .room import check_told_apart, has_room, live_directions, live_shares
from .site_sketching import Pieces, SiteSketches
from .site_solving import SiteSolving
from .site_view import Solver
from .sites import Sites, argument_paths, unwrap
from .solve import Directions
from .surroundings import set_aside
from .target_solving import Batch, TargetSolving, pooled

__all__ = ["observe"]


_MOST_PENDING = 64  # batches whose readings stay on the device unread
_PLACES: dict[bool | str, frozenset[str]] = {
    True: frozenset({"own", "norm"}),
    False: frozenset(),
    "own": frozenset({"own"}),
    "after_norm": frozenset({"norm"}),
}


def _targets(sites: Sites, growth: bool | str | Sequence[str], rank: int | Mapping[str, int]) -> list[str]:
    """The names of the sites whose growth matrices are wanted."""
    if growth == "sketch":
        return list(rank) if isinstance(rank, Mapping) else [site.name for site in sites]
    if isinstance(growth, str):
        raise GrowthError(f"growth={growth!r} was given; wanted True, False, 'sketch', or a list of site names")
    return [site.name for site in sites] if growth is True else list(growth or ())


class observe:
    """Watch a model's forward and backward passes::

        with fg.observe(model, sites) as seen:
            criterion(model(x), y).backward()

    model: the module that is called; sites: as found by `find_sites`.
    nagn: read gradient norms of activations; True: of every layer at its own output and behind the norm that follows,
    "own" or "after_norm": at that place alone, one read a layer instead of two. On a GPU what is read before a
    ReLU, ReLU6, LeakyReLU or `fg.nn.ReLU` module rides on its backward pass (`riding`), which changes no bit of it.
    growth: solve growth matrices at the end of the block (True: of every site; or the names of the sites wanted;
    "sketch": below). rank: directions kept, clipped to the matrix; one number, or one for each site.
    loss_reduction: "mean" or "sum", of the batch loss over samples. loss_scale: a factor that the
    loss was multiplied by, or the GradScaler that did it: divided out of everything that is read.
    bias: count the producers' bias gradients as a column of M. signed: sites whose directions are wanted for signed
    pairs behind a live ReLU, each with the norm of the new units' incoming weights, relative to the present ones' mean
    and divided by what norms in series multiply; from there the layers between are linearised. solvers: name -> another
    way to solve every site (`SiteView`), read by `Observation.solution`. unmapped: sites that only these solvers look
    at.

    Any number of batches: they are weighted by their samples. Growth matrices of forward passes that one backward pass
    goes through (two views of a pair, the parts of a batch) add up, as the gradients of weights do; NAGN counts each of
    them as a batch whose loss is the mean over its samples. The hooks are gone when the block ends; if it ends in an
    exception nothing is solved.

    growth="sketch": for hundreds of batches. The exact way keeps the tensors of every batch to the end; a sketch
    multiplies them inside the backward pass and lets them go, and adds up ``M Omega`` and ``Psi M`` of every site
    (`fastgrow.sketch`), (4 rank + 32)-fold the sides of M. The optimizer may step in between: M is then the mean over
    batches, each weighted by its samples, of the gradient at the weights of its own step (for a sum loss their sum).
    ``rank`` as a mapping names the sites that are sketched. The directions are approximate: the captured norm was 0.988
    to 0.9999 on gradients of networks early and late in training, 0.81 to 0.85 on flat spectra; a higher rank than is
    read captures more, and `Directions.captured` is an estimate. A block may hold the whole loop; or ``block(last)``
    of one observer goes around each step::

        watching = fg.observe(model, sites, growth="sketch")
        for number, (x, y) in enumerate(batches):
            with watching.block(last=number == 99) as seen:
                criterion(model(x), y).backward()
    raises: GrowthError for a gradient that is not finite (naming the layer; under a GradScaler the batch
    is dropped and counted instead), and for activations overwritten in place before they could be used.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        nagn: bool | Literal["own", "after_norm"] = True,
        growth: bool | str | Sequence[str] = True,
        rank: int | Mapping[str, int] = 32,
        *,
        loss_reduction: str = "mean",
        loss_scale: float | Any = 1.0,
        bias: bool = False,
        signed: Mapping[str, float] | None = None,
        solvers: Mapping[str, Solver] | None = None,
        unmapped: Sequence[str] = (),
    ) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise GrowthError(f"loss_reduction={loss_reduction!r} was given; wanted 'mean' or 'sum'")
        scaled = hasattr(loss_scale, "get_scale")
        if not scaled and number("observe", "loss_scale", loss_scale) == 0:
            raise GrowthError(f"loss_scale={loss_scale!r} was given; wanted a finite number other than 0")
        self.model = unwrap(model)
        self.sites = sites
        self._norms = NormSums(loss_reduction == "mean", scaled)
        self._places = _PLACES[choice("observe", "nagn", nagn, tuple(_PLACES))]
        self._batches: list[Batch] = []
        self.seen = Observation(sites, self._norms, self._places, self._last_edges)
        self._replicas = replicas = replicas_of(model)
        names = _targets(sites, growth, rank)
        self._targets = [sites[name] for name in names]
        self._shares: dict[str, tuple[int, int]] = {}
        self._roomy = has_room(self.model)
        if self._roomy:
            self._shares = live_shares(self.model, sites)
            check_told_apart(self.model, self._targets)
        ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(names, rank)
        self._rank = {name: whole(f"site {name!r}", "rank", ranks.get(name)) for name in names}
        self._nagn = bool(nagn)
        self._scale = loss_scale
        solvers, signed = dict(solvers or {}), dict(signed or {})
        for site in self._targets:
            if site.name not in unmapped:
                check_mapped(site)
        self._sketches: SiteSketches | None = None
        if growth == "sketch":
            if solvers:
                raise GrowthError(
                    f"{', '.join(solvers)} reads every batch's tensors, which a sketch does not keep: use growth=True"
                )
            self._sketches = SiteSketches(self.model, sites, self._targets, self._rank, bias, signed, replicas)
        solving = SiteSolving(self.model, sites, self._rank, bias, signed, replicas)
        self._solving = TargetSolving(solving, self._targets, solvers, frozenset(unmapped))
        self._streams = self._sketches is not None or not names  # nothing of a batch is kept once it is over
        # Solved inside the backward pass: on a CPU, which solves one site at a time anyway; a GPU is waited for by
        # all of them at once, ranks meet at the end, and a scaler's batch may turn out to have overflowed.
        self._alone = False
        self._may_hurry = bool(names) and not self._streams and self._replicas is None and not scaled
        self._passes: set[int] = set()  # the numbers of the backward passes seen
        self.spoiled = False  # another one came after sites had been solved in the only one that was expected
        self._multiplying = False
        self._watching = False
        self._calls: list[tuple[Batch, FlatTexts | None]] = []  # forward passes under way
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Observation:
        try:
            self._install()
        except BaseException:
            self._uninstall()
            raise
        return self.seen

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._uninstall()
        try:
            if kind is None:
                with set_aside():
                    self._finish()
        finally:
            self._forget()

    def _forget(self) -> None:
        for batch in self._batches:
            batch.edges.clear()
            batch.capture = Capture()  # hooks on tensors hold the batch as long as a loss holds its graph
        self._batches.clear()
        self._solving.reset()

    @contextlib.contextmanager
    def block(self, last: bool, alone: bool = False) -> Iterator[Observation]:
        """One of several blocks that belong together (micro-batches, or the steps of a sketch); solved when the last
        one ends. alone: it is the only block, and one backward pass is expected inside it: sites are solved there."""
        self._alone = alone and self._may_hurry
        try:
            try:
                self._install()
                yield self.seen
            finally:
                self._uninstall()
            if last:
                with set_aside():
                    self._finish()
            elif self._streams:
                self._close()
        except BaseException:
            self._forget()
            raise
        if last:
            self._forget()

    @contextlib.contextmanager
    def of_closure(self) -> Iterator[Observation]:
        """A block for one `Observation.backward`: passes that a closure makes on its way to its loss do not count."""
        with self as seen:
            self._watching = False
            yield seen

    @property
    def one_pass(self) -> bool:
        """Whether a single backward pass brought all that was seen."""
        return len(self._passes) == 1

    @property
    def seconds_inside(self) -> float:
        """What solving took inside backward passes."""
        return self._solving.seconds

    def _last_edges(self, last: bool) -> list[Any]:
        """What `Observation.backward` ends at."""
        self._alone = last and self._may_hurry
        self._watching = True
        edges = [edge for batch in self._batches for edge in batch.edges]
        hidden = [name for batch in self._batches for name in self.sites.layers if name in batch.capture.hidden]
        if hidden and not edges:
            raise ran_hidden(hidden[0])
        return edges

    # -- hooks ----------------------------------------------------------------------------------------

    def _install(self) -> None:
        modules = modules_in(self.model)
        check_not_captured(self.model, modules)
        self._watching = True
        if "torch._dynamo" in sys.modules:  # compiled code was traced without the hooks
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._stack.enter_context(attention_opened(modules))
        if self._nagn:
            self._stack.enter_context(riding(self.model))
        producers = {name for site in self._targets for name in site.producers}
        consumers = {name for site in self._targets for name in site.consumers}
        watched = producers | consumers | (set(self.sites.layers) if self._nagn else set())
        hooks = self._hooks
        hooks.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
        hooks.append(self.model.register_forward_hook(self._end, always_call=True))
        functional: dict[str, tuple[nn.Module, str]] = {}
        calls = self.sites.graph.calls if self.sites.graph is not None else ()
        weights = {call.name: call.weight for call in calls if call.bare}
        for name in watched:
            module = find_module(self.model, name)
            if module is not None and name not in weights:
                watch = self._watcher(name, name in producers, name in consumers)
                hooks.append(module.register_forward_hook(watch, with_kwargs=True))
            else:
                place = find_tensor(self.model, weights.get(name, name))
                if place is None:
                    raise GrowthError(f"layer {name!r} is not in this model: the sites were found in another one")
                functional[name] = place
        if functional:
            self._stack.enter_context(FunctionalLayers(functional, producers, consumers, self._saw))
        if "norm" in self._places:
            for info in self.sites.layers.values():
                if info.norm is not None and (norm := find_module(self.model, info.norm)) is not None:
                    hooks.append(norm.register_forward_hook(self._norm_watcher(info.name)))

    def _uninstall(self) -> None:
        self._watching = False  # hooks on tensors live as long as their graph
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        self._stack.close()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._streams and torch.is_grad_enabled():
            self._close(over=True)
        batch = self._new_batch()
        given = {p: leaf for p, leaf in argument_paths(self.model, args, kwargs) if isinstance(leaf, Tensor)}
        graph = self.sites.graph
        batch.capture.arguments, batch.capture.call = given, (args, kwargs)
        path, first = next(((p, tensor) for p, tensor in given.items() if tensor.dim()), ("", None))
        along = graph.samples_at.get(path, 0) if graph is not None else 0
        batch.capture.samples = 1 if first is None else first.shape[along]
        texts = FlatTexts(len(first)) if first is not None and first.dim() == 1 else None
        if texts is not None:
            texts.__enter__()
        self._calls.append((batch, texts))

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        batch, texts = self._calls.pop()
        if texts is None:
            return
        texts.__exit__(None, None, None)
        if output is not None and (bags := texts.samples) is not None:  # no output: the forward pass raised
            batch.capture.samples, batch.capture.flat = bags, True

    def _new_batch(self) -> Batch:
        batch = Batch(pieces=Pieces() if self._sketches is None else self._sketches.begin())
        self._batches.append(batch)
        return batch

    def _batch(self, output: Tensor) -> Batch:
        if not self._batches:  # a part of the model was called on its own
            batch = self._new_batch()
            batch.capture.samples = output.shape[0] if output.dim() else 1
        return self._batches[-1]

    def _watcher(self, name: str, produces: bool, consumes: bool) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(output, Tensor) and isinstance(x, Tensor):
                self._saw(name, produces, consumes, x, output)

        return watch

    def _saw(self, name: str, produces: bool, consumes: bool, x: Tensor, output: Tensor) -> None:
        # Not by output.requires_grad alone: a frozen producer's input is read all the same.
        if self._multiplying:
            return
        if not torch.is_grad_enabled():
            if self._calls:
                self._batches[-1].capture.hidden.add(name)
            return
        batch = self._batch(output)
        number = batch.calls.get(name, 0)
        batch.calls[name] = number + 1
        key = (name, number)
        if produces and (self._sketches is None or self._sketches.wants("input", key)):
            batch.capture.inputs[key] = x.detach()
            batch.pieces.versions[key] = x._version
            if self._sketches is not None:
                self._arrived(batch, "input", key)
        if not output.requires_grad:
            return
        measured = self._nagn and name in self.sites.layers

        if consumes:
            batch.capture.called.add(key)

        def arrived(gradient: Tensor) -> None:
            if not self._watching:
                if torch.is_grad_enabled():
                    batch.differentiable.add(key)
                return
            self._measure(batch, "own" if measured else "check", name, number, gradient)
            if not consumes:
                return
            gradient = gradient.detach()
            if self._sketches is None:
                kept, before = batch.capture.gradients.get(key), key in batch.differentiable
                if torch.is_grad_enabled():  # the backward pass builds a graph of its own
                    batch.differentiable.add(key)
                if before or (kept is not None and key in batch.differentiable):
                    raise GrowthError(
                        f"layer {name!r}: a backward pass with create_graph=True went through it before another one, "
                        "and a loss that depends on gradients has no growth matrix; leave the penalty out of what is "
                        "observed, take Hessian products behind the block, or use a method that reads no gradients"
                    )
                batch.capture.gradients[key] = gradient if kept is None else kept + gradient
                if self._alone and self.one_pass and gradient.is_cpu and not torch.is_grad_enabled():
                    self._solving.arrived(name, self._batches)
            elif self._sketches.wants("gradient", key):
                batch.capture.gradients[key] = gradient
                self._arrived(batch, "gradient", key)

        if measured or consumes:
            handle = output.register_hook(arrived)
            if not consumes and "own" not in self._places:
                batch.unless_norm.setdefault(name, []).append(handle)
        batch.edges.append(torch.autograd.graph.get_gradient_edge(output))

    def _arrived(self, batch: Batch, kind: str, key: tuple[str, int]) -> None:
        assert self._sketches is not None
        self._multiplying = True
        try:
            self._sketches.arrived(batch.pieces, kind, key, batch.capture)
        finally:
            self._multiplying = False

    def _norm_watcher(self, layer: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                batch = self._batch(output)
                number = batch.calls.get(f"{layer} (norm)", 0)
                batch.calls[f"{layer} (norm)"] = number + 1
                output.register_hook(
                    lambda g: self._measure(batch, "norm", layer, number, g) if self._watching else None
                )
                for handle in batch.unless_norm.pop(layer, ()):
                    handle.remove()

        return watch

    def _measure(self, batch: Batch, place: str, name: str, number: int, gradient: Tensor) -> None:
        if batch.closed:
            raise GrowthError(
                f"layer {name!r}: its gradient came after the next forward pass had begun and the batch was over; call "
                "backward before the next forward pass, or observe with growth=True"
            )
        readings, backward = batch.readings, torch._C._current_graph_task_id()
        self._passes.add(backward)
        if readings.scale is None:
            readings.scale, batch.backward = self._loss_scale(gradient), backward
        total = carried_sum(gradient)
        if total is None and place == "check":  # finite or not: no digit of it is used
            wide = torch.promote_types(gradient.dtype, torch.float32)
            total = torch.linalg.vector_norm(gradient.detach(), dtype=wide)
        elif total is None:
            total = kernel_ops.sum_of_squares(gradient)
            carry(gradient, total)  # a residual sum hands the same tensor to both its branches
        live, whole = self._shares.get(name, (1, 1))  # room is no element of the layer's output
        readings.note(place, name, number, total, gradient.numel() * live // whole)

    def _loss_scale(self, gradient: Tensor) -> float | Tensor:
        """The scale of the batch whose gradients arrive; from a GradScaler without waiting for the device."""
        scaler: Any = self._scale
        if not self._norms.scaled:
            return float(scaler)
        if hasattr(scaler, "scale"):
            return scaler.scale(torch.ones((), device=gradient.device))
        return float(scaler.get_scale())

    # -- at the end -----------------------------------------------------------------------------------

    def _close(self, over: bool = False) -> None:
        """Count batches that are over and let go of them. over: a forward pass begins; the backward pass of the
        latest batches may still come."""
        done = [at for at, batch in enumerate(self._batches) if batch.reached and batch.pieces.complete]
        count = max(done, default=-1) + 1 if over else len(self._batches)
        reached = [batch for batch in self._batches[:count] if batch.reached]  # the others: a forward pass alone
        for batch in self._batches[:count]:
            batch.closed = True
            batch.edges.clear()  # each of them holds the graph that holds the batch
        for batch, shared in zip(reached, pooled(reached), strict=True):
            read = self._norms.put(batch.readings, batch.capture.samples)
            if self._sketches is not None:
                self._sketches.check_complete(batch.pieces)
                n, scale = batch.capture.samples, batch.readings.scale
                assert scale is not None
                weight = (shared if self._norms.mean else 1) / scale
                self._sketches.add(batch.pieces, weight, n, torch.isfinite(read).all())
        del self._batches[:count]
        if self._sketches is not None:
            self._sketches.agree()
        if self._norms.pending >= _MOST_PENDING and self._replicas is None:
            self._norms.settle()

    def _finish(self) -> None:
        batches = [batch for batch in self._batches if batch.reached]
        if self._streams:
            with together(self._replicas if self._sketches is not None else None):
                self._close()
            if self._sketches is None and self._replicas is None:
                return
            with together(self._replicas):
                self._norms.settle()
        else:
            for batch in batches:
                self._norms.put(batch.readings, batch.capture.samples)
            with together(self._replicas):
                fine = self._norms.settle()
            batches = [batch for batch, ok in zip(batches, fine, strict=True) if ok]
        self._count()
        if self._replicas is not None:
            for totals in (self._norms.own, self._norms.after):
                self._sum_norms(totals)
        self.spoiled = self._solving.begun and not self.one_pass
        if not self._norms.samples or self.spoiled:
            return
        if self._sketches is not None:
            found = self._sketches.directions(self._norms.mean, self._norms.samples)
            self.seen.hold(self._live(found), self._rank)
        elif self._targets:
            self._solve(batches)

    def _count(self) -> None:
        """Counts samples over all ranks; none where one rank has none to add."""
        if self._replicas is not None:
            norms = self._norms
            known = torch.tensor([norms.samples, not norms.samples, norms.dropped], device="cpu")
            samples, without, norms.dropped = self._replicas.sum(known).tolist()
            norms.samples = 0 if without else samples

    def _sum_norms(self, totals: dict[str, float]) -> None:
        """Over the ranks, each of which may have called other layers."""
        assert self._replicas is not None
        names = list(self.sites.layers)
        values = [totals.get(name, 0.0) for name in names]
        called = [float(name in totals) for name in names]
        summed = self._replicas.sum(torch.tensor([values, called], dtype=torch.float64, device="cpu")).tolist()
        totals.update({name: value for name, value, count in zip(names, *summed, strict=True) if count})

    def _solve(self, batches: list[Batch]) -> None:
        total = self._norms.samples
        weights = [
            (shared / total if self._norms.mean else 1.0) / float(batch.readings.scale or 1.0)
            for batch, shared in zip(batches, pooled(batches), strict=True)
        ]
        with together(self._replicas):
            directions, solutions = self._solving.finish(batches, weights)
        self.seen.hold(self._live(directions), self._rank)
        for label, found in solutions.items():
            self.seen.hold_solution(label, self._live(found))

    def _live(self, found: dict[str, Directions]) -> dict[str, Directions]:
        """Directions of the network without its room."""
        return live_directions(self.model, self.sites, found) if self._roomy else found
