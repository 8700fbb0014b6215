"""The package as it is installed: its files, its command line, and life without Triton or a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from fastgrow.kernels import block_update_cpu
from torch import nn

from fastgrow.__main__ import main

ROOT = Path(__file__).parent.parent


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def factory() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 5))


def factory_with_inputs() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return factory(), (torch.zeros(2, 3, 4, 4),)


MODEL = factory()


def test_import_without_triton_and_without_a_gpu() -> None:
    out = python(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "torch.cuda._lazy_init = None\n"  # whoever asks for a GPU fails
        "import fastgrow as fg\n"
        "assert not torch.cuda.is_initialized()\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))\n"
        "x = torch.ones(5, 4)\n"
        "before = model(x)\n"
        "report = fg.grow(model, {'0': 2}, how=fg.how.GradMax(), closure=lambda: model(x).square().mean())\n"
        "assert model[0].weight.shape == (5, 4) and model[2].weight.shape == (2, 5)\n"
        "assert torch.allclose(model(x), before, atol=1e-6)\n"
        "print(float(fg.ops.sum_of_squares(torch.tensor([3.0, 4.0]))))\n"
        "try: fg.ops.sum_of_squares(torch.ones(2), backend='triton')\n"
        "except fg.GrowthError as error: print('refused' if 'not installed' in str(error) else error)\n"
    )
    assert out.split() == ["25.0", "refused"]


def test_import_makes_no_cuda_context_and_loads_no_optional_package() -> None:
    loaded = python(
        "import sys, fastgrow\n"
        "print(*[name for name in ('matplotlib', 'sklearn', 'rich', 'scipy') if name in sys.modules])\n"
    )
    assert loaded.split() == []


def test_wheel_holds_the_kernels_and_the_typing_marker(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fastgrow", "kernels", "tests", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    # what is packed counts here, and a stub is compiled in no time
    (source / "kernels" / "block_update_cpu.cpp").write_text('extern "C" int nothing() { return 0; }\n')
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"fastgrow-{version('fastgrow')}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    written = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
    expected = {name for name in written if name.startswith("fastgrow/")}
    expected |= {f"fastgrow/{name}" for name in written if name.startswith("kernels/")}
    assert "fastgrow/kernels/__init__.py" in expected
    more = {name for name in names if name.startswith("fastgrow/")} - expected - {"fastgrow/py.typed"}
    assert expected | {"fastgrow/py.typed"} <= names
    # the compiled loop, where a compiler is at hand, and not its source
    assert all(re.fullmatch(r"fastgrow/kernels/_block_update_cpu\.[\w.-]*(so|pyd)", name) for name in more)
    assert len(more) == 1 or not shutil.which(os.environ.get("CXX", "c++"))
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fastgrow", f"fastgrow-{version('fastgrow')}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_code_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, module in (
        ("conv1", nn.Conv2d(1, 4, 3)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(4, 3, 3)),
        ("relu2", nn.ReLU()),
        ("flatten", nn.Flatten()),
        ("head", nn.Linear(3 * 16, 2)),
    ):
        model.add_module(name, module)
    x, y = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 0, 1, 0, 1])
    names = {
        "model": model,
        "x": x,
        "y": y,
        "loader": [(x, y)],
        "epochs": 8,  # two windows of three make the first plateau
        "criterion": nn.functional.cross_entropy,
        "accuracy": lambda model: 0.5,
    }
    loop, call = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    exec(loop, names)
    history = names["grower"].history
    assert len(history) == 1
    assert (tmp_path / "growth.png").exists()
    assert not any(type(module).__module__.startswith("fastgrow") for module in model.modules())
    width = model.conv2.out_channels
    exec(call, names)
    assert model.conv2.out_channels == width + 8


def test_version_and_environment(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.split() == ["fastgrow", version("fastgrow")]
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if not line.startswith("device")}
    assert told["fastgrow"] == version("fastgrow")
    assert told["torch"].startswith(torch.__version__)
    (cpu,) = [line for line in lines if line.startswith("device cpu")]
    assert "torch" in cpu
    assert ("not built" in cpu) == (block_update_cpu.missing() is not None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["test_package:factory", "--input", "2x3x4x4"],
        ["test_package:factory_with_inputs"],
        ["test_package:MODEL", "--input", "2x3x4x4:float32"],
    ],
)
def test_sites_lists_what_can_grow(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert main(["sites", *arguments]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["site", "width", "multiple", "producers", "consumers"]
    assert rows[1] == ["0", "6", "1", "0", "3"]
    assert "1 sites can grow" in out
    assert "\n  3: " in out  # the output layer, and why it cannot


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "MODULE:FACTORY"),
        (["no_such_module:f"], "no_such_module"),
        (["torch.nn:NoSuchLayer"], "NoSuchLayer"),
        (["torch:get_num_threads"], "gives int"),
        (["torch.nn:Identity"], "--input"),
        (["torch.nn:Identity", "--input", "2,3"], "'2,3'"),
        (["torch.nn:Identity", "--input", "2x3:floaty"], "floaty"),
    ],
)
def test_sites_says_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", *arguments]) == 1
    assert message in capsys.readouterr().err
