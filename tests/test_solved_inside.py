"""Sites solved inside the only backward pass of a block: the same directions from tensors held less long."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Branching, Gated, Plain, Residual, image_batch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import fastgrow as fg
from fastgrow.natural import natural_directions
from fastgrow.observation import Observation
from fastgrow.site_solving import SiteSolving
from fastgrow.sites import Site
from fastgrow.solve import Directions


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator)


def same(one: dict[str, Directions], other: dict[str, Directions]) -> None:
    assert list(one) == list(other)
    for name, found in one.items():
        assert all(torch.equal(a, b) for a, b in zip(found, other[name], strict=True)), name
        assert found.captured == other[name].captured


def observed(
    model: nn.Module, sites: fg.Sites, loss: Callable[[], Tensor], last: bool, **options: object
) -> Observation:
    with fg.observe(model, sites, rank=2, **options) as seen:  # type: ignore[arg-type]
        seen.backward(loss(), last=last)
    return seen


@pytest.mark.parametrize("kind", [Plain, Residual, Branching, Gated])
@pytest.mark.parametrize("passes", [1, 2])
def test_directions_are_those_of_the_end_of_the_block(kind: type[nn.Module], passes: int) -> None:
    torch.manual_seed(0)
    model = kind().double()
    x, y = image_batch()
    if kind is Gated:
        x = x.flatten(2).mT[..., [0, 1, 0]]  # (samples, tokens, 3)
    sites = fg.find_sites(model, x, exclude=["qkv"] if kind is Gated else ())  # one site draws gates

    def loss() -> Tensor:  # two views share one loss
        torch.manual_seed(2)
        outputs = [model(x.roll(turn, -1)) for turn in range(passes)]
        return sum((F.cross_entropy(output, y) for output in outputs), torch.zeros(())) / passes

    at_end, inside = (observed(model, sites, loss, last, bias=True) for last in (False, True))
    same(at_end.all_directions(), inside.all_directions())
    assert (at_end.nagn, at_end.samples) == (inside.nagn, inside.samples)


def test_further_solvers_find_the_same() -> None:
    model, (x, y) = chain(), batch()
    sites = fg.find_sites(model, x)
    options = {"solvers": {"natural": natural_directions}, "signed": {"0": 1.0}}
    at_end, inside = (
        observed(model, sites, lambda: F.cross_entropy(model(x), y), last, **options) for last in (False, True)
    )
    same(at_end.all_directions(), inside.all_directions())
    same(at_end.natural(2), inside.natural(2))


def held_at_the_end(model: nn.Sequential, last: bool) -> list[bool]:
    """For each consumer, from the last on: whether its output's gradient is still in memory when the pass is over."""
    (x, y), gradients = batch(), []
    sites = fg.find_sites(model, x)

    def watch(_module: nn.Module, _args: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradients.append(StorageWeakRef(gradient.untyped_storage())))

    hooks = [model.get_submodule(site.consumers[0]).register_forward_hook(watch) for site in sites]
    with fg.observe(model, sites, rank=2) as seen:
        seen.backward(F.cross_entropy(model(x), y), last=last)
        held = [not gradient.expired() for gradient in gradients]
    for hook in hooks:
        hook.remove()
    return held


def test_tensors_are_let_go_inside_the_backward_pass() -> None:
    assert held_at_the_end(chain(), last=False) == [True, True, True]
    assert held_at_the_end(chain(), last=True) == [False, False, False]


def test_a_site_that_cannot_be_solved_is_told_at_the_end_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = chain(), batch()
    sites, plain, tried = fg.find_sites(model, x), SiteSolving.directions, []

    def refusing(self: SiteSolving, targets: Sequence[Site], *rest: Any, **options: Any) -> dict[str, Directions]:
        tried.append([site.name for site in targets])
        if "2" in tried[-1]:
            raise fg.GrowthError("site '2': not today")
        return plain(self, targets, *rest, **options)

    monkeypatch.setattr(SiteSolving, "directions", refusing)
    watching = fg.observe(model, sites, rank=2)
    seen = watching.__enter__()
    seen.backward(F.cross_entropy(model(x), y), last=True)
    with pytest.raises(fg.GrowthError, match="not today"):
        watching.__exit__(None, None, None)
    assert tried == [["4"], ["2"], ["0"], ["2"]]  # in the order of the backward pass, and what is left at the end


def test_checkpointed_layers_are_solved_as_ever() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = chain()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    model, (x, y) = Checkpointed(), batch()
    sites = fg.find_sites(model, x)
    at_end, inside = (observed(model, sites, lambda: F.cross_entropy(model(x), y), last) for last in (False, True))
    same(at_end.all_directions(), inside.all_directions())


class Loop:
    """A Grower's loop, and what each growth of it wrote."""

    def __init__(self, seed: nn.Module, **options: object) -> None:
        self.model = copy.deepcopy(seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.grower = fg.Grower(
            self.model,
            self.optimizer,
            example_inputs=batch()[0],
            when=fg.when.Every(2),
            where=fg.where.Everywhere(units=1),
            **options,  # type: ignore[arg-type]
        )

    def step(self, passes: int = 1) -> bool:
        """Whether it grew."""
        x, y = batch()
        with self.grower.observe():
            for part in range(passes):
                F.cross_entropy(self.model(x.roll(part, -1)), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.grower.step() is not None

    @property
    def solved_inside(self) -> bool:
        return self.grower._one_pass

    def never(self) -> Loop:
        """The same, kept from solving inside a pass."""
        self.grower._one_pass = False
        return self


def test_a_loop_solves_inside_once_it_was_seen_to_make_one_pass() -> None:
    plain, other = Loop(chain()), Loop(chain())
    for number in range(1, 9):
        assert plain.step() == other.never().step() == (number % 2 == 0)
        assert plain.solved_inside == (number >= 2)
    for (name, value), (_, wanted) in zip(plain.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(value, wanted), name
    assert plain.grower.history[-1].seconds > 0


def test_a_pass_too_many_is_measured_anew_on_the_next_step() -> None:
    loop = Loop(chain())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grew = [loop.step(), loop.step(), loop.step(), loop.step(passes=2), loop.step(passes=2)]
        assert grew == [False, True, False, False, True]  # a step late, once
        other = Loop(chain())
        other.model.load_state_dict({k: v for k, v in chain().state_dict().items()})
        assert not loop.solved_inside
        assert [loop.step(passes=2) for _ in range(4)] == [True, False, True, False]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loop.model.modules())


def test_a_measurement_made_anew_is_of_all_its_passes() -> None:
    """It grows as a loop does that never solved inside, from the same weights."""
    spoiled, plain = Loop(chain()), Loop(chain())
    for loop in (spoiled, plain.never()):
        assert [loop.step(), loop.step(), loop.step()] == [False, True, False]
    assert not spoiled.step(passes=2)
    plain.grower.when = fg.when.Milestones([5])
    plain.never().grower._due.clear()
    assert not plain.step(passes=2)
    plain.grower._due.append(5)
    assert [spoiled.step(passes=2), plain.never().step(passes=2)] == [True, True]
    for (name, value), (_, wanted) in zip(
        spoiled.model.named_parameters(), plain.model.named_parameters(), strict=True
    ):
        assert torch.equal(value, wanted), name


def test_under_a_scaler_nothing_is_solved_before_all_is_known_to_be_finite() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loop = Loop(chain(), loss_scale=scaler)
    x, y = batch()
    for _ in range(4):
        with loop.grower.observe():
            scaler.scale(F.cross_entropy(loop.model(x), y)).backward()
            assert loop.grower._watching is None or not loop.grower._watching._solving.begun
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
        loop.grower.step()
    assert len(loop.grower.history) == 2


@pytest.mark.parametrize(("kind", "ends"), [(Plain, 1), (Residual, 1), (Branching, 2)])
def test_a_growth_pass_ends_at_the_outermost_layers(
    kind: type[nn.Module], ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a backward pass ends at it holds until it is over."""
    torch.manual_seed(0)
    model = kind().double()
    x, y = image_batch()
    sites, plain, asked = fg.find_sites(model, x), torch.autograd.grad, []

    def counted(outputs: Any, inputs: Any, *rest: Any, **options: Any) -> tuple[Tensor | None, ...]:
        asked.append(inputs)
        return plain(outputs, inputs, *rest, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    seen = observed(model, sites, lambda: F.cross_entropy(model(x), y), last=True)
    assert len(asked[0]) == ends
    with fg.observe(model, sites, rank=2) as whole:
        F.cross_entropy(model(x), y).backward()
    assert whole.nagn == pytest.approx(seen.nagn, rel=1e-12)
