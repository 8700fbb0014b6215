"""Lightning's Trainer with the growth callback: real, small training runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from fastgrow.integrations.lightning import GrowCallback  # noqa: E402

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()


class Lit(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        yield


def trainer(folder: Path, callback: GrowCallback, **options: Any) -> Any:
    settings = {"max_steps": 6, "limit_val_batches": 0, "enable_checkpointing": False, **options}
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def loader(batch: int = 4) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=batch)


def hooks_in(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def growing(**options: Any) -> GrowCallback:
    return GrowCallback(when=fg.when.Every(2, times=2), where=fg.where.Everywhere(units=2), **options)


@pytest.mark.parametrize("module", ["", "net"])
def test_a_training_run_grows(module: str, tmp_path: Path) -> None:
    lit, growth = Lit(), growing(module=module)
    run = trainer(tmp_path, growth)
    run.fit(lit, loader())
    assert [report.step for report in growth.grower.history] == [2, 4]
    assert lit.net[0].weight.shape == (12, 6)
    assert run.optimizers[0].state[lit.net[0].weight]["exp_avg"].shape == (12, 6)
    assert hooks_in(lit) == 0
    assert "on_load_checkpoint" not in vars(lit)


def test_patterns_accumulation_and_a_monitored_metric(tmp_path: Path) -> None:
    lit = Lit()
    growth = GrowCallback(
        when=fg.when.Plateau(window=1, min_gain=10.0, stop_gain=-100.0),
        where=fg.where.NAGN(threshold=0.0, max_new=2),
        example_inputs=X[:4],
        include="net.2",
        monitor="val_acc",
    )
    options = {"accumulate_grad_batches": 2, "limit_val_batches": 1, "max_steps": 16}
    trainer(tmp_path, growth, **options).fit(lit, loader(2), loader())
    assert growth.grower.accumulation == 2
    assert len(growth.grower.history) >= 1
    assert [site.name for site in growth.grower.sites] == ["net.2"]
    assert lit.net[0].out_features == 8
    assert growth.grower.steps == 16
    other = GrowCallback(when=fg.when.Every(2), example_inputs=X[:4], monitor="val_f1")
    with pytest.raises(fg.GrowthError, match="monitor='val_f1' was given; logged are val_acc"):
        trainer(tmp_path, other, **options).fit(Lit(), loader(), loader())


def test_mixed_precision_scales_are_divided_out(tmp_path: Path) -> None:
    plain, half = growing(example_inputs=X[:4]), growing(example_inputs=X[:4])
    trainer(tmp_path, plain).fit(Lit(), loader())
    trainer(tmp_path, half, precision="bf16-mixed").fit(Lit(), loader())
    for one, two in zip(plain.grower.history, half.grower.history, strict=True):
        for site, other in zip(one.sites, two.sites, strict=True):
            assert other.predicted_gain == pytest.approx(site.predicted_gain, rel=0.1)


@pytest.mark.parametrize("growth", ["exact", "sketch"])
def test_gradients_of_several_batches_as_in_a_loop_of_ones_own(growth: str, tmp_path: Path) -> None:
    """Bit for bit what the Grower does; two micro-batches to a step."""
    options: dict[str, Any] = {"batches": 3, "growth": growth}
    lit, callback = Lit(), growing(example_inputs=X[:4], **options)
    trainer(tmp_path, callback, accumulate_grad_batches=2).fit(lit, loader(2))
    own = Lit()
    (optimizer,), (scheduler,) = own.configure_optimizers()
    grower = fg.Grower(
        own,
        optimizer,
        example_inputs=X[:4],
        when=fg.when.Every(2, times=2),
        where=fg.where.Everywhere(units=2),
        accumulation=2,
        loss_scale=0.5,
        **options,
    )
    batches = list(loader(2))
    for step in range(6):
        for at in (2 * step, 2 * step + 1):
            with grower.observe():
                (own.training_step(batches[at % len(batches)], 0) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
        if step % 4 == 3:
            scheduler.step()
    assert [report.step for report in callback.grower.history] == [2, 4]
    for one, two in zip(lit.parameters(), own.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_resumed_fit_continues_bit_for_bit(tmp_path: Path) -> None:
    def made() -> GrowCallback:
        return GrowCallback(when=fg.when.Every(3, times=2), where=fg.where.Everywhere(units=2), example_inputs=X[:4])

    options = {"enable_checkpointing": True, "max_steps": -1}
    run = trainer(tmp_path, made(), max_epochs=1, **options)
    run.fit(Lit(), loader())
    run.save_checkpoint(tmp_path / "first.ckpt")
    whole, kept = Lit(), made()
    trainer(tmp_path, kept, max_epochs=2, **options).fit(whole, loader())
    fresh, again = Lit(), made()
    resumed = trainer(tmp_path, again, max_epochs=2, **options)
    resumed.fit(fresh, loader(), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert [report.step for report in again.grower.history] == [3, 6]
    for one, two in zip(whole.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, two)


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    class Failing(Lit):
        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = super().training_step(batch, index)
            if self.global_step == 1:
                raise RuntimeError("stop")
            return loss

    lit, growth = Failing(), growing(example_inputs=X[:4])
    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, growth).fit(lit, loader())
    assert hooks_in(lit) == 0
    assert lit.net[0].out_features == 8


def test_what_cannot_be_done_is_named(tmp_path: Path) -> None:
    class Part(Lit):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(fg.GrowthError, match="GrowCallback: batches=0"):
        growing(batches=0)
    with pytest.raises(fg.GrowthError, match="GrowCallback: growth='sum'"):
        growing(growth="sum")
    with pytest.raises(fg.GrowthError, match=r"training_step did not call 'Part'; give module="):
        trainer(tmp_path, growing()).fit(Part(), loader())

    class Many:
        world_size = 2

    with pytest.raises(fg.GrowthError, match="runs 2 processes"):
        growing().setup(Many(), Lit(), "fit")
