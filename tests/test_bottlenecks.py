"""NAGN on real images: planted bottlenecks are found, whatever the batch size and the loss reduction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow.data import ImageData, load_digits, load_folder
from fastgrow.demo.models import conv_net

WIDTHS = ((8, 3, 8), (16, 4, 16), (32, 4, 32))
PLANTED = {"conv2", "conv5", "conv8"}
FASHION = Path("/usr/share/datasets/fashion-mnist")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["digits", "fashion"], scope="module")
def data(request: pytest.FixtureRequest) -> ImageData:
    if request.param == "digits":
        pytest.importorskip("sklearn")
        return load_digits()
    if not FASHION.is_dir():
        pytest.skip("Fashion-MNIST is not installed (Debian's dataset-fashion-mnist)")
    return load_folder(FASHION).head(1280, 100)


def _trained(data: ImageData, seed: int, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model = conv_net(WIDTHS, data.train_images.shape[1], data.classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(1280).split(64):
            F.cross_entropy(model(data.train_images[rows]), data.train_labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("seed", range(5))
def test_planted_bottlenecks_are_found(data: ImageData, seed: int) -> None:
    model = _trained(data, seed, epochs=seed % 3)  # at the start of a training as well as further on
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    x, y = data.train_images[:640], data.train_labels[:640]
    grower = fg.Grower(
        model,
        optimizer,
        example_inputs=x[:8],
        when=fg.when.Every(1),
        where=fg.where.NAGN(monotone=False),
        how=fg.how.ZeroOutgoing(),
    )
    with grower.observe():
        F.cross_entropy(model(x), y).backward()
    report = grower.step()
    assert report is not None
    assert {site.name for site in report.sites} == PLANTED
    contrasts = {name: entry["contrast"] for name, entry in report.evidence["explanation"].items()}
    assert min(contrasts[name] for name in PLANTED) > 0.4
    assert max(contrast for name, contrast in contrasts.items() if name not in PLANTED) < 0.05


def test_the_value_does_not_move_with_batch_size_or_reduction(data: ImageData) -> None:
    """In evaluation mode, where samples are apart: the value is one of the samples, not of their batches."""
    model = _trained(data, seed=1, epochs=1).eval().double()
    x, y = data.train_images[:100].double(), data.train_labels[:100]
    sites = fg.find_sites(model, x[:4])

    def nagn(batch: int, reduction: str) -> dict[str, float]:
        with fg.observe(model, sites, growth=False, loss_reduction=reduction) as seen:
            for images, labels in zip(x.split(batch), y.split(batch), strict=True):
                F.cross_entropy(model(images), labels, reduction=reduction).backward()
        return {**seen.nagn, **{f"{name} after": value for name, value in seen.nagn_after_norm.items()}}

    wanted = nagn(100, "mean")
    assert min(wanted.values()) > 0
    for batch in (100, 50, 36, 7):  # the last two leave a smaller batch over
        for reduction in ("mean", "sum"):
            # The sums of squares are taken in float64: rounding alone, over at most 100 x 16 x 28 x 28 terms.
            assert nagn(batch, reduction) == pytest.approx(wanted, rel=1e-9)


def test_a_doubled_batch_is_the_same_batch(data: ImageData) -> None:
    """In training mode too, where batch norm sees the same statistics in both."""
    model = _trained(data, seed=1, epochs=1).double()
    x, y = data.train_images[:64].double(), data.train_labels[:64]
    sites = fg.find_sites(model, x[:4])
    found = []
    for times in (1, 3):
        with fg.observe(model, sites, growth=False) as seen:
            F.cross_entropy(model(x.repeat(times, 1, 1, 1)), y.repeat(times)).backward()
        found.append(seen.nagn_after_norm)
    assert found[1] == pytest.approx(found[0], rel=1e-9)
