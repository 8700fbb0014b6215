"""Hugging Face: the Trainer's callback in real training runs, and configs that follow growth."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgrow as fg

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")

from fastgrow.integrations.transformers import GrowCallback, follow_config  # noqa: E402

IDS = torch.randint(0, 30, (16, 6), generator=torch.Generator().manual_seed(1))
LABELS = (IDS[:, 0] > 14).long()


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
            max_position_embeddings=8,
            use_cache=False,
        )
    )


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=30,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=8,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def resnet() -> Any:
    torch.manual_seed(0)
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=2
        )
    )


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[index], "labels": LABELS[index]}


def trainer(model: nn.Module, folder: Path, callback: GrowCallback, **options: Any) -> Any:
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 100,
        "disable_tqdm": True,
        "data_seed": 3,
        **options,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **settings),
        train_dataset=Data(),
        eval_dataset=Data(),
        callbacks=[callback],
    )


def hooks_in(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def in_blocks(model: nn.Module) -> fg.Sites:
    return fg.find_sites(model, {"input_ids": IDS[:4]}, include="*intermediate.dense")


def test_a_training_run_grows(tmp_path: Path) -> None:
    model = bert()
    growth = GrowCallback(when=fg.when.Every(2, times=2), where=fg.where.Everywhere(units={"*intermediate.dense": 4}))
    run = trainer(model, tmp_path, growth)
    run.train()
    assert [report.step for report in growth.grower.history] == [2, 4]
    assert model.config.intermediate_size == 40
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 40
    assert hooks_in(model) == 0
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    assert run.optimizer.state[weight]["exp_avg"].shape == (40, 16)
    run.save_model(str(tmp_path / "model"))
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)


def test_accumulation_metrics_and_bf16(tmp_path: Path) -> None:
    model = bert()
    growth = GrowCallback(
        when=fg.when.Plateau(window=1, min_gain=10.0, stop_gain=-100.0, mode="min"),
        where=fg.where.NAGN(max_new=2),
        sites=in_blocks(model),
        metric="eval_loss",
    )
    run = trainer(
        model,
        tmp_path,
        growth,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        bf16=True,
        per_device_train_batch_size=2,
    )
    run.train()
    assert len(growth.grower.history) >= 1
    assert growth.grower.accumulation == 2
    assert hooks_in(model) == 0
    growth.metric = "eval_accuracy"
    with pytest.raises(fg.GrowthError, match="'eval_accuracy' was given; the evaluation has eval_loss"):
        run.evaluate()


@pytest.mark.parametrize("growth", ["exact", "sketch"])
def test_gradients_of_several_batches(growth: str, tmp_path: Path) -> None:
    """At rest, two steps of two micro-batches are the whole data set: growth follows its gradient."""
    grown = []
    for batches in (2, 1):
        model = bert()
        callback = GrowCallback(
            when=fg.when.Every(2, times=1),
            where=fg.where.Everywhere(units=2),
            sites=in_blocks(model),
            batches=batches,
            growth=growth,  # type: ignore[arg-type]
        )
        options = {"max_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.0}
        trainer(model, tmp_path, callback, **options).train()
        assert [report.step for report in callback.grower.history] == [2]
        grown.append(model.bert.encoder.layer[0].output.dense.weight.detach()[:, 32:])
    model = bert()
    units = {site.name: 2 for site in in_blocks(model)}
    fg.grow(
        model, units, sites=in_blocks(model), closure=lambda: nn.functional.cross_entropy(model(IDS).logits, LABELS)
    )
    expected = model.bert.encoder.layer[0].output.dense.weight.detach()[:, 32:]
    found, alone = (nn.functional.cosine_similarity(one, expected, dim=0).abs() for one in grown)
    assert found.min() > 0.999
    assert alone.min() < 0.99


def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path) -> None:
    def made(model: nn.Module) -> GrowCallback:
        return GrowCallback(when=fg.when.Every(2, times=2), where=fg.where.Everywhere(units=4), sites=in_blocks(model))

    model = bert()
    trainer(model, tmp_path / "a", made(model), save_strategy="steps", save_steps=3).train()
    fresh = bert()
    growth = made(fresh)
    growth.prepare(fresh, tmp_path / "a" / "checkpoint-3")
    assert fresh.bert.encoder.layer[0].intermediate.dense.out_features == 36
    run = trainer(fresh, tmp_path / "b", growth)
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert [report.step for report in growth.grower.history] == [2, 4]
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, two)


def test_several_devices_are_refused(tmp_path: Path) -> None:
    growth = GrowCallback(when=fg.when.Every(1))

    class Arguments:
        world_size, n_gpu, gradient_accumulation_steps = 2, 1, 1

    with pytest.raises(fg.GrowthError, match="several devices"):
        growth.on_train_begin(Arguments(), None, None)


def mlp_of(model: Any, name: str, units: int, only: int | None = None) -> None:
    inputs = {"input_ids": IDS}
    sites = fg.find_sites(model, inputs, include=f"*{name}")
    wanted = {site.name: units for site in sites if only is None or f".{only}." in site.name}
    fg.grow(model, wanted, fg.how.Random(), sites=sites)


SAID: dict[str, tuple[Callable[[], Any], str, str, int]] = {
    "bert": (bert, "intermediate.dense", "intermediate_size", 38),
    "llama": (llama, "mlp.gate_proj", "intermediate_size", 30),
    "gpt2": (gpt2, "mlp.c_fc", "n_inner", 70),
}


@pytest.mark.parametrize("name", SAID)
def test_a_config_follows_uniform_growth(name: str, tmp_path: Path) -> None:
    build, layer, field, width = SAID[name]
    model = build().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mlp_of(model, layer, 6)
    assert getattr(model.config, field) == width
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_key_value_groups_are_two_fields(tmp_path: Path) -> None:
    model = llama().eval()
    sites = fg.find_sites(model, {"input_ids": IDS}, include="*q_proj")
    # Llama's config refuses 6 heads, for they do not divide the hidden size; a head size of 6 would give the shapes.
    with pytest.warns(UserWarning, match="config cannot say"):
        fg.grow(model, {site.name: 1 for site in sites}, fg.how.Random(), sites=sites)
    fg.grow(model, {site.name: 1 for site in sites}, fg.how.Random(), sites=sites)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (8, 4, 4)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_growth_that_no_config_says_is_told_once_and_fg_load_is_the_way(tmp_path: Path) -> None:
    model = bert().eval()
    before = model.config.to_dict()
    with pytest.warns(UserWarning, match=r"BertForSequenceClassification: its config cannot say .* fg\.load"):
        mlp_of(model, "intermediate.dense", 6, only=0)
    assert model.config.to_dict() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mlp_of(model, "intermediate.dense", 2, only=0)
    assert follow_config(model) is None
    fg.save(tmp_path / "grown.pt", model)
    fresh = fg.load(tmp_path / "grown.pt", bert().eval())
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    mlp_of(model, "intermediate.dense", 8, only=1)
    assert model.config.intermediate_size == 40
    assert follow_config(model) == {}


def test_widths_in_lists(tmp_path: Path) -> None:
    model = resnet().eval()
    x = torch.randn(2, 3, 32, 32)
    sites = fg.find_sites(model, x)
    inner = [site.name for site in sites if site.name.endswith("layer.0.convolution")]
    assert inner
    with pytest.warns(UserWarning, match="config cannot say"):
        fg.grow(model, {inner[0]: 2}, fg.how.Random(), sites=sites)
    model = resnet().eval()
    stream = next(site.name for site in sites if len(site.producers) > 1)
    fg.grow(model, {inner[0]: 4, stream: 4}, fg.how.Random(), sites=sites)
    assert model.config.hidden_sizes == [12, 12]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)
