"""Growth tensor by tensor: what it holds at its peak, what it lets go of, what it gives back when memory runs out."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_widen_refusals import Told
from test_widen_refusals import test_an_interruption_anywhere_changes_everything_or_nothing as interrupted
from test_widen_refusals import test_an_optimizer_that_refuses_undoes_the_growth as refused
from torch import Tensor, nn
from torch.nn import functional as F
from widen_cases import MIDDLE, Net, Twin, everything, net_attributes, net_edits, step

import fastgrow as fg
from bench.measure import peak_bytes
from fastgrow import enlarge, replacement
from fastgrow.enlarge import Block, Enlargement, allocate
from fastgrow.errors import GrowthError
from fastgrow.widen import ModuleSwap, TensorEdit, widen

# --- memory runs out


class Shortage:
    """The n-th allocation of a growth fails, and with `lasting` every one after it."""

    def __init__(self, at: int, lasting: bool, error: type[BaseException] = MemoryError) -> None:
        self.at, self.lasting, self.error, self.calls = at, lasting, error, 0

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.at or (self.lasting and self.calls > self.at):
            raise self.error("no memory left")
        return allocate(*args)


@pytest.fixture
def every_tensor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are grown and let go of as large ones are."""
    monkeypatch.setattr(enlarge, "_PADDED", 0)
    monkeypatch.setattr(replacement, "_WORTH", 0)


def short(monkeypatch: pytest.MonkeyPatch, shortage: Callable[..., Tensor]) -> None:
    monkeypatch.setattr(enlarge, "allocate", shortage)
    monkeypatch.setattr(replacement, "allocate", shortage)


def trained(index: Tensor) -> tuple[Net, Told, nn.Module]:
    """A network with its gradients, an optimizer with its state, a copy: grown once, so that stages are there."""
    net = Net()
    optimizer = Told(net.parameters(), amsgrad=True)
    ema = copy.deepcopy(net)
    for _ in range(2):
        step(net, optimizer)
    net.register_forward_hook(lambda *_: None)
    if len(index) > 4:
        grow(net, optimizer, ema, MIDDLE, 6)
    return net, optimizer, ema


def grow(net: Net, optimizer: Told, ema: nn.Module, index: Tensor, width: int) -> None:
    swap = [ModuleSwap("act", Twin())] if width == 7 else []
    widen(
        net, net_edits(index, width), attributes=net_attributes(width), swaps=swap, optimizers=[optimizer], also=[ema]
    )


def strides(net: Net, optimizer: Told, ema: nn.Module) -> list[tuple[int, ...]]:
    tensors = [*net.parameters(), *ema.parameters(), *net.buffers(), *ema.buffers()]
    grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
    moments = [value for p in net.parameters() if p in optimizer.state for value in optimizer.state[p].values()]
    return [tensor.stride() for tensor in (*tensors, *grads, *moments)]


MAPS = {
    "appended": (torch.arange(6), 7),
    "shifted": (torch.arange(6) + 1, 8),
    "scattered": (torch.tensor([0, 2, 3, 5, 6, 8]), 9),
}


@pytest.mark.usefixtures("every_tensor_counts")
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("where", MAPS)
def test_memory_that_runs_out_anywhere_leaves_everything_as_it_was(
    where: str, lasting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, width = MAPS[where]
    counted, things = Shortage(0, False), trained(index)
    with monkeypatch.context() as patch:
        short(patch, counted)
        grow(*things, index, width)
    # 5 parameters with gradients and 3 moments each, 3 buffers; the copy has neither: 5 + 3.
    assert counted.calls == 5 * 5 + 3 + 8
    things = trained(index)
    twin = copy.deepcopy(things)
    for mine, theirs in zip(things[0].parameters(), twin[0].parameters(), strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    before, laid_out = everything(*things), strides(*things)
    for at in range(1, counted.calls + 1):
        with monkeypatch.context() as patch:
            short(patch, Shortage(at, lasting, (MemoryError, torch.OutOfMemoryError)[at % 2]))
            with pytest.raises((MemoryError, torch.OutOfMemoryError), match="no memory"):
                grow(*things, index, width)
        assert sorted(map(str, everything(*things))) == sorted(map(str, before)), at
        if not lasting:
            assert strides(*things) == laid_out
    # What follows is what would have followed.
    for net, optimizer, ema in (things, twin):
        step(net, optimizer)
        grow(net, optimizer, ema, index, width)
        step(net, optimizer)
    for mine, theirs in zip((things[0], things[2]), (twin[0], twin[2]), strict=True):
        for one, other in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(one, other)
    for one, other in zip(things[0].parameters(), twin[0].parameters(), strict=True):
        mine, theirs = things[1].state[one], twin[1].state[other]
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.usefixtures("every_tensor_counts")
def test_a_refusal_after_the_last_tensor_gives_all_of_them_back() -> None:
    refused()


@pytest.mark.usefixtures("every_tensor_counts")
@pytest.mark.parametrize("where", MAPS)
def test_what_widen_returns_takes_everything_back(where: str) -> None:
    index, width = MAPS[where]
    net, optimizer, ema = trained(index)
    before = everything(net, optimizer, ema)
    edits = net_edits(index, width)
    take_back = widen(net, edits, attributes=net_attributes(width), optimizers=[optimizer], also=[ema])
    assert net.conv1.weight.shape[0] == width
    take_back()
    assert sorted(map(str, everything(net, optimizer, ema))) == sorted(map(str, before))


# --- what is let go of


@pytest.fixture
def let_go(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bool]]:
    """Each tensor that a growth has come to, and whether its memory went."""
    seen: dict[str, bool] = {}
    release = replacement.Replacement.release

    def spy(self: replacement.Replacement, undo: Any) -> None:
        release(self, undo)
        name = getattr(self, "name", str(self.key))
        seen[name] = seen.get(name, False) or self.is_empty

    monkeypatch.setattr(replacement.Replacement, "release", spy)
    gc.collect()
    gc.disable()  # what is let go of must not wait for the collector
    yield seen
    gc.enable()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 160), nn.ReLU(), nn.Linear(160, 192), nn.ReLU(), nn.Linear(192, 3))


X, Y = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
APPENDED, SCATTERED = torch.arange(160), torch.arange(160) + torch.arange(160) // 8


def hidden_edits(index: Tensor = APPENDED, width: int = 180) -> list[TensorEdit]:
    block = Block((width - 1, 0), torch.ones(1, 128))
    return [
        TensorEdit("0.weight", {0: index}, (width, 128), (block,) if index is APPENDED else None),
        TensorEdit("0.bias", {0: index}, (width,)),
        TensorEdit("2.weight", {1: index}, (192, width)),
    ]


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


HOLDERS: dict[str, Callable[[nn.Parameter], object]] = {
    "a name": lambda p: p,
    "a list": lambda p: [p],
    "detach": lambda p: p.detach(),
    "a view": lambda p: p.detach()[1:],
    "a differentiable view": lambda p: p[1:],
    "an array": lambda p: p.detach().numpy(),
    "its storage": lambda p: p.untyped_storage(),
    "a saved tensor": lambda p: p.square(),
    "a hook of its own": lambda p: p.register_hook(lambda grad: grad * p),
}


@pytest.mark.parametrize("holding", HOLDERS)
def test_what_somebody_else_holds_keeps_its_memory(holding: str, let_go: dict[str, bool]) -> None:
    model = mlp()
    values = model[0].weight.detach().clone()
    held = HOLDERS[holding](model[0].weight)
    widen(model, hidden_edits())
    assert let_go == {"0.weight": False, "0.bias": False, "2.weight": True}
    if holding == "a saved tensor":
        assert torch.equal(torch.autograd.grad(held.sum(), held.grad_fn.next_functions[0][0].variable)[0], 2 * values)
    elif holding == "an array":
        assert torch.equal(torch.from_numpy(held), values)
    elif holding in ("a name", "detach"):
        assert torch.equal(held, values)
    elif holding in ("a view", "a differentiable view"):
        assert torch.equal(held, values[1:])


def test_a_state_dict_keeps_what_it_shows(let_go: dict[str, bool]) -> None:
    model = mlp()
    kept = model.state_dict()
    values = {name: value.clone() for name, value in kept.items()}
    widen(model, hidden_edits())
    assert not any(let_go.values())
    assert all(torch.equal(kept[name], value) for name, value in values.items())


def test_a_live_graph_runs_backward_over_the_old_network(let_go: dict[str, bool]) -> None:
    model, x = mlp(), X.clone().requires_grad_()
    wanted = torch.autograd.grad(F.cross_entropy(model(x), Y), x)[0]
    loss = F.cross_entropy(model(x), Y)
    widen(model, hidden_edits())
    assert let_go == {"0.weight": False, "0.bias": False, "2.weight": False}
    loss.backward()
    assert torch.equal(x.grad, wanted)
    assert model[0].weight.grad is None
    # The first layer's weight is not needed for the gradients of a graph whose input has none.
    model = mlp()
    loss, last = loss_of(model), model[4].weight
    widen(model, hidden_edits())
    assert let_go == {"0.weight": True, "0.bias": False, "2.weight": False}
    loss.backward()
    assert last.grad.isfinite().all()


def test_a_loss_that_was_backpropagated_keeps_nothing(let_go: dict[str, bool]) -> None:
    model = mlp()
    loss = loss_of(model)
    loss.backward()
    model.zero_grad()
    nodes = [loss.grad_fn]
    for node in nodes:
        nodes += [before for before, _ in node.next_functions if before is not None]
    weights = [node for node in nodes if hasattr(node, "variable")]
    widen(model, hidden_edits())
    assert let_go == {"0.weight": True, "0.bias": False, "2.weight": True}
    # What such a graph can still reach of a tensor that went is no number.
    gone = [node.variable for node in weights if tuple(node.variable.shape) in ((160, 128), (192, 160))]
    assert len(gone) == 2
    assert all(tensor.isnan().all() for tensor in gone)


def test_a_gradient_goes_with_its_parameter(let_go: dict[str, bool]) -> None:
    model = mlp()
    loss_of(model).backward()
    before = model[2].weight.grad.clone()
    widen(model, hidden_edits())
    assert let_go["0"]
    assert torch.equal(model[2].weight.grad[:, :160], before)
    model = mlp()
    loss_of(model).backward()
    mine = model[2].weight.grad
    widen(model, hidden_edits())
    assert torch.equal(mine, before)


def test_a_sparse_gradient_and_a_shared_parameter(let_go: dict[str, bool]) -> None:
    model = nn.Sequential(nn.Embedding(999, 32, sparse=True), nn.Linear(32, 700))
    model[1].weight.share_memory_()
    model[0](torch.tensor([1, 7])).sum().backward()
    wide = torch.arange(32)
    edits = [TensorEdit("0.weight", {1: wide}, (999, 36)), TensorEdit("1.weight", {1: wide}, (700, 36))]
    widen(model, edits)
    assert let_go == {"0.weight": True, "0": False, "1.weight": False}
    assert model[0].weight.grad.to_dense().sum() == 64


def test_values_that_change_keep_their_old_tensor(let_go: dict[str, bool]) -> None:
    model = mlp()
    plain, _, last = hidden_edits()
    scaled = TensorEdit(last.tensor, last.axes, last.shape, scale=0.5)
    mixed = TensorEdit(plain.tensor, {0: APPENDED.flip(0)}, plain.shape)
    widen(model, [mixed, scaled])
    assert let_go == {"0.weight": False, "2.weight": False}


def test_bits_come_back_through_nan_and_minus_zero() -> None:
    way = Enlargement.checked("it", (3, 4), (5, 6), {0: torch.tensor([0, 2, 4]), 1: torch.arange(4) + 1})
    odd = torch.tensor([[0.0, -0.0, float("inf"), float("nan")]] * 3).view(torch.int32)
    odd[:, 3] += 1  # another NaN
    larger = way.place(odd.view(torch.float32))
    assert torch.equal(way.old_block(larger).contiguous().view(torch.int32), odd)
    place = larger.untyped_storage().data_ptr()
    back = way.compacted(larger)
    assert torch.equal(back.contiguous().view(torch.int32), odd)
    assert back.untyped_storage().data_ptr() == place


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-4, momentum=0.9),
    "fg.SGD": lambda p: fg.optim.SGD(p, lr=0.1, momentum=0.9, rate_adaptation=True),
    "fg.Adam": lambda p: fg.optim.Adam(p, rate_adaptation=True, backend="torch"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loop_that_keeps_its_loss_lets_go_at_every_growth(name: str, let_go: dict[str, bool]) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    grower = fg.Grower(
        model,
        optimizer,
        example_inputs=X,
        when=fg.when.Every(3),
        where=fg.where.Everywhere(fraction=0.1),
        how=fg.how.GradMax(),
    )
    gc.collect()  # what finding the sites has left
    large = {"0.weight", "2.weight", "momentum_buffer" if "SGD" in name or "RMS" in name else "exp_avg"}
    for number in range(7):
        with grower.observe():
            loss = loss_of(model)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        let_go.clear()
        if grower.step() is not None:
            assert number in (2, 5)
            assert large - {name for name, gone in let_go.items() if gone} == set()
    assert len(grower.history) == 2


def test_captures_go_when_the_block_ends_though_the_loss_stays() -> None:
    model = mlp()
    held: list[weakref.ref[Tensor]] = []
    handle = model[1].register_forward_hook(lambda *call: held.append(weakref.ref(call[2].untyped_storage())))
    sites = fg.find_sites(model, X)
    with fg.observe(model, sites) as seen:
        loss = loss_of(model)
        loss.backward()
    handle.remove()
    assert loss.isfinite()
    assert seen.directions(4)
    assert held[-1]() is None


# --- the peak


@pytest.mark.parametrize("index", [APPENDED, SCATTERED], ids=["appended", "scattered"])
@pytest.mark.parametrize("with_gradients", [False, True], ids=["bare", "gradients"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "fg.Adam"])
def test_the_peak_is_the_new_entries_and_one_tensor_more(name: str, with_gradients: bool, index: Tensor) -> None:
    held: list[Any] = []

    def prepare() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = mlp()
        optimizer = OPTIMIZERS[name](model.parameters())
        held[:] = [loss_of(model)]
        held[0].backward()
        optimizer.step()
        if not with_gradients:
            optimizer.zero_grad()
        return model, optimizer

    copies = {"SGD": 2, "Adam": 4, "fg.Adam": 3}[name] + with_gradients
    new = 4 * copies * 20 * (128 + 1 + 192)
    # Tensors below the threshold stand twice, index maps and step counts beside them.
    spare = 4 * copies * 160 + 16384
    peak = peak_bytes(
        lambda given: widen(given[0], hidden_edits(index), optimizers=[given[1]]), torch.device("cpu"), prepare
    )
    largest = 4 * 192 * 180
    assert largest <= peak <= new + largest + spare


def test_an_optimizer_that_remembers_is_told_before(let_go: dict[str, bool]) -> None:
    model = mlp()
    optimizer = fg.optim.Adam(model.parameters(), rate_adaptation=True, backend="torch")
    for edits in (hidden_edits(), hidden_edits(torch.arange(180), 200)):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        widen(model, edits, optimizers=[optimizer])
        assert let_go["0.weight"]
        assert let_go["2.weight"]
        assert let_go["exp_avg"]
    with pytest.raises(GrowthError, match="shape"):
        widen(model, hidden_edits(), optimizers=[optimizer])
    loss_of(model).backward()
    optimizer.step()


@pytest.mark.usefixtures("every_tensor_counts")
def test_an_interruption_among_tensors_that_went_changes_everything_or_nothing() -> None:
    interrupted()
