"""What `find_sites` finds, in networks written as people write them."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from nets import Branching, Gated, Plain, Residual, image_batch
from torch import nn

import fastgrow as fg


def producers_and_consumers(sites: fg.Sites) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    return {site.name: (site.producers, site.consumers) for site in sites}


def test_plain_chain() -> None:
    model = Plain().double()
    x, _ = image_batch()
    sites = fg.find_sites(model, x)
    assert producers_and_consumers(sites) == {
        "conv1": (("conv1",), ("conv2",)),
        "conv2": (("conv2",), ("fc1",)),
        "fc1": (("fc1",), ("fc2",)),
    }
    assert [site.width for site in sites] == [4, 5, 7]
    assert sites[0] is sites["conv1"]
    assert sites.frozen == {"fc2": "its output is the model's output"}
    assert list(sites.layers) == ["conv1", "conv2", "fc1", "fc2"]
    info = sites.layers["conv1"]
    assert (info.position, info.activation, info.activation_module, info.norm) == (0, "relu", "relu", None)
    assert sites.layers["conv2"].activation == "tanh"
    assert sites.layers["conv2"].activation_module is None
    assert sites.layers["fc2"].is_output


def test_residual_stream_is_one_site() -> None:
    x, _ = image_batch()
    sites = fg.find_sites(Residual().double(), x)
    assert producers_and_consumers(sites) == {
        "stem": (("stem", "a2"), ("a1", "down", "b1")),
        "a1": (("a1",), ("a2",)),
        "down": (("down", "b1"), ("head",)),
    }
    assert sites.layers["stem"].norm == "bn0"
    assert [norm.module for norm in sites["stem"].norms] == ["bn0", "bn2"]


def test_cat_depthwise_groups_transposed() -> None:
    x, _ = image_batch()
    sites = fg.find_sites(Branching().double(), x)
    assert producers_and_consumers(sites) == {
        "left": (("left",), ("point",)),
        "right": (("right",), ("point",)),
        "grouped": (("grouped",), ("after",)),
        "after": (("after",), ("up",)),
        "up": (("up",), ("out",)),
    }
    assert "depthwise" in sites["left"].layers
    assert (sites["grouped"].width, sites["grouped"].multiple, sites["grouped"].separate) == (6, 2, True)
    assert "point" in sites.frozen  # groups of GroupNorm and of the grouped convolution cut across it
    assert sites.frozen["out"] == "mean runs along it" or "output" in sites.frozen["out"]


def test_attention_and_gates() -> None:
    sites = fg.find_sites(Gated().double(), torch.randn(2, 5, 3, dtype=torch.float64))
    heads, mlp = sites["qkv"], sites["gate_up"]
    assert (heads.width, heads.multiple, heads.heads) == (2, 1, True)
    assert [(gate.layer, gate.part, gate.parts) for gate in heads.gates] == [("qkv", 0, 3), ("qkv", 1, 3)]
    assert (mlp.width, [(gate.part, gate.parts) for gate in mlp.gates]) == (5, [(0, 2)])
    assert set(sites["embed"].producers) == {"embed", "proj", "down"}


def test_the_model_is_left_as_it_was() -> None:
    model = Residual()
    x = torch.randn(1, 2, 8, 8)  # batch norm in training mode does not export at batch 1
    calls: list[str] = []
    handle = model.stem.register_forward_hook(lambda *_: calls.append("hook"))
    before = copy.deepcopy(model.state_dict())
    seed = torch.random.get_rng_state()
    fg.find_sites(model, x)
    assert not calls
    assert model.stem._forward_hooks
    handle.remove()
    assert all(module.training for module in model.modules())
    assert torch.equal(seed, torch.random.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_sites_hold_for_copies_and_both_modes() -> None:
    model = Residual().double()
    x, y = image_batch()
    sites = fg.find_sites(model.eval(), x)
    other = copy.deepcopy(model).train()
    report = fg.grow(other, {"stem": 2}, sites=sites, closure=lambda: nn.functional.cross_entropy(other(x), y))
    assert report.sites[0].new_width == 6
    assert sites["stem"].width == 4
    assert sites.widths(model)["stem"] == 4
    assert sites.widths(other)["stem"] == 6


def test_include_and_exclude() -> None:
    x, _ = image_batch()
    model = Plain().double()
    assert [site.name for site in fg.find_sites(model, x, include="conv*")] == ["conv1", "conv2"]
    sites = fg.find_sites(model, x, exclude=["conv1"])
    assert [site.name for site in sites] == ["conv2", "fc1"]
    assert "exclude" in sites.frozen["conv1"]
    with pytest.raises(fg.GrowthError, match="matches no site"):
        fg.find_sites(model, x, include="nothing*")


def test_names_that_are_no_site() -> None:
    x, _ = image_batch()
    sites = fg.find_sites(Residual().double(), x)
    with pytest.raises(fg.GrowthError, match="grows together with others: name their site, 'stem'"):
        sites["a2"]
    with pytest.raises(fg.GrowthError, match="output"):
        sites["head"]
    with pytest.raises(fg.GrowthError, match="no site is named 'nowhere'"):
        sites["nowhere"]


class Sized(nn.Module):
    """A width written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 5)
        self.third = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x)).view(-1, 6)
        return self.third(torch.relu(self.second(x)))


def test_a_width_written_into_the_code_is_found_on_trial() -> None:
    sites = fg.find_sites(Sized(), torch.randn(3, 4))
    assert [site.name for site in sites] == ["second"]
    assert "written into the code" in sites.frozen["first"]


class Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else x


def test_what_cannot_be_exported_says_why() -> None:
    with pytest.raises(fg.GrowthError, match="cannot be exported.*name the sites by hand"):
        fg.find_sites(Undecided(), torch.randn(2, 4))


def test_recurrent_layers_are_listed() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=True)
            self.fc = nn.Linear(6, 5)
            self.out = nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.fc(self.lstm(x)[0][:, -1])))

    sites = fg.find_sites(Recurrent(), torch.randn(2, 3, 4))
    assert [site.name for site in sites] == ["fc"]
    assert "recurrent" in sites.frozen["lstm"]


def test_a_hundred_layers_take_less_than_three_seconds_once_warm() -> None:
    layers: list[nn.Module] = []
    for _ in range(100):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 3))
    x = torch.randn(2, 8, 4, 4)
    fg.find_sites(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4))

    def seconds() -> float:
        started = time.process_time()
        assert len(fg.find_sites(model, x)) == 100
        return time.process_time() - started

    # a neighbour in the same caches makes a run longer, never shorter
    assert any(seconds() < 3.0 for _ in range(3))


class Undecided2(nn.Module):
    """Control flow that export cannot follow, around a plain chain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.pool, self.fc = nn.Conv2d(4, 5, 3), nn.AvgPool2d(2), nn.Linear(5 * 9, 3)
        self.act = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.abs().max() > 1e9:
            raise ValueError("too large")
        x = self.conv2(self.relu(self.bn(self.conv1(x))))
        return self.fc(self.pool(self.act(x)).flatten(1))


def test_sites_named_by_hand() -> None:
    torch.manual_seed(0)
    model = Undecided2().double()
    x, y = image_batch()
    with pytest.raises(fg.GrowthError, match="cannot be exported"):
        fg.find_sites(model, x)
    sites = fg.name_sites(model, x[:2], [["conv1", "bn", "relu", "conv2", "act", "pool", "fc"]])
    assert producers_and_consumers(sites) == {"conv1": (("conv1",), ("conv2",)), "conv2": (("conv2",), ("fc",))}
    before = nn.functional.cross_entropy(model(x), y).item()
    report = fg.grow(
        model, {"conv1": 2, "conv2": 1}, sites=sites, closure=lambda: nn.functional.cross_entropy(model(x), y)
    )
    assert nn.functional.cross_entropy(model(x), y).item() == pytest.approx(before, rel=1e-12)
    assert all(site.captured is not None and site.captured > 0.999 for site in report.sites)
    assert type(model.relu) is fg.nn.ReLU
    with pytest.raises(fg.GrowthError, match="'nothing' is no module"):
        fg.name_sites(model, x, [["conv1", "nothing", "conv2"]])
    with pytest.raises(fg.GrowthError, match="'conv2' stands in two chains"):
        fg.name_sites(model, x, [["conv1", "conv2"], ["conv2", "fc"]])


def test_width_of_a_grouped_transposed_convolution_counts_channels() -> None:
    up = nn.ConvTranspose1d(4, 8, 3, groups=2), nn.ConvTranspose1d(8, 6, 3, groups=2)
    model = nn.Sequential(up[0], nn.Tanh(), up[1], nn.Tanh(), nn.Conv1d(6, 3, 1))
    sites = fg.find_sites(model, torch.randn(2, 4, 5))
    assert (sites["0"].width, sites["0"].multiple) == (8, 2)
    fg.grow(model, {"0": 4, "2": 2}, fg.how.Random(), sites=sites)
    assert up[0].out_channels == up[1].in_channels == sites.widths(model)["0"] == 12
    assert up[1].out_channels == model[4].in_channels == sites.widths(model)["2"] == 8
