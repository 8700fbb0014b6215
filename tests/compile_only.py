"""Compiles every kernel ahead of time for GPUs that are not here, and prints what the compiler made of each.

Runs in a process of its own, without TRITON_INTERPRET: one JSON object per line.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import triton
from compile_specs import specs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SPECS = specs()


@dataclass
class Row:
    name: str
    arch: str
    tensor_cores: bool
    shared: int
    registers: int = 0
    stack: int = 0  # spilled registers lie here
    local: int = 0
    instructions: dict[str, int] = field(default_factory=dict)


def build(index: int, arch: str) -> Row:
    """Compile one kernel for one architecture and read its resources off the binary."""
    spec = SPECS[index]
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)
    names = spec.kernel.arg_names
    constants = {**spec.constants, **dict.fromkeys(spec.ones, 1)}
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + spec.types[name]
        else:
            signature[name] = spec.types.get(name, "i32")
    aligned = [
        (i,) for i, name in enumerate(names) if signature[name][0] == "*" or (signature[name] == "i32" and not spec.odd)
    ]
    source = ASTSource(
        spec.kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {key: [["tt.divisibility", 16]] for key in aligned},
    )
    stages = min(spec.stages, 2) if amd else spec.stages  # as conv_growth.stages_for
    compiled = triton.compile(source, target, dict(num_warps=spec.warps, num_stages=stages))
    row = Row(spec.name, arch, spec.tensor_cores, compiled.metadata.shared)
    if amd:
        code = compiled.asm["amdgcn"]
        row.instructions = {"MMA": len(re.findall(r"v_mfma", code))}
        row.stack = int(re.search(r"\.private_segment_fixed_size: (\d+)", code).group(1))
        return row
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage = _dump("--dump-resource-usage", binary.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
        row.registers, row.stack, row.local = (int(number) for number in found)
        if spec.tensor_cores:  # the disassembler takes longer than the compiler
            sass = _dump("-sass", binary.name)
            patterns = {"MMA": r"\b(?:HMMA|HGMMA|UTC\w*MMA)", "copies": r"\bLDGSTS"}
            row.instructions = {name: len(re.findall(pattern, sass)) for name, pattern in patterns.items()}
    return row


def _dump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def main() -> None:
    work = [(i, arch) for i, spec in enumerate(SPECS) for arch in spec.archs]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        for row in pool.map(build, *zip(*work, strict=True)):
            print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
