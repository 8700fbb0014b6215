"""The samples of a flat text: nn.EmbeddingBag's 1-d indices with offsets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import tolerance
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg

LENGTHS = [2, 4, 3, 6, 1]
WORDS = 11


class Bag(nn.Module):
    """last: offsets end with the text's length. function: F.embedding_bag in place of the module."""

    def __init__(self, last: bool = False, function: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.embedding = nn.EmbeddingBag(WORDS, 4, mode="sum", include_last_offset=last)
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def bags(self, text: Tensor, offsets: Tensor | None, weights: Tensor | None = None) -> Tensor:
        if self.function:
            return F.embedding_bag(
                text,
                self.embedding.weight,
                offsets,
                mode="sum",
                per_sample_weights=weights,
                include_last_offset=self.embedding.include_last_offset,
            )
        return self.embedding(text, offsets, weights)

    def head(self, bags: Tensor) -> Tensor:
        return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(bags)))))

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bags(text, offsets))


class OffsetsFirst(Bag):
    def forward(self, offsets: Tensor, text: Tensor) -> Tensor:
        return self.head(self.bags(text, offsets))


class WeightsFirst(Bag):
    def forward(self, weights: Tensor, text: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bags(text, offsets, weights))


class Lengths(Bag):
    """Offsets made inside, of a text of another dtype."""

    def forward(self, text: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.bags(text.long(), lengths.cumsum(0) - lengths))


class Dense(Bag):
    """The sample's own words come last."""

    def forward(self, text: Tensor, offsets: Tensor, dense: Tensor) -> Tensor:
        return self.head(self.bags(text, offsets) + dense)


class Plain(Bag):
    def forward(self, bags: Tensor) -> Tensor:
        return self.head(bags)


def text_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(lengths) + sum(lengths))
    text = torch.randint(0, WORDS, (sum(lengths),), generator=generator)
    return text, torch.tensor([0, *lengths[:-1]]).cumsum(0)


def ended(text: Tensor, offsets: Tensor) -> Tensor:
    return torch.cat([offsets, torch.tensor([len(text)])])


CASES: dict[str, tuple[Callable[[], Bag], Callable[[Tensor, Tensor], tuple[Tensor, ...]]]] = {
    "text first": (Bag, lambda text, offsets: (text, offsets)),
    "as a function": (lambda: Bag(function=True), lambda text, offsets: (text, offsets)),
    "offsets first": (OffsetsFirst, lambda text, offsets: (offsets, text)),
    "offsets with the last": (lambda: OffsetsFirst(last=True), lambda text, offsets: (ended(text, offsets), text)),
    "weights first": (WeightsFirst, lambda text, offsets: (torch.ones(len(text)).double(), text, offsets)),
    "lengths": (Lengths, lambda text, offsets: (text.int(), ended(text, offsets).diff())),
    "with dense features": (
        Dense,
        lambda text, offsets: (text, offsets, torch.zeros(len(offsets), 4, dtype=torch.float64)),
    ),
}


def seen(model: Bag, batches: list[tuple[Any, ...]], labels: list[Tensor]) -> fg.Observation:
    sites = fg.find_sites(model, batches[0], include="fc*")
    with fg.observe(model, sites, rank=2) as found:
        for batch, y in zip(batches, labels, strict=True):
            F.cross_entropy(model(*batch), y).backward()
    return found


@pytest.mark.parametrize("case", CASES)
def test_bags_count_as_samples_do(case: str) -> None:
    """NAGN and growth matrices are those of the same head on the same vectors, one row a sample."""
    made, arguments = CASES[case]
    texts = [text_of(LENGTHS), text_of([7, 2])]
    labels = [torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 0])]
    model, plain = made().double(), Plain().double()
    found = seen(model, [arguments(*text) for text in texts], labels)
    vectors = [(F.embedding_bag(*text[:1], plain.embedding.weight, text[1], mode="sum").detach(),) for text in texts]
    expected = seen(plain, vectors, labels)
    assert found.samples == expected.samples == 7
    # a chain of three sums of at most 5 terms
    relative = tolerance(torch.float64, 5**3 * 7)
    for name in ("fc1", "fc2", "fc3"):
        assert found.nagn[name] == pytest.approx(expected.nagn[name], rel=relative)
    for name, one in found.directions(2).items():
        torch.testing.assert_close(one.values, expected.directions(2)[name].values, rtol=relative, atol=0.0)


def test_in_the_grower_too_and_in_a_closure() -> None:
    model = Bag().double()
    text = text_of(LENGTHS)
    y = torch.tensor([0, 1, 2, 0, 1])
    nagn = seen(model, [text], [y]).nagn
    for closed in (False, True):
        model = Bag().double()
        grower = fg.Grower(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            sites=fg.find_sites(model, text, include="fc*"),
            when=fg.when.Every(1),
            where=fg.where.NAGN(threshold=0.0),
        )
        if closed:
            report = grower.step(closure=lambda: F.cross_entropy(model(*text), y))  # noqa: B023
        else:
            with grower.observe():
                F.cross_entropy(model(*text), y).backward()
            report = grower.step()
        assert report is not None
        assert report.evidence["nagn"] == pytest.approx(nagn, rel=tolerance(torch.float64, 64))


class Two(Bag):
    """Words of the sample, and of each of its two sentences."""

    def forward(self, text: Tensor, offsets: Tensor, sentences: Tensor) -> Tensor:
        both = self.bags(text, sentences)
        return self.head(self.bags(text, offsets) + both[::2] + both[1::2])


class Identities(Two):
    def forward(self, ids: Tensor, text: Tensor, sentences: Tensor) -> Tensor:  # type: ignore[override]
        both = self.bags(text, sentences)
        return self.head(both[::2] + both[1::2] + ids[:, None])


class Filtered(Bag):
    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bags(text[:-2], offsets))


def test_rows_that_are_samples_stay_samples() -> None:
    model = Identities().double()
    ids = torch.arange(3).double()
    text, sentences = text_of([2, 1, 3, 2, 4, 1])
    assert seen(model, [(ids, text, sentences)], [torch.tensor([0, 1, 2])]).samples == 3


def test_what_cannot_be_told_is_asked_for() -> None:
    text, sentences = text_of([2, 1, 3, 2, 4, 1])
    y = torch.tensor([0, 1, 2])
    with pytest.raises(fg.GrowthError, match=r"the batch size cannot be told.* 13 indices in 6 bags; 13 .* in 3 bags"):
        seen(Two().double(), [(text, sentences[::2], sentences)], [y])
    text, offsets = text_of([2, 4, 5])
    with pytest.raises(fg.GrowthError, match="first argument has 11 rows.*9 indices in 3 bags.*take first a tensor"):
        seen(Filtered().double(), [(text, offsets)], [y])


def test_a_forward_pass_that_raises_leaves_nothing_behind() -> None:
    model = Bag().double()
    text, offsets = text_of(LENGTHS)
    sites = fg.find_sites(model, (text, offsets), include="fc*")
    with pytest.raises((RuntimeError, ValueError, IndexError)), fg.observe(model, sites):
        model(text, offsets + 1)
    assert torch.overrides._len_torch_function_stack() == 0
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called
    assert seen(model, [(text, offsets)], [torch.tensor([0, 1, 2, 0, 1])]).samples == 5
