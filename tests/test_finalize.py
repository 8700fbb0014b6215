"""Finalized models in torch.export and ONNX."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from multihead_cases import Wrapped, heads_of, loss_on
from tolerances import assert_close, tolerance
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg

X = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(2))


def by_onnx(model: nn.Module, x: Tensor, folder: Path) -> Tensor:
    """What ONNX Runtime computes of the exported model."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnxruntime

    path = str(folder / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(output)


def model_of(activation: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        activation(),
        nn.Conv2d(4, 4, 3),
        activation(),
        nn.Flatten(),
        nn.Linear(144, 3),
    )


def finalized(activation: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    model = model_of(activation)
    sites = fg.find_sites(model, X)
    fg.grow(model, {"0": 2, "3": 2}, sites=sites, closure=lambda: F.cross_entropy(model(X), Y))
    model.eval()
    with torch.no_grad():
        expected = model(X)
    fg.finalize(model)
    assert not any(type(module).__module__.startswith("fastgrow") for module in model.modules())
    assert not any("fastgrow" in key for module in model.modules() for key in vars(module))
    return model, expected


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU])
def test_finalized_models_export(activation: Callable[[], nn.Module]) -> None:
    model, expected = finalized(activation)
    stream = io.BytesIO()
    torch.export.save(torch.export.export(model, (X,), strict=True), stream)
    stream.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.export.load(stream).module()(X), expected)


def test_finalized_models_go_to_onnx(tmp_path: Path) -> None:
    model, expected = finalized(nn.ReLU)
    error = float((by_onnx(model, X, tmp_path) - expected).abs().max())
    assert error <= tolerance(torch.float32, 144) * max(1.0, float(expected.abs().max()))


def test_grown_heads_go_to_onnx(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Wrapped(batch_first=True)
    x = model.inputs()[0]
    sites = fg.find_sites(model, x)
    fg.grow(model, {heads_of(sites).name: 1}, sites=sites, closure=loss_on(model, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fg.finalize(model).eval()
    assert_close(by_onnx(model, x, tmp_path), model(x).detach(), torch.float32, 256)
