from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from widen_cases import MIDDLE, Net, Twin, X, everything, net_attributes, net_edits, step

from fastgrow import stages
from fastgrow.errors import GrowthError
from fastgrow.stages import newest_stage
from fastgrow.widen import ModuleSwap, TensorEdit, widen

# --- parametrizations and the like


@pytest.mark.parametrize("training", [True, False])
def test_weight_norm_and_spectral_norm(training: bool) -> None:
    x = torch.randn(3, 2)
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 4)), parametrizations.spectral_norm(nn.Linear(4, 4)))
    net.train(training)
    net(x)
    before = net.eval()(x)
    net.train(training)
    p = "parametrizations.weight"
    buffers = {name: tensor.clone() for name, tensor in net.named_buffers()}
    edits = [
        TensorEdit(f"0.{p}.original0", {0: MIDDLE}, (6, 1), torch.ones(6, 1)),
        TensorEdit(f"0.{p}.original1", {0: MIDDLE}, (6, 2), torch.ones(6, 2)),
        TensorEdit("0.bias", {0: MIDDLE}, (6,)),
        TensorEdit(f"1.{p}.original", {1: MIDDLE}, (4, 6)),
    ]
    state = everything(net)
    with pytest.raises(GrowthError, match="parametrization _SpectralNorm fails"):
        widen(net, edits)
    assert everything(net) == state
    widen(net, [*edits, TensorEdit(f"1.{p}.0._v", {0: MIDDLE}, (6,))])
    assert torch.equal(net.get_buffer(f"1.{p}.0._v")[MIDDLE], buffers[f"1.{p}.0._v"])
    assert torch.equal(net.get_buffer(f"1.{p}.0._u"), buffers[f"1.{p}.0._u"])
    torch.testing.assert_close(net.eval()(x), before)


def test_parametrized_tensors_are_refused_by_name() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)))
    with pytest.raises(GrowthError, match=r"_WeightNorm; edit 0\.parametrizations\.weight\.original0, 0\.para"):
        widen(net, [TensorEdit("0.weight", {0: MIDDLE}, (6, 3))])
    net = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="householder"))
    name = "0.parametrizations.weight.original"
    with pytest.raises(GrowthError, match="parametrization _Orthogonal fails"):
        widen(net, [TensorEdit(name, {0: MIDDLE}, (6, 4))])
    assert parametrize.is_parametrized(net[0])


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize(
    ("wrap", "inner"),
    [
        (nn.utils.weight_norm, "weight_v"),
        (nn.utils.spectral_norm, "weight_orig"),
        (lambda layer: prune.identity(layer, "weight"), "weight_orig"),
    ],
)
def test_old_hooks_are_refused_by_name(wrap: Callable[[nn.Module], nn.Module], inner: str) -> None:
    net = nn.Sequential(wrap(nn.Linear(3, 4)))
    for name in ("weight", inner):
        with pytest.raises(GrowthError, match=f"0.{name}"):
            widen(net, [TensorEdit(f"0.{name}", {0: MIDDLE}, (6, 3))])


# --- what is refused


def _listed() -> nn.Module:
    net = Net()
    net.mine = [net.conv1.weight]
    return net


def _sharing() -> nn.Module:
    net = Net()
    net.other = nn.Conv2d(2, 4, 3)
    net.other.weight.data = net.conv1.weight.data
    return net


def _sparse() -> nn.Module:
    net = nn.Module()
    net.register_buffer("weight", torch.eye(4).to_sparse())
    return net


GOOD = {0: MIDDLE}
REFUSED: dict[str, tuple[Callable[[], nn.Module], TensorEdit, str]] = {
    "unknown": (Net, TensorEdit("conv1.wieght", GOOD, (6, 2, 3, 3)), r"is it 'conv1\.weight'"),
    "unknown module": (Net, TensorEdit("conv7.weight", GOOD, (6, 2, 3, 3)), "no module 'conv7'"),
    "none": (lambda: nn.Linear(2, 4, bias=False), TensorEdit("bias", GOOD, (6,)), "Linear '' has no bias"),
    "rank": (Net, TensorEdit("conv1.weight", GOOD, (6, 2, 3)), "as many dimensions"),
    "no such dimension": (Net, TensorEdit("conv1.bias", {1: MIDDLE}, (6,)), "no dimension 1"),
    "negative dimension": (Net, TensorEdit("conv1.bias", {-1: MIDDLE}, (6,)), "no dimension -1"),
    "map length": (Net, TensorEdit("conv1.bias", {0: torch.arange(3)}, (6,)), r"int64 of shape \(4,\)"),
    "map dtype": (Net, TensorEdit("conv1.bias", {0: MIDDLE.int()}, (6,)), "torch.int32"),
    "map twice": (Net, TensorEdit("conv1.bias", {0: torch.tensor([0, 1, 1, 2])}, (6,)), "to different"),
    "map beyond": (Net, TensorEdit("conv1.bias", GOOD, (5,)), "below 5"),
    "map below": (Net, TensorEdit("conv1.bias", {0: MIDDLE - 1}, (6,)), "different positions"),
    "shrinks": (Net, TensorEdit("conv1.bias", {0: torch.arange(4)}, (3,)), "below 3"),
    "no map": (Net, TensorEdit("conv1.weight", GOOD, (6, 3, 3, 3)), "dimension 1 goes from 2 to 3"),
    "fresh": (Net, TensorEdit("conv1.bias", GOOD, (6,), torch.ones(5)), r"fresh has shape \(5,\)"),
    "scale": (Net, TensorEdit("conv1.bias", GOOD, (6,), scale=torch.ones(6)), "doesn't broadcast"),
    "scale rank": (Net, TensorEdit("conv1.bias", GOOD, (6,), scale=torch.ones(1, 4)), "doesn't broadcast"),
    "lazy": (lambda: nn.LazyLinear(4), TensorEdit("weight", GOOD, (6, 2)), "run one batch"),
    "sparse": (_sparse, TensorEdit("weight", GOOD, (6, 4)), "wanted a dense tensor"),
    "recurrent": (lambda: nn.LSTM(3, 1), TensorEdit("weight_ih_l0", GOOD, (6, 3)), r"LSTM\._flat_weights"),
    "second reference": (_listed, TensorEdit("conv1.weight", GOOD, (6, 2, 3, 3)), r"Net\.mine"),
    "shared memory": (_sharing, TensorEdit("conv1.weight", GOOD, (6, 2, 3, 3)), "share memory"),
    "script": (lambda: torch.jit.script(nn.Linear(2, 4)), TensorEdit("bias", GOOD, (6,)), "ScriptModule"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_nothing_changed(case: str) -> None:
    build, edit, message = REFUSED[case]
    net = build()
    first = [TensorEdit("conv2.weight", {1: MIDDLE}, (3, 6, 1, 1))] if isinstance(net, Net) else []
    objects = [id(item) for item in (*net.parameters(), *net.buffers())]
    with pytest.raises(GrowthError, match=message):
        widen(net, [*first, edit])
    assert [id(item) for item in (*net.parameters(), *net.buffers())] == objects


# --- all or nothing


class Told(torch.optim.Adam):
    """Told of growth; may refuse."""

    refuse = False

    def grown(self, parameter: Tensor, stages: dict[int, Tensor]) -> None:
        if self.refuse:
            raise RuntimeError("not now")


def prepared() -> tuple[Net, Told, AveragedModel]:
    net = Net()
    optimizer = Told(net.parameters())
    step(net, optimizer)
    widen(net, net_edits(), attributes=net_attributes(), optimizers=[optimizer])
    net.register_forward_hook(lambda *_: None)
    newest_stage(net)  # axes remember theirs: every growth of this network runs the same lines
    return net, optimizer, AveragedModel(net)


def grow_all(net: Net, optimizer: Told, average: AveragedModel) -> None:
    widen(
        net,
        net_edits(torch.arange(6), 7),
        attributes=net_attributes(7),
        swaps=[ModuleSwap("act", Twin())],
        optimizers=[optimizer],
        also=[average],
    )


def test_an_optimizer_that_refuses_undoes_the_growth() -> None:
    net, optimizer, average = prepared()
    optimizer.refuse = True
    before = everything(net, optimizer, average)
    with pytest.raises(RuntimeError, match="not now"):
        grow_all(net, optimizer, average)
    after = everything(net, optimizer, average)
    assert sorted(map(str, after)) == sorted(map(str, before))
    step(net, optimizer)
    optimizer.refuse = False
    grow_all(net, optimizer, average)
    step(net, optimizer)


class Interruption:
    """Raises at the n-th line that the transaction runs, wherever that is."""

    FILES = (
        "widen.py",
        "tensor_edits.py",
        "replacement.py",
        "enlarge.py",
        "optimizer_state.py",
        "stages.py",
        "names.py",
    )

    def __init__(self, at: float, error: type[BaseException]) -> None:
        self.at, self.error, self.lines, self.built = at, error, 0, 0

    def __call__(self, frame: Any, event: str, _: object) -> Any:
        path = frame.f_code.co_filename
        if "fastgrow" not in path or not path.endswith(self.FILES):
            return None
        if event == "line":
            self.lines += 1
            if frame.f_code.co_name == "commit":
                self.built = self.built or self.lines
            if self.lines == self.at:
                raise self.error
        return self

    def run(self, *things: Any) -> bool:
        previous = sys.gettrace()
        sys.settrace(self)
        try:
            grow_all(*things)
        except self.error:
            return False
        finally:
            sys.settrace(previous)
        return True


def test_an_interruption_anywhere_changes_everything_or_nothing() -> None:
    counted = Interruption(math.inf, KeyboardInterrupt)
    assert counted.run(*prepared())
    things = prepared()
    before = sorted(map(str, everything(*things)))
    # The building and the swaps, sampled; then every line of the end.
    points = [
        *range(1, counted.built, 1 + counted.built // 120),
        *range(counted.built, counted.lines, 1 + (counted.lines - counted.built) // 120),
        *range(counted.lines - 20, counted.lines + 1),
    ]
    finished = 0
    for point in points:
        error = (KeyboardInterrupt, MemoryError)[point % 2]
        if Interruption(point, error).run(*things):
            pytest.fail(f"line {point} was not reached")
        if sorted(map(str, everything(*things))) != before:
            finished += 1
            assert point > counted.lines - 5, f"changed in part by an interruption at {point} of {counted.lines}"
            assert things[0].conv1.weight.shape == things[2].module.conv1.weight.shape == (7, 2, 3, 3)
            assert len(things[1].state) == len(list(things[0].parameters()))
            step(things[0], things[1])
            things = prepared()
            before = sorted(map(str, everything(*things)))
    assert finished < 5


# --- tensors without values


def test_meta_and_fake_models_grow() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    net = Net().to("meta")
    widen(net, net_edits(), attributes=net_attributes())
    assert net.conv1.weight.is_meta
    assert net(X.to("meta")).shape == (5, 3, 4, 4)

    mode = FakeTensorMode()
    net = Net()
    for module in net.modules():
        for name, parameter in list(module._parameters.items()):
            module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()))
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = mode.from_tensor(buffer)
    widen(net, net_edits(), attributes=net_attributes())
    with mode:
        assert net(torch.ones(5, 2, 6, 6)).shape == (5, 3, 4, 4)


def test_default_device_does_not_leak_in() -> None:
    net = Net()
    edits = net_edits()
    with torch.device("meta"):
        widen(net, edits, attributes=net_attributes())
    assert not any(tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))
    assert not stages.stages_of(net.conv1, "weight")[0].is_meta
