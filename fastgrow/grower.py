"""The loop: when -> where -> how -> widen."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .arguments import as_list, choice, copies_of, instance, whole
from .beforehand import check_any, check_followers, offered, refused, wishes
from .distributed import replicas_of
from .errors import GrowthError
from .evidence import evidence_of, norm_factors
from .gain import GainMeter, check_measurable
from .grow import grow_observed, observe_closure, observing, wanted_units
from .growth_report import GrowthReport, SiteGrowth
from .how import GradMax, How
from .insert import insert_layer
from .natural import natural_directions
from .observation import Observation
from .observe import observe as Observer
from .optimizer_state import check_trained
from .ranks import ActivationRanks, weight_ranks
from .reserve import check_method, check_room
from .reserve import reserve as make_room
from .room import has_room
from .sharded import whole as whole_tensor
from .sites import Site, Sites, tensors_of, unwrap
from .stages import newest_stage
from .trial import find_sites
from .when import When
from .where import NORTH, Everywhere, Evidence, Where

__all__ = ["Grower"]


class Grower:
    """Grows a model inside any training loop::

        grower = fg.Grower(model, optimizer, example_inputs=x, when=..., where=..., how=...)
        for x, y in loader:
            with grower.observe():
                loss = criterion(model(x), y)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            grower.step()
        grower.step(metric=accuracy)  # at the end of an epoch, for policies that read one

    A trigger arms; the next `batches` steps are measured; the `step` after them grows. Triggers that can be foreseen
    arm so many steps ahead, so that growth comes on the very step. Unarmed, `observe` costs nothing, and neither does
    it on the steps between the measured ones (`every`): no hook is set.

    optimizer: one or a list. sites: as found by `find_sites`: an error where the policy may ask for one that the method
    cannot grow. Without sites, example_inputs to find them with: such ones are left out, ``grower.sites.frozen`` says
    why.
    also: EMA copies that must follow. accumulation: `observe` blocks (micro-batches) per step.
    batches: steps whose gradients are averaged for a growth, each at the weights of its own step; fewer before a
    growth that is foreseen earlier, and one batch where a `closure` measures. every: they lie so many steps apart,
    counted back from the growth, whose own step is measured whatever `every` is; norms and growth matrices are the
    means over the measured steps. growth: "exact" keeps the tensors of all of them until it solves, "sketch" none
    (`observe`: approximate, for many batches). On a CPU a loop that was seen to make one backward pass a measurement is
    taken to do so again: later ones solve each site inside it and keep nothing to its end; where another pass comes
    after all, the next step is measured anew, and grows.
    loss_reduction, loss_scale: as in `observe` (loss_scale: the GradScaler, where there is one).
    measure_gain: every report carries the decrease of the loss that the new units' first step brings, beside the
    predicted one (`GrowthReport.measured_gain`); growth then needs ``step(closure=...)``, and takes 3 calls of the
    closure more for one site, n + 3 for n, which its `seconds` leave out.

    reserve: room for growth ahead of it, so that tensors seldom change their shapes and a compiled model is seldom
    compiled anew (`fastgrow.reserve` says what that costs). {site: width}: room up to this width is made now; past it
    the site grows as any other. A number: whenever a site must be widened, it is to a multiple of this width. Raises
    `GrowthError` for sites that can have no room (find them with exclude=, or name the others).

    model: the module to call. history: a `GrowthReport` for each growth, with its step. dropped: batches
    left out of a measurement because they overflowed under the GradScaler.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        example_inputs: Any = None,
        sites: Sites | None = None,
        when: When,
        where: Where | None = None,
        how: How | None = None,
        also: nn.Module | Iterable[nn.Module] = (),
        accumulation: int = 1,
        batches: int = 1,
        every: int = 1,
        growth: Literal["exact", "sketch"] = "exact",
        loss_reduction: str = "mean",
        loss_scale: Any = 1.0,
        measure_gain: bool = False,
        reserve: int | Mapping[str, int] | None = None,
    ) -> None:
        instance("Grower", "model", model, nn.Module)
        found_here = sites is None
        if sites is None:
            if example_inputs is None:
                raise GrowthError("Grower: give example_inputs= to find the sites with, or sites=")
            sites = find_sites(model, example_inputs)
        check_any(instance("Grower", "sites", sites, Sites))
        self.model = model
        self.optimizers = as_list(optimizer)
        check_trained(unwrap(model), self.optimizers)
        self.sites = sites
        self.when = instance("Grower", "when", when, When)
        self.where = Everywhere(fraction=0.25) if where is None else instance("Grower", "where", where, Where)
        self.how = GradMax() if how is None else instance("Grower", "how", how, How)
        if unfit := refused(model, self.sites, self.where, self.how):
            if not found_here:
                raise GrowthError(
                    f"Grower: {next(iter(unfit.values()))}. To grow the others: "
                    f"sites=fastgrow.find_sites(model, inputs, exclude={list(unfit)})"
                )
            self.sites = self.sites.without(unfit)
            check_any(self.sites)
        self.where.check(self.sites)
        self.also = copies_of(also)
        check_followers(model, self.sites, self.how, self.optimizers, self.also)
        self.accumulation = whole("Grower", "accumulation", accumulation)
        self.batches = whole("Grower", "batches", batches)
        self.every = whole("Grower", "every", every)
        self.growth = choice("Grower", "growth", growth, ("exact", "sketch"))
        self.measure_gain = bool(measure_gain)
        if self.measure_gain:
            check_measurable(model, self.optimizers)
        self.history: list[GrowthReport] = []
        self.steps = 0
        self.dropped = 0
        self._round_to = 1
        if reserve is not None and not isinstance(reserve, Mapping):
            self._round_to = whole("Grower", "reserve", reserve)
            check_room(model, self.sites, [site.name for site in self.sites], self.how)
        self._options = {"loss_reduction": loss_reduction, "loss_scale": loss_scale}
        self._dropped_before = 0
        self._told = False  # that nothing is measured
        self._due: list[int] = []  # the steps on which growth was or will be due
        self._asked = 0  # the last step that `when` was asked about
        self._seen: Observation | None = None
        self._watching: Observer | None = None
        self._inside = False  # of an `observe` block
        self._one_pass = False  # whether the last measurement was of one backward pass: so may the next be
        self._spoiled = False  # it was not, and sites had been solved: they are measured anew
        self._ranks: ActivationRanks | None = None
        self._blocks = self._wanted = 0  # seen since the measurement began, and how many it lasts
        self._for_gain = False
        self._observe_seconds = 0.0
        if needs := self._needs():
            self._observer(needs)  # refuses by name what cannot be observed, before training begins
        if isinstance(reserve, Mapping):
            # a run that is resumed may be past it
            present = self.sites.widths(model) if newest_stage(unwrap(model)) else {}
            widths = {name: width for name, width in reserve.items() if present.get(name, 0) < width}
            if widths:
                make_room(model, widths, sites=self.sites, how=self.how, optimizer=self.optimizers, also=self.also)
        self._arm_ahead()

    def _offered(self) -> Sites:
        return offered(self.model, self.sites, self.how)

    def _wishes(self) -> dict[str, int]:
        return wishes(self.model, self.sites, self.where, self.how)

    @property
    def _span(self) -> int:
        """Steps from the first that is measured to the last."""
        return (self.batches - 1) * self.every + 1

    @property
    def armed(self) -> bool:
        """Whether a growth is on its way: being measured, or carried out by the next measured step."""
        return bool(self._due)

    # -- when -----------------------------------------------------------------------------------------

    def _arm_ahead(self) -> None:
        for step in range(self._asked + 1, self.steps + self._span + 1):
            if self.when.coming(step):
                self._due.append(step)
            self._asked = step

    def _arm_now(self, wanted: bool) -> None:
        if wanted:
            self._due = sorted({*self._due, self.steps})

    def _disarm(self) -> None:
        """No growth that was due by now is any more."""
        self._due = [step for step in self._due if step > self.steps]
        self._seen = None

    def _needs(self) -> frozenset[str]:
        reads = set(self.where.reads)
        if isinstance(self.where, NORTH) and self.where.read == "weights":
            reads.remove("ranks")  # read from the model, no pass needs watching
        if self.how.needs_directions:
            reads.add("directions")
        return frozenset(reads)

    @contextlib.contextmanager
    def observe(self) -> Iterator[None]:
        """Around the forward and backward pass of one micro-batch: measures where a growth is armed, and its turn."""
        if self._inside:
            raise GrowthError(
                "Grower.observe: this block is inside another one of the same Grower, and would be counted twice; put "
                "one around the forward and the backward pass of each micro-batch"
            )
        self._inside = True
        try:
            with self._observed():
                yield
        finally:
            self._inside = False

    @contextlib.contextmanager
    def _observed(self) -> Iterator[None]:
        if self._watching is None and not self._begin():
            yield
            return
        watching = self._watching
        assert watching is not None
        self._blocks += 1
        last = self._blocks >= self._wanted
        if (self._wanted - self._blocks) // self.accumulation % self.every:  # steps that come before the growth
            yield
            return
        started = 0.0
        try:
            with watching.block(last, alone=self._one_pass and self._wanted == 1) as seen, self._watching_ranks():
                yield
                started = time.perf_counter()
        except BaseException:
            self._watching = None
            raise
        if last:
            self._observe_seconds = time.perf_counter() - started + watching.seconds_inside
            self._watching = None
            self.dropped += seen.dropped
            self._one_pass, self._spoiled = watching.one_pass, watching.spoiled
            if seen.samples and not self._spoiled:
                self._seen = seen
                if self._for_gain:
                    self._arm_now(self._agreed(self.when.gain(self._gains(seen))))

    def _begin(self) -> bool:
        """A new observer where something must be measured."""
        self._for_gain = self.when.measures(self.steps + self._span)
        # What a trigger measures may arm it: then this is all that the growth will have seen.
        needs = self._needs() if self._due or self._for_gain else frozenset()
        if self._for_gain:
            needs = needs | self.when.reads
        if not needs or (self._seen is not None and self._due):
            return False
        if not self._for_gain and not self._wishes():  # every site is as wide as the policy lets it be
            return False
        ahead = self._due[0] - self.steps if self._due else 0
        self._wanted = self.accumulation * (min(ahead, self._span) if ahead > 0 else self._span)
        self._blocks = 0
        self._watching = self._observer(needs)
        self._ranks = ActivationRanks(self.model, self.sites) if "ranks" in needs else None
        return True

    def _watching_ranks(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._ranks is None else self._ranks.watching()

    def _agreed(self, decision: Any) -> Any:
        """Rank 0's decision under DistributedDataParallel: no rounding may set the ranks apart."""
        replicas = replicas_of(self.model)
        return decision if replicas is None else replicas.first(decision)

    def _observer(self, needs: frozenset[str], sketch: bool | None = None) -> Observer:
        if not self.how.fills_room and has_room(self.model):
            check_method(self.how)
        sketch = self.growth == "sketch" if sketch is None else sketch
        growth: dict[str, Any] = {"growth": False}
        if needs & {"directions", "natural"}:
            room = self._wishes()
            growth = observing(self.sites, room, self.how)
            if not self.how.needs_directions:
                growth["growth"] = list(room)
                growth["rank"] = {name: max(1, count) for name, count in room.items()}
            if (self.where.reads | self.when.reads) & {"directions", "natural"}:
                growth["unmapped"] = []
            if "natural" in needs:
                growth["solvers"] = {**growth["solvers"], "natural": natural_directions}
            if sketch and growth["growth"]:
                growth["rank"] = {name: growth["rank"][name] for name in growth["growth"]}
                growth["growth"] = "sketch"
        return Observer(self.model, self.sites, nagn=_places(needs), **growth, **self._options)

    def _gains(self, seen: Observation) -> dict[str, float]:
        """What growth would gain, in evaluation mode's units, relative to what the present parameters' gradient gains;
        nothing where that one overflowed."""
        squares = [
            whole_tensor(p.grad.detach().float().square().sum())
            for p in unwrap(self.model).parameters()
            if p.grad is not None
        ]
        present = float(torch.stack(squares).sum()) / self._unit() ** 2 if squares else 0.0
        if not math.isfinite(present):
            return {}
        found = seen.all_directions()
        factors = norm_factors(self.model, self.sites)
        return {
            name: float(d.values.double().mul(factors.get(name, 1.0)).square().sum()) / max(present, 1e-300)
            for name, d in found.items()
        }

    def _unit(self) -> float:
        """What the parameters' ``.grad`` must be divided by to be in the units of growth matrices."""
        scale: Any = self._options["loss_scale"]
        scale = float(scale.get_scale() if hasattr(scale, "get_scale") else scale)
        if self._options["loss_reduction"] == "mean":  # a growth matrix is the mean over micro-batches, .grad their sum
            return scale * self.accumulation
        # both are sums, over all measured steps and over the last
        return scale / math.ceil(self._wanted / (self.accumulation * self.every))

    # -- step -----------------------------------------------------------------------------------------

    def step(self, metric: float | None = None, closure: Callable[[], Tensor] | None = None) -> GrowthReport | None:
        """Once after each optimizer step; with ``metric=`` at the end of an epoch (counts no step).

        closure: returns the loss of a batch: where a growth is armed, it is measured and carried out now.
        Under DistributedDataParallel or FSDP2 every rank calls it; a metric is averaged over the ranks.
        Returns the `GrowthReport` where the model grew.
        """
        if metric is None:
            self.steps += 1
        else:
            replicas = replicas_of(self.model)
            metric = float(metric) if replicas is None else replicas.mean(float(metric))
            self._arm_now(self.when.metric(metric))
        ready = bool(self._due) and self._due[0] <= self.steps
        report = self._grow(closure) if ready else None
        if metric is None:
            self._tell_unseen()
        if not self._due:
            self._seen = None
        if metric is None:
            self._arm_ahead()
        return report

    def _tell_unseen(self) -> None:
        """Warns, once, of a growth that waits for a measurement which nobody makes."""
        waiting = self._due and self._due[0] <= self.steps and self._watching is None
        waiting = waiting and not self._spoiled
        if waiting and self.dropped == self._dropped_before and not self._told:
            self._told = True
            warnings.warn(
                f"Grower: a growth is due on step {self.steps}, and no backward pass was seen inside "
                "`with grower.observe():`; put the forward and the backward pass of each step there, or give "
                "step(closure=...); it waits until then",
                stacklevel=3,
            )
        self._dropped_before = self.dropped

    def _grow(self, closure: Callable[[], Tensor] | None) -> GrowthReport | None:
        started = time.perf_counter()
        needs = self._needs()
        if closure is not None and needs:
            self._seen = self._measured_now(closure)
        if needs and self._seen is None:
            if not self._wishes():
                self._disarm()
            return None
        remembered = self.where.state_dict()
        evidence = self._evidence(self._seen)
        meter: GainMeter | None = None
        measuring = 0.0
        try:
            units = self.where.units(evidence)
            units = self._agreed({name: count for name, count in units.items() if count})
            if not units:
                self._disarm()
                return None
            if self.measure_gain:
                before = time.perf_counter()
                meter = GainMeter(self.model, self.sites, self.optimizers, closure)
                measuring = time.perf_counter() - before
            report = grow_observed(
                self.model,
                self.sites,
                wanted_units(self.model, self.sites, units, self.how),
                self.how,
                self._seen,
                self.optimizers,
                self.also,
                closure,
                self._round_to,
            )
        except BaseException:
            self.where.load_state_dict(remembered)
            self._disarm()
            raise
        report.seconds = time.perf_counter() - started + self._observe_seconds - measuring
        report.step = self.steps
        report.evidence = {
            "nagn": dict(evidence.nagn),
            "nagn_after_norm": dict(evidence.nagn_after_norm),
            "explanation": {name: dict(values) for name, values in self.where.explanation.items()},
        }
        self._observe_seconds = 0.0
        self._disarm()
        self._watching = None
        self.when.grew(self.steps)
        self.history.append(report)
        if meter is not None:  # last: a closure that fails here finds the growth done and on record
            meter.fill(report)
        return report

    def _measured_now(self, closure: Callable[[], Tensor]) -> Observation:
        needs = self._needs()
        self._ranks = ActivationRanks(self.model, self.sites) if "ranks" in needs else None
        with self._watching_ranks():
            return observe_closure(self.model, self._observer(needs, sketch=False), closure)

    def _ranks_found(self) -> dict[str, float]:
        if not isinstance(self.where, NORTH):
            return {}
        if self.where.read == "weights":
            return self._agreed(weight_ranks(self.model, self.sites, self.where.epsilon))
        assert self._ranks is not None
        return self._agreed(self._ranks.ranks(self.where.epsilon, replicas_of(self.model)))

    def _evidence(self, seen: Observation | None) -> Evidence:
        return evidence_of(self.model, self._offered(), seen, self._ranks_found())

    # -- depth ----------------------------------------------------------------------------------------

    def insert_layer(self, after: str, example_inputs: Any, **options: Any) -> GrowthReport:
        """`fastgrow.insert_layer` into the model, its optimizers and its copies; the sites are found anew.

        example_inputs: as in `find_sites`. options: before, units, how, kernel_size, norm, activation, closure.
        Sites that were left out (``include=``, ``exclude=``) stay left out. A measurement that was under way is
        dropped. The report joins the history.
        """
        if self._watching is not None:
            raise GrowthError("Grower.insert_layer: call it between steps, not between the micro-batches of one")
        unwanted = self._weights_of(self.sites.left_out)
        report = insert_layer(
            self.model, after, example_inputs=example_inputs, optimizer=self.optimizers, also=self.also, **options
        )
        found = find_sites(self.model, example_inputs)
        names = [site.name for site in found if self._weights_of([site]) & unwanted]
        self.sites = find_sites(self.model, example_inputs, exclude=names) if names else found
        self._seen = None
        report.step = self.steps
        self.history.append(report)
        return report

    def _weights_of(self, sites: Iterable[Site]) -> set[tuple[int, str]]:
        """What tells sites apart when their names have changed: the first producer's weight, and its part."""
        tensors = tensors_of(self.model)
        weights = {site.name: tensors[site.weight(site.producers[0], "producer").tensor] for site in sites}
        return {(id(weight), name.partition("#")[2]) for name, weight in weights.items()}

    # -- saving ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Step, policies and history as plain numbers, strings, lists and dicts.

        A measurement under way is not saved: the resumed run measures the steps that are left before the growth.
        """
        return {
            "steps": self.steps,
            "due": list(self._due),
            "asked": self._asked,
            "when": self.when.state_dict(),
            "where": self.where.state_dict(),
            "history": [asdict(report) for report in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a saved Grower stood; its policies must be of the same classes.

        A state saved before `batches` came knows only that a growth is armed: it is due on the step that comes.
        Raises `GrowthError`, with the Grower as it was, for a state that lacks something else or is another policy's.
        """
        if "armed" in state and "due" not in state:
            step = int(state["steps"]) + 1
            state = {**state, "due": [step] if state["armed"] else [], "asked": step}
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise GrowthError(
                f"Grower: the state lacks {', '.join(sorted(missing))}; wanted what Grower.state_dict() returned"
            )
        history = [
            GrowthReport(**{**entry, "sites": [SiteGrowth(**site) for site in entry["sites"]]})
            for entry in state["history"]
        ]
        before = self.when.state_dict()
        self.when.load_state_dict(state["when"])
        try:
            self.where.load_state_dict(state["where"])
        except BaseException:
            self.when.load_state_dict(before)
            raise
        self.steps = int(state["steps"])
        self._due = [int(step) for step in state["due"]]
        self._asked = int(state["asked"])
        self._seen = self._watching = None
        self.history = history


def _places(needs: frozenset[str]) -> bool | Literal["own", "after_norm"]:
    """Where `observe` reads NAGN: at one place where that is all that is needed, for each is a read of its own."""
    if {"nagn_own", "nagn_after_norm"} <= needs or "nagn" in needs:
        return True
    if "nagn_after_norm" in needs:
        return "after_norm"
    # With ranks alone norms tell whether a batch came through.
    return "own" if "nagn_own" in needs or needs == {"ranks"} else False
