from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from widen_cases import MIDDLE, Net, Twin, X, everything, net_attributes, net_edits, step

from fastgrow import stages
from fastgrow.enlarge import Enlargement
from fastgrow.errors import GrowthError
from fastgrow.widen import AttributeEdit, ModuleSwap, TensorEdit, widen

# --- what is kept and what follows


def test_one_growth_of_everything() -> None:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    step(net, optimizer)
    net.eval()
    before, old = net(X), copy.deepcopy(net)
    kept = net.conv2.bias
    widen(net, net_edits(), attributes=net_attributes(), optimizers=[optimizer])
    assert (net.conv1.out_channels, net.norm.num_features, net.conv2.in_channels) == (6, 6, 6)
    assert net.conv2.bias is kept
    # conv2's new columns are zero: exact zeros added to the same sums.
    torch.testing.assert_close(net(X), before)
    for name, tensor in old.state_dict().items():
        after = net.state_dict()[name]
        for dim, (n, m) in enumerate(zip(tensor.shape, after.shape, strict=True)):
            after = after.index_select(dim, MIDDLE) if n != m else after
        assert torch.equal(after, tensor), name
    assert torch.equal(net.conv1.weight[[2, 4]], net_edits()[0].fresh[[2, 4]])
    assert list(net.state_dict()) == list(old.state_dict())
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in old.named_parameters()]
    assert torch.equal(net.gate[MIDDLE], torch.ones(4))
    assert "gate" not in net.state_dict()
    net.train()
    step(net, optimizer)


def test_grad_is_kept_in_the_old_block_and_zero_in_the_new_one() -> None:
    net = Net()
    step(net)
    net.conv1.bias.grad = None
    before = net.conv1.weight.grad.clone()
    widen(net, net_edits())
    assert torch.equal(net.conv1.weight.grad[MIDDLE], before)
    assert not net.conv1.weight.grad[[2, 4]].any()
    assert net.conv1.bias.grad is None


def test_sparse_grad_follows() -> None:
    net = nn.Embedding(5, 3, sparse=True)
    net(torch.tensor([1, 4, 1])).sum().backward()
    before = net.weight.grad.to_dense()
    edit = TensorEdit("weight", {0: torch.tensor([6, 0, 1, 2, 3]), 1: torch.tensor([0, 1, 3])}, (7, 4))
    widen(net, [edit])
    after = net.weight.grad
    assert after.is_sparse
    assert torch.equal(after.to_dense()[edit.axes[0]][:, edit.axes[1]], before)
    assert after.to_dense().sum() == before.sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int32])
def test_dtype_and_requires_grad(dtype: torch.dtype) -> None:
    net = nn.Module()
    values = torch.arange(6).view(3, 2).to(dtype)
    net.weight = nn.Parameter(values, requires_grad=False)
    widen(net, [TensorEdit("weight", {0: torch.arange(3)}, (4, 2), torch.full((4, 2), 9.0))])
    assert net.weight.dtype == dtype
    assert not net.weight.requires_grad
    assert torch.equal(net.weight[:3], values)
    assert net.weight[3].eq(9).all()


def test_class_attributes_and_hooks_of_a_parameter() -> None:
    class Special(nn.Parameter):
        pass

    net = nn.Linear(2, 4)
    net.weight = Special(net.weight.detach())
    net.weight.no_decay = True
    calls: list[str] = []
    handle = net.weight.register_hook(lambda grad: calls.append(f"hook {tuple(grad.shape)}"))
    after = net.weight.register_post_accumulate_grad_hook(lambda p: calls.append(f"post {tuple(p.shape)}"))
    widen(net, [TensorEdit("weight", {0: MIDDLE}, (6, 2)), TensorEdit("bias", {0: MIDDLE}, (6,))])
    assert type(net.weight) is Special
    assert net.weight.no_decay
    assert net.weight.is_leaf
    net(torch.ones(1, 2)).sum().backward()
    handle.remove()
    after.remove()
    net(torch.ones(1, 2)).sum().backward()
    assert calls == ["hook (6, 2)", "post (6, 2)"]


@pytest.mark.parametrize("index", [torch.arange(4), MIDDLE])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((4, 3, 3, 3), torch.channels_last),
        ((4, 1, 3, 3), torch.channels_last),
        ((4, 3, 1, 1), torch.channels_last),
        ((4, 3, 3, 3), torch.contiguous_format),
        ((4, 2, 3, 3, 3), torch.channels_last_3d),
    ],
)
def test_memory_format(shape: tuple[int, ...], memory_format: torch.memory_format, index: Tensor) -> None:
    net = nn.Module()
    # contiguous() would leave the strides of a 1 x 1 kernel as they are.
    net.weight = nn.Parameter(torch.empty(shape, memory_format=memory_format).normal_())
    net.weight.grad = torch.empty(shape, memory_format=memory_format).normal_()
    old, grad = net.weight.detach(), net.weight.grad
    new = (6, shape[1] + 2, *shape[2:])
    widen(net, [TensorEdit("weight", {0: index, 1: torch.arange(shape[1])}, new, torch.randn(new))])
    wanted = torch.empty(new, memory_format=memory_format).stride()
    assert net.weight.stride() == net.weight.grad.stride() == wanted
    assert torch.equal(net.weight[index][:, : shape[1]], old)
    assert torch.equal(net.weight.grad[index][:, : shape[1]], grad)


def test_memory_format_of_a_transposed_and_of_an_expanded_tensor() -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.randn(3, 4).t())
    net.register_buffer("ones", torch.ones(1, 3).expand(4, 3))
    widen(net, [TensorEdit(name, {0: MIDDLE}, (6, 3)) for name in ("weight", "ones")])
    assert net.weight.stride() == (1, 6)
    assert net.ones.sum() == 12


def test_nothing_is_tracked_by_autograd_or_tied_to_inference_mode() -> None:
    net = nn.Linear(2, 4)
    fresh = torch.ones(6, 2, requires_grad=True) * 2
    with torch.inference_mode():
        widen(net, [TensorEdit("weight", {0: MIDDLE}, (6, 2), fresh), TensorEdit("bias", {0: MIDDLE}, (6,))])
    assert net.weight.is_leaf
    assert net.weight.requires_grad
    assert not net.weight.is_inference()
    assert net.weight.data_ptr() != fresh.data_ptr()
    net(torch.ones(1, 2)).sum().backward()


def test_scale_reaches_old_values_only() -> None:
    net = nn.Linear(2, 4, dtype=torch.bfloat16)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    old, moment = net.weight.detach(), optimizer.state[net.weight]["exp_avg"].clone()
    factor = torch.tensor([[1.0], [0.3], [-1.0], [2.0]])
    edits = [
        TensorEdit("weight", {0: torch.arange(4)}, (6, 2), torch.full((6, 2), 5.0), factor),
        TensorEdit("bias", {}, (4,), scale=0.5),
    ]
    bias = net.bias.detach()
    widen(net, edits, optimizers=[optimizer])
    assert torch.equal(net.weight[:4], (old.float() * factor).bfloat16())
    assert net.weight[4:].eq(5).all()
    assert torch.equal(net.bias, bias * 0.5)
    assert torch.equal(optimizer.state[net.weight]["exp_avg"][:4], moment)
    assert stages.stages_of(net, "bias") == {}


def test_a_live_graph_survives() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.ones(3, 2, requires_grad=True)
    loss = net(x).sum()
    wanted = torch.autograd.grad(net(x).sum(), x)[0]
    widen(net, [TensorEdit("0.weight", {0: MIDDLE}, (6, 2)), TensorEdit("0.bias", {0: MIDDLE}, (6,)),
                TensorEdit("2.weight", {1: MIDDLE}, (1, 6))])  # fmt: skip
    loss.backward()
    assert torch.equal(x.grad, wanted)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_sizes_zero_and_one() -> None:
    net = nn.Linear(1, 0)
    widen(net, [TensorEdit("weight", {0: torch.arange(0), 1: torch.tensor([2])}, (2, 3)),
                TensorEdit("bias", {0: torch.arange(0)}, (2,), torch.ones(2))])  # fmt: skip
    assert torch.equal(net.weight, torch.zeros(2, 3))
    assert torch.equal(net.bias, torch.ones(2))
    widen(net, [])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_old_value_lands_where_its_maps_say(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 4))
    old = tuple(data.draw(st.integers(0, 4)) for _ in range(rank))
    maps, new = {}, list(old)
    for dim in range(rank):
        if data.draw(st.booleans()):
            new[dim] = old[dim] + data.draw(st.integers(0, 3))
            maps[dim] = torch.tensor(data.draw(st.permutations(range(new[dim])))[: old[dim]], dtype=torch.int64)
    order = data.draw(st.permutations(range(rank)))
    dense = torch.randn([old[dim] for dim in order])
    tensor = dense.permute([order.index(dim) for dim in range(rank)])
    fresh = torch.randn(new)
    result = Enlargement.checked("x", old, new, maps).place(tensor, fresh)
    wanted = fresh.clone()
    for at in itertools.product(*map(range, old)):
        wanted[tuple(int(maps[dim][i]) if dim in maps else i for dim, i in enumerate(at))] = tensor[at]
    assert torch.equal(result, wanted)


# --- ties, copies, wrappers


def test_tied_parameters_stay_tied() -> None:
    net = nn.Module()
    net.embed, net.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    net.head.weight = net.embed.weight
    net.embed.register_buffer("mask", torch.ones(4))
    net.head.register_buffer("mask", net.embed.mask)
    optimizer = torch.optim.Adam(net.parameters())
    net.head(net.embed(torch.tensor([1]))).sum().backward()
    optimizer.step()
    fresh = torch.randn(7, 6)
    edits = [TensorEdit(f"{name}.weight", {1: MIDDLE}, (7, 6), fresh.clone()) for name in ("embed", "head")]
    widen(net, [*edits, TensorEdit("head.mask", {0: MIDDLE}, (6,))], optimizers=[optimizer])
    assert net.head.weight is net.embed.weight
    assert net.head.mask is net.embed.mask
    assert net.head.weight.shape == (7, 6)
    assert list(optimizer.state) == [net.head.weight]
    assert stages.stages_of(net.embed, "weight")[1].tolist() == stages.stages_of(net.head, "weight")[1].tolist()


@pytest.mark.parametrize("change", ["fresh", "axes", "shape", "scale"])
def test_two_different_edits_of_one_tensor_are_refused(change: str) -> None:
    net = nn.Module()
    net.one, net.two = nn.Linear(3, 4), nn.Linear(3, 4)
    net.two.weight = net.one.weight
    other = {
        "fresh": TensorEdit("two.weight", {0: MIDDLE}, (6, 3), torch.ones(6, 3)),
        "axes": TensorEdit("two.weight", {0: torch.arange(4)}, (6, 3)),
        "shape": TensorEdit("two.weight", {0: MIDDLE}, (7, 3)),
        "scale": TensorEdit("two.weight", {0: MIDDLE}, (6, 3), scale=torch.tensor(1.0)),
    }[change]
    with pytest.raises(GrowthError, match=r"'one\.weight' and 'two\.weight' are the same tensor"):
        widen(net, [TensorEdit("one.weight", {0: MIDDLE}, (6, 3)), other])
    assert net.one.weight.shape == (4, 3)


def test_copies_follow_with_their_own_old_values() -> None:
    net = Net()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ema = copy.deepcopy(net)
    with torch.no_grad():
        for tensor in (*average.parameters(), *ema.parameters()):
            tensor.mul_(2)
    old = average.module.conv1.weight.detach()
    swap = ModuleSwap("act", Twin(inplace=True))
    widen(net, net_edits(), attributes=net_attributes(), swaps=[swap], also=[average, ema, average])
    assert torch.equal(average.module.conv1.weight[MIDDLE], old)
    fresh = net.conv1.weight[[2, 4]]
    assert torch.equal(average.module.conv1.weight[[2, 4]], fresh)
    assert torch.equal(ema.conv1.weight[[2, 4]], fresh)
    assert len({model.conv1.weight.data_ptr() for model in (net, ema, average.module)}) == 3
    assert len({id(model.act) for model in (net, ema, average.module)}) == 3
    assert average.module.act.inplace
    assert ema.norm.num_features == 6
    assert stages.newest_stage(ema) == 1
    average.update_parameters(net)
    average.update_parameters(net)
    assert torch.equal(average.module.conv1.weight, net.conv1.weight)
    step(ema)


def test_a_copy_of_another_size_is_refused() -> None:
    net, other = Net(), Net()
    widen(other, net_edits(), attributes=net_attributes())
    before = everything(net, other)
    with pytest.raises(GrowthError, match=r"a copy that must follow \(Net\): 'conv1\.weight'"):
        widen(net, net_edits(), also=[other])
    with pytest.raises(GrowthError, match="wanted an nn"):
        widen(net, net_edits(), also=["ema"])  # type: ignore[list-item]
    assert everything(net, other) == before


class Wrapper(nn.Module):
    """Holds its module, and a list of its parameters, as DDP does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._module_parameters = list(module.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager"), Wrapper])
def test_names_are_found_through_wrappers(wrap: Callable[[nn.Module], nn.Module], prefix: str) -> None:
    net = Net()
    wrapped = wrap(net)
    edits = [TensorEdit(prefix + e.tensor, e.axes, e.shape, e.fresh) for e in net_edits()]
    attributes = [AttributeEdit(prefix + e.module, e.attribute, e.value) for e in net_attributes()]
    widen(wrapped, edits, attributes=attributes, swaps=[ModuleSwap(f"{prefix}act", Twin())], also=[net])
    assert net.conv1.weight.shape == (6, 2, 3, 3)
    assert net.conv1.out_channels == 6
    assert type(net.act) is Twin


def test_a_wrapped_layer_inside() -> None:
    net = Net()
    net.conv1 = torch.compile(net.conv1, backend="eager")
    widen(net, net_edits(), attributes=net_attributes())
    assert net.conv1._orig_mod.out_channels == 6
    net.eval()(X)


def test_a_compiled_model_runs_after_growth() -> None:
    net = Net().eval()
    fast = torch.compile(net, backend="eager")
    before = fast(X)
    widen(net, net_edits(), attributes=net_attributes())
    torch.testing.assert_close(fast(X), before)
    torch._dynamo.reset()


# --- attributes, swaps, stages


def test_swap_keeps_hooks_training_flag_and_every_place() -> None:
    act = nn.ReLU().eval()
    net = nn.ModuleDict({"a": act, "b": nn.Sequential(nn.Linear(2, 2), act)})
    calls: list[str] = []
    handle = act.register_forward_hook(lambda *_: calls.append("hook"))
    twin = Twin()
    widen(net, [], swaps=[ModuleSwap("b.1", twin)])
    assert net["a"] is net["b"][1] is twin
    assert not twin.training
    net["b"](torch.ones(1, 2))
    handle.remove()
    net["b"](torch.ones(1, 2))
    assert calls == ["hook"]


class OtherPReLU(nn.PReLU):
    pass


def test_swap_of_a_module_with_a_grown_parameter() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.PReLU(4))
    ema = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    old = net[1].weight.detach().clone()
    widen(net, [TensorEdit("1.weight", {0: MIDDLE}, (6,))], optimizers=[optimizer], also=[ema])
    widen(
        net,
        [TensorEdit("1.weight", {0: torch.arange(6)}, (7,))],
        swaps=[ModuleSwap("1", OtherPReLU(4))],
        attributes=[AttributeEdit("1", "num_parameters", 7)],
        optimizers=[optimizer],
        also=[ema],
    )
    assert type(net[1]) is type(ema[1]) is OtherPReLU
    assert torch.equal(net[1].weight[MIDDLE], old)
    assert ema[1].weight[MIDDLE].eq(0.25).all()
    assert net[1].num_parameters == ema[1].num_parameters == 7
    assert net[1].weight in set(optimizer.state)
    assert stages.stages_of(net[1], "weight")[0].tolist() == [0, 0, 1, 0, 1, 0, 2]
    weight = net[1].weight
    widen(net, [], swaps=[ModuleSwap("1", nn.PReLU(4))])
    assert net[1].weight is weight
    assert stages.stages_of(net[1], "weight")[0].tolist() == [0, 0, 1, 0, 1, 0, 2]


def test_swap_by_a_module_that_holds_the_old_one() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4)).eval()
    ema = copy.deepcopy(net)
    calls: list[str] = []
    net[0].register_forward_hook(lambda *_: calls.append("hook"))
    inner, theirs = net[0], ema[0]
    widen(
        net,
        [TensorEdit("0.weight", {1: torch.arange(2)}, (4, 3))],
        swaps=[ModuleSwap("0", nn.Sequential(inner, nn.Linear(4, 4)))],
        also=[ema],
    )
    assert net[0][0] is inner
    assert ema[0][0] is theirs
    assert inner.weight.shape == theirs.weight.shape == (4, 3)
    net(torch.ones(1, 3))
    assert calls == ["hook"]


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        (ModuleSwap("nothing", Twin()), "no submodule 'nothing'"),
        (ModuleSwap("", Twin()), "no submodule ''"),
        (ModuleSwap("norm", Twin()), "would be lost"),
    ],
)
def test_bad_swaps(swap: ModuleSwap, message: str) -> None:
    net = Net()
    before = everything(net)
    with pytest.raises(GrowthError, match=message):
        widen(net, net_edits(), swaps=[swap])
    assert everything(net) == before


@pytest.mark.parametrize(
    ("module", "attribute", "message"),
    [
        ("conv9", "out_channels", "no module 'conv9'"),
        ("conv1", "width", "no plain attribute 'width'"),
        ("conv1", "weight", "no plain attribute"),
        ("conv1", "forward", "no plain attribute"),
        ("", "conv1", "no plain attribute"),
    ],
)
def test_bad_attributes(module: str, attribute: str, message: str) -> None:
    net = Net()
    before = everything(net)
    with pytest.raises(GrowthError, match=message):
        widen(net, net_edits(), attributes=[AttributeEdit(module, attribute, 6)])
    assert everything(net) == before


def test_class_attributes_are_set_on_the_instance() -> None:
    class Sized(nn.Linear):
        heads = 4

    net = Sized(2, 4)
    widen(net, [], attributes=[AttributeEdit("", "heads", 6)])
    assert (net.heads, Sized.heads) == (6, 4)


def test_stage_by_default_one_more_than_the_newest_in_the_model() -> None:
    net = Net()
    widen(net, net_edits())
    widen(net, net_edits(torch.arange(6), 7))
    assert stages.stages_of(net.conv2, "weight")[1].tolist() == [0, 0, 1, 0, 1, 0, 2]
    assert stages.stages_of(net.norm, "running_var")[0].tolist() == [0, 0, 1, 0, 1, 0, 2]
    widen(net, net_edits(torch.arange(7), 8), stage=2)
    assert stages.newest_stage(net) == 2
    with pytest.raises(GrowthError, match="stage is -1"):
        widen(net, net_edits(torch.arange(8), 9), stage=-1)
