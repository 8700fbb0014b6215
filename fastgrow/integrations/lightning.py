"""Growth inside Lightning's ``Trainer``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from ..arguments import choice, whole
from ..checkpoint import plain, rebuild, structure_of
from ..errors import GrowthError
from ..grower import Grower
from ..how import How
from ..sites import Sites
from ..trial import find_sites
from ..when import When
from ..where import Where
from . import loss_scale

# Lightning goes by two names; each has its own classes.
library: Any = importlib.import_module(
    "lightning.pytorch" if importlib.util.find_spec("lightning") else "pytorch_lightning"
)

__all__ = ["GrowCallback"]

_KEY = "fastgrow"


class GrowCallback(library.Callback):
    """Grows the Trainer's module::

        growth = GrowCallback(when=fg.when.Every(100), module="net")
        Trainer(callbacks=[growth]).fit(lit, loader)
        growth.grower.history

    when, where, how, sites, also, batches, growth, reserve: as in `fastgrow.Grower` (batches: optimizer steps, each
    with all of its micro-batches). module: the name of the part that grows and that ``training_step`` calls; by
    default the LightningModule itself. example_inputs, include, exclude: what finds the sites, as in
    `fastgrow.find_sites`; by default ``example_input_array``, or the inputs of the first batch (growth then cannot
    come on the first step).
    monitor: the name of a logged validation metric that feeds the policy.

    Lightning's checkpoints hold the grown widths and the Grower's state under "fastgrow"; a fit that is resumed
    from one (``ckpt_path=``) with a freshly built module widens it before its weights are loaded.
    One process only; raises `GrowthError` where there are more.
    """

    def __init__(
        self,
        *,
        when: When,
        where: Where | None = None,
        how: How | None = None,
        module: str = "",
        example_inputs: Any = None,
        sites: Sites | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        also: Iterable[nn.Module] = (),
        batches: int = 1,
        growth: Literal["exact", "sketch"] = "exact",
        reserve: int | Mapping[str, int] | None = None,
        monitor: str | None = None,
    ) -> None:
        self.grower: Grower | None = None
        self.module = module
        self.monitor = monitor
        self._options: dict[str, Any] = {"when": when, "where": where, "how": how, "also": list(also)}
        self._options["batches"] = whole("GrowCallback", "batches", batches)
        self._options["growth"] = choice("GrowCallback", "growth", growth, ("exact", "sketch"))
        self._options["reserve"] = reserve
        self._sites, self._inputs = sites, example_inputs
        self._patterns = {"include": include, "exclude": exclude}
        self._saved: dict[str, Any] | None = None
        self._steps = 0
        self._open = contextlib.ExitStack()

    # -- the loop -------------------------------------------------------------------------------------

    def _model(self, pl_module: Any) -> nn.Module:
        return pl_module.get_submodule(self.module)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stand before Lightning's own loading of weights: it calls the module's hook just ahead of it."""
        if trainer.world_size > 1:
            raise GrowthError(
                f"GrowCallback: the Trainer runs {trainer.world_size} processes; train in one, or use fastgrow.Grower "
                "in a loop of your own, where DistributedDataParallel is supported"
            )
        inherited = pl_module.on_load_checkpoint

        def widened(checkpoint: dict[str, Any]) -> None:
            self._saved = checkpoint.get(_KEY)
            if self._saved is not None:
                rebuild(self._model(pl_module), self._saved["structure"], source="the Lightning checkpoint")
            inherited(checkpoint)

        vars(pl_module)["on_load_checkpoint"] = widened

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        vars(pl_module).pop("on_load_checkpoint", None)
        self._open.close()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        vars(pl_module).pop("on_load_checkpoint", None)
        self._steps = trainer.global_step
        if self._inputs is None and not self.module:
            self._inputs = getattr(pl_module, "example_input_array", None)
        if self._sites is not None or self._inputs is not None:
            self._build(trainer, pl_module)

    def _build(self, trainer: Any, pl_module: Any) -> None:
        sites = self._sites
        if sites is None:
            sites = find_sites(self._model(pl_module), self._inputs, **self._patterns)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.grower = Grower(
            self._model(pl_module),
            trainer.optimizers,
            sites=sites,
            **self._options,
            accumulation=trainer.accumulate_grad_batches,
            loss_scale=loss_scale(scaler, trainer.accumulate_grad_batches),
        )
        if self._saved is not None:
            self.grower.load_state_dict(self._saved["grower"])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.grower is not None:
            self._open.enter_context(self.grower.observe())
            return

        def first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs = kwargs if kwargs else args

        handle = self._model(pl_module).register_forward_pre_hook(first, with_kwargs=True)
        self._open.callback(handle.remove)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.automatic_optimization:
            self._open.close()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self._open.close()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._open.close()
        if self.grower is None:
            if self._inputs is None:
                raise GrowthError(
                    f"GrowCallback: training_step did not call {self.module or type(pl_module).__name__!r}; give "
                    "module=, the name of the part that it calls, or example_inputs="
                )
            self._build(trainer, pl_module)
        assert self.grower is not None
        # Not every batch of an accumulation, and no step that the scaler has skipped, is one of the optimizer.
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            self.grower.step()

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.monitor is None or self.grower is None or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(trainer.callback_metrics) or "none"
            raise GrowthError(f"GrowCallback: monitor={self.monitor!r} was given; logged are {known}")
        self.grower.step(metric=float(trainer.callback_metrics[self.monitor]))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        # The observation ends as if the exception had passed through its block.
        with contextlib.suppress(type(exception)):
            self._open.__exit__(type(exception), exception, exception.__traceback__)

    # -- checkpoints ----------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.grower is not None:
            state = {"structure": structure_of(self._model(pl_module)), "grower": self.grower.state_dict()}
            checkpoint[_KEY] = plain(state, _KEY)
