"""FSDP2: two gloo processes with sharded parameters grow the network that one process grows on the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gloo import WORLD, assert_same_bits, assert_within, found_by, joined
from tolerances import tolerance
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow.distributed import replicas_of
from fastgrow.sharded import is_sharded, reshard, whole

if dist.is_available() and dist.is_gloo_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, Shard
else:
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)

STEPS = 2
BATCH = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.relu, self.down = nn.LayerNorm(5), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks to wrap one by one, and layers of the root's own; 7 and 5 do not divide by two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 5)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.mid, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.mid(x)))


class Convs(nn.Module):
    """Sites that share weights, a middle with parameters, signed pairs, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.norm, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.PReLU(4)
        self.depth = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.c2 = nn.Conv2d(4, 4, 3, stride=2)
        self.f, self.out = nn.Linear(4 * 9, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.c2(self.depth(self.relu(self.norm(self.c1(x))))))
        return self.out(F.relu(self.f(x.flatten(1))))


class Gated(nn.Module):
    """A gated MLP behind an RMSNorm; the scale is the weight of a layer of its own, used by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(6)
        self.gate, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.first, self.second = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = self.down(F.silu(self.gate(x)) * self.up(x))
        return x + F.linear(torch.tanh(F.linear(x, self.first)), self.second)


def data(kind: type[nn.Module]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (2, 8, 8) if kind is Convs else (6,)
    x = torch.randn(BATCH, *shape, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (BATCH,), generator=generator)


def part(rank: int | None) -> slice:
    return slice(None) if rank is None else slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)


def made(kind: type[nn.Module], rank: int | None, shape: tuple[int, ...] = (WORLD,), **options: Any) -> Any:
    """A model as people wrap it: every block, then the root."""
    torch.manual_seed(0)
    model = kind().double()
    if rank is not None:
        names = ("replicas", "shards")[2 - len(shape) :]
        options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for block in getattr(model, "blocks", ()):
            fully_shard(block, **options)
        fully_shard(model, **options)
    return model


def train(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, steps: int = STEPS) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def full(model: nn.Module, optimizer: Any = None) -> dict[str, Tensor]:
    reshard(model)
    found = {name: whole(tensor.detach()).clone() for name, tensor in model.named_parameters()}
    for name, parameter in model.named_parameters() if optimizer is not None else ():
        entries = optimizer.state[parameter].items()
        found |= {f"{name}.{entry}": whole(value).clone() for entry, value in entries if isinstance(value, Tensor)}
    return found


def grown(
    kind: type[nn.Module],
    rank: int | None,
    units: dict[str, int],
    how: fg.how.How | None = None,
    optimizer: Callable[..., Any] = torch.optim.AdamW,
    **options: Any,
) -> dict[str, Tensor]:
    """Trained, grown, trained on."""
    x, y = (tensor[part(rank)] for tensor in data(kind))
    model = made(kind, rank, **options)
    using = optimizer(model.parameters(), lr=1e-2)
    train(model, using, x, y)
    before = model(x)
    fg.grow(model, units, how, optimizer=using, closure=lambda: F.cross_entropy(model(x), y))
    if how is None:
        assert torch.allclose(model(x), before, rtol=1e-12, atol=1e-12)
    train(model, using, x, y)
    return full(model, using)


def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def blocks(rank: int | None) -> dict[str, Tensor]:
    return grown(Net, rank, {"blocks.0.up": 2, "mid": 2, "blocks.1.up": 1})


def convolutions(rank: int | None) -> dict[str, Tensor]:
    """c1 and c2 grow the same weight, f reads what c2 writes."""
    return grown(Convs, rank, {"c1": 2, "c2": 2, "f": 2}, optimizer=momentum)


def copied_units(rank: int | None) -> dict[str, Tensor]:
    """A method that changes present values and sees the sites before it grown."""
    return grown(Convs, rank, {"c2": 2, "f": 2}, fg.how.Net2Net(noise=0.0), optimizer=torch.optim.Adagrad)


def replicated(rank: int | None) -> dict[str, Tensor]:
    return grown(Net, rank, {"blocks.0.up": 2, "mid": 2}, shape=(WORLD, 1))


def gates(rank: int | None) -> dict[str, Tensor]:
    """Solved on rank 0 with the batches of all; the gates are random."""
    x, y = (tensor[part(rank)] for tensor in data(Gated))
    model = made(Gated, rank)
    sites = fg.find_sites(model, x)
    torch.manual_seed(7 if not rank else 8)
    fg.grow(model, {"gate": 2, "first": 2}, sites=sites, closure=lambda: F.cross_entropy(model(x), y))
    return full(model)


def natural(rank: int | None) -> dict[str, Tensor]:
    """TINY reads the present weights of the site it solves."""
    return grown(Convs, rank, {"c2": 1}, fg.how.TINY(), optimizer=momentum)


def in_a_loop(rank: int | None) -> dict[str, Tensor]:
    x, y = (tensor[part(rank)] for tensor in data(Net))
    model = made(Net, rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grower = fg.Grower(
        model,
        optimizer,
        example_inputs=x,
        when=fg.when.Every(2, times=2),
        where=fg.where.NAGN(threshold=0.0, max_new=2),
    )
    for _ in range(5):
        with grower.observe():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
    assert len(grower.history) == 2
    return full(model, optimizer)


def observed(rank: int | None) -> dict[str, Tensor]:
    """Ranks with batches of different sizes: every sample counts the same."""
    x, y = (tensor[{None: slice(None), 0: slice(0, 4), 1: slice(4, None)}[rank]] for tensor in data(Net))
    model = made(Net, rank)
    sites = fg.find_sites(model, x)
    with fg.observe(model, sites, growth=["blocks.0.up", "mid"], rank=2) as seen:
        F.cross_entropy(model(x), y).backward()
    assert seen.samples == BATCH
    values = {f"{name}.values": one.values for name, one in seen.directions(2).items()}
    return {**values, **{f"{name}.nagn": torch.tensor(value) for name, value in seen.nagn.items()}}


def partly_wrapped(rank: int | None) -> dict[str, Tensor]:
    """Only the blocks are sharded; the root's own layers are frozen, and stay so."""
    x, y = (tensor[part(rank)] for tensor in data(Net))
    torch.manual_seed(0)
    model = Net().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("blocks") and name != "blocks.0.up.bias")
    for block in model.blocks if rank is not None else ():
        fully_shard(block, mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer, x, y)
    fg.grow(model, {"blocks.0.up": 2, "mid": 2}, optimizer=optimizer, closure=lambda: F.cross_entropy(model(x), y))
    train(model, optimizer, x, y)
    assert not model.blocks[0].up.bias.requires_grad
    assert not model.mid.weight.requires_grad
    return full(model)


COMPARED: dict[str, Callable[[int | None], dict[str, Tensor]]] = {
    "blocks": blocks,
    "convolutions": convolutions,
    "copied_units": copied_units,
    "replicated": replicated,
    "gates": gates,
    "natural": natural,
    "in_a_loop": in_a_loop,
    "observed": observed,
    "partly_wrapped": partly_wrapped,
}


def gathers(rank: int) -> dict[str, Tensor]:
    """Growing a site gathers its own parameters and their optimizer states, and no others; shards stay shards."""
    x, y = (tensor[part(rank)] for tensor in data(Net))
    model = made(Net, rank)
    sites = fg.find_sites(model, x)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, x, y)
    mine = {slot.tensor for slot in sites["blocks.0.up"].slots}
    others = {name: parameter for name, parameter in model.named_parameters() if name not in mine}
    seen: list[str] = []
    gather = DTensor.full_tensor

    def counted(self: DTensor, **options: Any) -> Tensor:
        seen.append(f"{tuple(self.shape)}")
        return gather(self, **options)

    with mock.patch.object(DTensor, "full_tensor", counted):
        fg.grow(model, {"blocks.0.up": 2}, fg.how.Random(), sites=sites, optimizer=optimizer)
    # Each tensor for its start, its edit and its enlargement; its gradient and its two moments once each.
    own = dict(model.named_parameters())
    assert mine <= own.keys()
    assert set(seen) == {"(7, 5)", "(5, 7)", "(7,)"}
    assert len(seen) == 3 * 6, seen
    for name, parameter in own.items():
        if name in others:
            assert parameter is others[name]
        assert is_sharded(parameter)
        assert parameter.placements == (Shard(0),)
        assert parameter.to_local().numel() < parameter.numel()
        assert optimizer.state[parameter]["exp_avg"].placements == (Shard(0),)
    return full(model)


def in_bfloat16(rank: int) -> dict[str, Tensor]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    x, y = (tensor[part(rank)] for tensor in data(Net))
    torch.manual_seed(0)
    model = Net()
    for block in model.blocks:
        fully_shard(block, mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=policy)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = x.float()
    train(model, optimizer, x, y)
    before = model(x)
    assert before.dtype == torch.bfloat16
    gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters() if is_sharded(p)}
    fg.grow(model, {"blocks.0.up": 2}, optimizer=optimizer, closure=lambda: F.cross_entropy(model(x).float(), y))
    for name, parameter in model.named_parameters():
        old = gradients.get(name, torch.zeros(()))
        if old.dim():
            found = whole(parameter.grad)
            assert torch.equal(found[tuple(slice(extent) for extent in old.shape)], old)
            assert found.square().sum() == old.square().sum()
    assert torch.equal(model(x), before)
    train(model, optimizer, x, y)
    found = full(model, optimizer)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert found["blocks.0.down.weight"][:, -2:].count_nonzero()
    assert found["blocks.0.up.weight"][-2:].count_nonzero()
    return found


def unchanged(model: nn.Module, before: dict[str, Any], wanted: str, call: Callable[[], Any]) -> None:
    with pytest.raises(fg.GrowthError, match=wanted):
        call()
    reshard(model)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def refusals(rank: int) -> dict[str, Tensor]:
    x, y = (tensor[part(rank)] for tensor in data(Net))
    model = made(Net, rank)
    sites = fg.find_sites(model, x)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, x, y)
    reshard(model)
    objects = dict(model.named_parameters())
    up = {"blocks.0.up": 2, "mid": 2}

    def growing(how: fg.how.How | None = None, inputs: Tensor = x, using: Any = optimizer) -> Callable[[], Any]:
        return lambda: fg.grow(
            model, up, how, sites=sites, optimizer=using, closure=lambda: F.cross_entropy(model(inputs), y)
        )

    wanted = "not finite" if rank else "rank 1 could not grow"
    unchanged(model, objects, wanted, growing(inputs=torch.full_like(x, torch.nan) if rank else x))
    unchanged(model, objects, "tries growth on the model itself", growing(fg.how.Firefly()))
    unchanged(model, objects, "is sharded", growing(fg.how.Random(), using=fg.optim.SGD(model.parameters(), lr=0.1)))
    # The second site fails: the first is taken back.
    carried, calls = fg.grow.__globals__["widen"], []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise fg.GrowthError("the second site")
        return carried(*args, **options)

    with mock.patch.dict(fg.grow.__globals__, widen=failing):
        unchanged(model, objects, "the second site", growing())
    assert sites.widths(model)["blocks.0.up"] == 7
    with mock.patch.object(fully_shard, "state", return_value=object()):
        unchanged(model, objects, "fg.save the model on all ranks", growing(fg.how.Random()))
    # Gradients that every rank still holds for itself.
    model.set_requires_gradient_sync(False)
    F.cross_entropy(model(x), y).backward()
    unchanged(model, objects, "no rank has reduced yet", growing(fg.how.Random()))
    model.set_requires_gradient_sync(True)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    # Shards of dimension 1 are of one size.
    across = made(Convs, rank, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 and p.shape[1] == 6 else None)
    frames, _ = data(Convs)
    with pytest.raises(fg.GrowthError, match="divides over 2 ranks"):
        fg.grow(across, {"f": 1}, fg.how.ZeroOutgoing(), sites=fg.find_sites(across, frames))
    fg.grow(across, {"f": 2}, fg.how.ZeroOutgoing(), sites=fg.find_sites(across, frames))
    assert across.out.weight.placements == (Shard(1),)
    across(frames)
    train(model, optimizer, x, y)
    return full(model, optimizer)


def saved(rank: int, folder: Path) -> dict[str, Tensor]:
    """The file is that of a model that was never sharded; a resumed run goes on bit for bit, sharded or not."""
    x, y = (tensor[part(rank)] for tensor in data(Net))
    model = made(Net, rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, x, y)
    fg.grow(model, {"blocks.0.up": 2, "mid": 3}, optimizer=optimizer, closure=lambda: F.cross_entropy(model(x), y))
    train(model, optimizer, x, y)
    # What a torch that keeps its records otherwise is told to do: save, load, then wrap.
    with mock.patch.object(fully_shard, "state", return_value=object()):
        fg.save(folder / "grown.pt", model, optimizer)
    plain = made(Net, None)
    fg.load(folder / "grown.pt", plain)
    for name, value in full(model).items():
        assert torch.equal(value, plain.get_parameter(name))
    for block in plain.blocks:
        fully_shard(block, mesh=init_device_mesh("cpu", (WORLD,)))
    fully_shard(plain, mesh=init_device_mesh("cpu", (WORLD,)))
    assert torch.equal(plain(x), model(x))
    # Into a model that is wrapped already.
    other = made(Net, rank)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    fg.load(folder / "grown.pt", other, other_optimizer)
    for name, parameter in other.named_parameters():
        assert parameter.placements == other_optimizer.state[parameter]["exp_avg"].placements, name
    for one, using in ((model, optimizer), (other, other_optimizer)):
        train(one, using, x, y)
    expected, found = full(model, optimizer), full(other, other_optimizer)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    # torch's own loading still finds the parameters.
    other.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    train(other, other_optimizer, x, y, 1)
    # A file that does not fit leaves a wrapped seed as it was.
    seed = made(Net, rank)
    seed_optimizer = torch.optim.AdamW(seed.parameters(), lr=1e-2)
    objects = dict(seed.named_parameters())
    with mock.patch("fastgrow.checkpoint.laid_out", side_effect=RuntimeError("cut short")):
        unchanged(seed, objects, "cut short", lambda: fg.load(folder / "grown.pt", seed, seed_optimizer))
    train(seed, seed_optimizer, x, y)
    return found


def replaced_activation(rank: int) -> dict[str, Tensor]:
    """FSDP finds PReLU's weight in the module that has taken its place, and back again; a sharded copy follows."""
    x, y = (tensor[part(rank)] for tensor in data(Convs))
    model = made(Convs, rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = made(Convs, rank)
    ema(x)
    before = full(ema)
    report = fg.grow(model, {"c1": 2}, optimizer=optimizer, also=[ema], closure=lambda: F.cross_entropy(model(x), y))
    assert report.swapped == ["relu"]
    ema(x).sum().backward()
    for name, value in full(ema).items():
        assert value.shape == model.get_parameter(name).shape
        assert torch.equal(value[tuple(slice(extent) for extent in before[name].shape)], before[name])
    for _ in range(2):
        before = whole(model.relu.weight).clone()
        train(model, optimizer, x, y)
        reshard(model)
        assert is_sharded(model.relu.weight)
        assert not torch.equal(whole(model.relu.weight), before)
        fg.finalize(model)
        assert type(model.relu) is nn.PReLU
    assert replicas_of(model) is not None
    return full(model)


def worker(rank: int, folder: str) -> None:
    with joined(rank, folder) as path:
        results = {name: scenario(rank) for name, scenario in COMPARED.items()}
        for scenario in (gathers, in_bfloat16, refusals, replaced_activation):
            results[scenario.__name__] = scenario(rank)
        results["saved"] = saved(rank, path)
        torch.save(results, path / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[dict[str, dict[str, Tensor]]]]:
    yield from found_by(worker)


def test_both_ranks_hold_the_same_bits(ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    assert_same_bits(ranks)


@pytest.mark.parametrize("scenario", COMPARED)
def test_shards_grow_what_one_process_grows(ranks: list[dict[str, dict[str, Tensor]]], scenario: str) -> None:
    # Singular vectors move by the rounding over the relative gap; no gap of these nets is below 1e-3.
    relative = tolerance(torch.float64, 64 * BATCH) / 1e-3
    expected = COMPARED[scenario](None)
    assert ranks[0][scenario].keys() == expected.keys()
    assert_within(relative, ranks[0][scenario], expected)
