"""Growth inside Hugging Face's ``Trainer``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from transformers import TrainerCallback

from ..arguments import choice, whole
from ..checkpoint import load, save
from ..errors import GrowthError
from ..grower import Grower
from ..how import How
from ..sites import Sites
from ..trial import find_sites
from ..when import When
from ..where import Where
from . import loss_scale
from .config import follow_config

__all__ = ["GrowCallback", "follow_config"]

_FILE = "fastgrow.pt"
_NO_INPUTS = ("labels", "label", "label_ids", "num_items_in_batch")


class GrowCallback(TrainerCallback):
    """Grows the Trainer's model::

        growth = GrowCallback(when=fg.when.Every(100), where=fg.where.NAGN())
        Trainer(model, args, train_dataset=data, callbacks=[growth]).train()
        growth.grower.history

    when, where, how, sites, also, batches, growth, reserve: as in `fastgrow.Grower` (batches: optimizer steps, each
    with all of its micro-batches). example_inputs, include, exclude: what finds the sites, as in
    `fastgrow.find_sites`; by default the inputs of the first batch, labels left out (growth then cannot come on the
    first step).
    metric: the name of an evaluation metric that feeds the policy, "eval_loss" for instance.

    A model's config follows its growth where it can say the widths (`follow_config`). Every checkpoint of
    the Trainer gets a file ``fastgrow.pt`` beside it; to resume, build the model anew and call `prepare`::

        growth.prepare(model, "out/checkpoint-500")
        trainer.train(resume_from_checkpoint="out/checkpoint-500")

    One process only: the Trainer keeps its wrapper of several processes to itself. Raises `GrowthError` there.
    """

    def __init__(
        self,
        *,
        when: When,
        where: Where | None = None,
        how: How | None = None,
        example_inputs: Any = None,
        sites: Sites | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        also: Iterable[nn.Module] = (),
        batches: int = 1,
        growth: Literal["exact", "sketch"] = "exact",
        reserve: int | Mapping[str, int] | None = None,
        metric: str | None = None,
    ) -> None:
        self.grower: Grower | None = None
        self.metric = metric
        self._options: dict[str, Any] = {"when": when, "where": where, "how": how, "also": list(also)}
        self._options["batches"] = whole("GrowCallback", "batches", batches)
        self._options["growth"] = choice("GrowCallback", "growth", growth, ("exact", "sketch"))
        self._options["reserve"] = reserve
        self._sites, self._inputs = sites, example_inputs
        self._patterns = {"include": include, "exclude": exclude}
        self._saved: Path | None = None
        self._open = contextlib.ExitStack()

    def prepare(self, model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
        """Give a fresh model the widths of a checkpoint folder, before the Trainer loads its weights."""
        self._saved = Path(checkpoint) / _FILE
        load(self._saved, model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1 or args.n_gpu > 1:
            raise GrowthError(
                "GrowCallback: the Trainer runs on several devices and keeps its wrapper to itself; train on one, or "
                "use fastgrow.Grower in a loop of your own, where DistributedDataParallel is supported"
            )
        self._open.close()
        self._accumulation = args.gradient_accumulation_steps
        if self._sites is not None or self._inputs is not None:
            self._build(**kwargs)

    def _build(self, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        self.grower = Grower(
            model,
            optimizer,
            sites=self._sites if self._sites is not None else find_sites(model, self._inputs, **self._patterns),
            **self._options,
            accumulation=self._accumulation,
            loss_scale=loss_scale(getattr(optimizer, "scaler", None), self._accumulation),
        )
        if self._saved is not None:
            load(self._saved, model, optimizer, self.grower)

    def _enter(self, model: nn.Module) -> None:
        if self.grower is not None:
            self._open.enter_context(self.grower.observe())
            return

        def first(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            known = {name: value for name, value in inputs.items() if name not in _NO_INPUTS}
            known = {name: value for name, value in known.items() if isinstance(value, Tensor)}
            self._inputs = known if known else args

        handle = model.register_forward_pre_hook(first, with_kwargs=True)
        self._open.callback(handle.remove)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._enter(kwargs["model"])

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()
        self._enter(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()
        if self.grower is None:
            self._build(**kwargs)
        assert self.grower is not None
        self.grower.step()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if self.metric is None or self.grower is None:
            return
        if self.metric not in (metrics or {}):
            raise GrowthError(
                f"GrowCallback: metric={self.metric!r} was given; the evaluation has {', '.join(metrics or {})}"
            )
        self.grower.step(metric=(metrics or {})[self.metric])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.grower is not None and folder.is_dir():
            save(folder / _FILE, kwargs["model"], grower=self.grower, values=False)
