"""The optimizer steps of block_update.py and the norms of block_norms.py on a CPU: one compiled, threaded pass.

The loop is block_update_cpu.cpp, built at installation where a compiler is there and reached by ctypes, which
lets other Python threads run meanwhile. It shares the threads of torch, whose OpenMP library is loaded already.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "SCALARS",
    "BlockTable",
    "adam",
    "avagrad",
    "block_norms",
    "eta_norms",
    "is_supported",
    "launch_finish",
    "missing",
    "sgd",
]

SCALARS = 5  # per block: rate, weight decay, and three that depend on the method
CHUNK = 1 << 14  # elements: what one thread takes at a time, and whose sums are taken apart
_STRIP = 1024  # elements stepped together, as in the compiled file
_SHORT = 64  # columns: what beginning a run costs, in columns of a pass over a strip for one block more
_POINTERS = 5
_INTERFACE = 1  # of the compiled file; another one's tables lie otherwise
_EXTENSION = "fastgrow.kernels._block_update_cpu"
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


class _Table(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pointers", "tensors", "bands", "runs", "ids", "chunks")),
        ("chunk_count", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("scalars", "ratio", "sums", "eta")),
    ]


@cache
def _library() -> ctypes.CDLL | str:
    """The compiled loop, or why there is none."""
    spec = importlib.util.find_spec(_EXTENSION)
    if spec is None or spec.origin is None:
        return "the compiled loop for CPUs is not built (a C++ compiler was missing when fastgrow was installed)"
    try:
        library = ctypes.CDLL(spec.origin)
        interface = library.block_update_interface
    except (OSError, AttributeError) as error:
        return f"the compiled loop for CPUs does not load ({error})"
    interface.restype = ctypes.c_int64
    if interface() != _INTERFACE:
        return "the compiled loop for CPUs was built from another version's source; install fastgrow anew"
    for name, flags in (("sgd", 4), ("adam", 4), ("avagrad", 2), ("etas", 0), ("norms", 0)):
        step = getattr(library, f"block_update_{name}")
        step.argtypes = [ctypes.POINTER(_Table), ctypes.c_int32, *[ctypes.c_bool] * flags]
        step.restype = None
    library.block_update_finish.argtypes = [ctypes.POINTER(_Table), *[ctypes.c_void_p] * 6]
    library.block_update_finish.restype = None
    return library


def missing() -> str | None:
    """Why the compiled loop cannot run on this machine; None if it can."""
    library = _library()
    return library if isinstance(library, str) else None


def is_supported(tensor: Tensor) -> bool:
    """Whether the loop takes a tensor's dtype and size; it must be dense in memory besides."""
    return tensor.dtype in _DTYPES and tensor.numel() > 0


class BlockTable:
    """Where the blocks of many tensors of one dtype lie, run by run; the arguments are those of block_norms.py's.

    tensors: dense, any rank, read as matrices (A, B) over their memory; blocks: per tensor, (A,) and (B,)
    int64, element (a, b) belonging to block max(rows[a], columns[b]), counting from 0; counts: per tensor,
    the elements of each block. The addresses are read anew by `bind`, for tensors laid out like these.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        blocks: Sequence[tuple[Tensor, Tensor]],
        counts: Sequence[Sequence[int]],
    ) -> None:
        library = _library()
        if isinstance(library, str):
            raise RuntimeError(library)
        self.library = library
        self.device, self.dtype, self.acc = torch.device("cpu"), tensors[0].dtype, torch.float64
        places: list[list[int]] = []  # B, the tensor's first band, its first block
        bands: list[list[int]] = []
        runs: list[list[int]] = []
        ids: list[Tensor] = []
        chunks: list[list[int]] = []
        base, sums, before = 0, 0, 0
        for number, (tensor, (rows, columns), count) in enumerate(zip(tensors, blocks, counts, strict=True)):
            width, total = columns.numel(), tensor.numel()
            if rows.numel() * width != total or not is_supported(tensor):
                raise ValueError(
                    f"tensor {number} of shape {tuple(tensor.shape)}, {tensor.dtype}, is no matrix of "
                    f"{rows.numel()} x {width} elements that the loop takes"
                )
            places.append([width, len(bands), base])
            met: dict[int, list[int]] = {}
            for stop, row in _runs(rows):
                if row not in met:
                    here = columns.clamp(min=row)
                    first, found = len(runs), _runs(here)
                    runs += found
                    met[row] = [first, len(runs), -1, 0, 0]
                    low, high = int(here.min()), int(here.max())
                    if width * (high - low) < _SHORT * (len(found) - 1):
                        met[row][2:] = [sum(map(len, ids)), low, high]
                        ids.append(here.repeat(2 + _STRIP // width)[: width + _STRIP])
                bands.append([stop * width, *met[row]])
            for start in range(0, total, CHUNK):
                stop = min(total, start + CHUNK)
                chunks.append([number, start, stop, sums, before])
                sums += len(count)
                before += stop - start
            base += len(count)
        places.append([0, len(bands), base])
        self.bases = [line[2] for line in places]
        self.strides = [tensor.stride() for tensor in tensors]
        self.counts = torch.tensor([n for count in counts for n in count], dtype=self.acc)
        self.partial = torch.zeros(sums, dtype=self.acc)
        first, second, third, last = (torch.tensor(of, dtype=torch.int64) for of in (places, bands, runs, chunks))
        short = torch.cat([torch.zeros(0, dtype=torch.int32), *ids]).to(torch.int32)
        self._tables = [first, second, third, short, last]
        self._pointers = torch.zeros(0, dtype=torch.int64)
        self._addresses: list[list[int]] = []

    @property
    def total(self) -> int:
        """Blocks of all tensors together."""
        return self.bases[-1]

    def bind(self, columns: Sequence[Sequence[Tensor]]) -> None:
        """Take the addresses of up to five lists of tensors, each laid out like the table's own."""
        empty = [0] * (_POINTERS - len(columns))
        addresses = [[tensor.data_ptr() for tensor in line] + empty for line in zip(*columns, strict=True)]
        if addresses != self._addresses:
            self._addresses, self._pointers = addresses, torch.tensor(addresses, dtype=torch.int64)

    def launch(
        self,
        name: str,
        *flags: bool,
        scalars: Tensor | None = None,
        ratio: Tensor | None = None,
        eta: Tensor | None = None,
    ) -> None:
        """Call a loop of the library over all chunks, with as many threads as torch takes."""
        step: Callable[..., None] = getattr(self.library, f"block_update_{name}")
        step(ctypes.byref(self.structure(scalars, ratio, eta)), _DTYPES[self.dtype], *flags)

    def structure(self, scalars: Tensor | None = None, ratio: Tensor | None = None, eta: Tensor | None = None) -> Any:
        """The tables as the library reads them; float64 (total * 5 + 4,), (total,), and like `partial`."""
        first = [table.data_ptr() for table in (self._pointers, *self._tables)]
        last = [None if one is None else one.data_ptr() for one in (scalars, ratio, self.partial, eta)]
        return _Table(*first, len(self._tables[-1]), torch.get_num_threads(), *last)


def _runs(blocks: Tensor) -> list[list[int]]:
    """[[end, block], ...] of the runs of equal blocks, (n,) int64."""
    values, lengths = torch.unique_consecutive(blocks, return_counts=True)
    return torch.stack([lengths.cumsum(0), values], 1).tolist()


def block_norms(
    table: BlockTable,
    out: Tensor,
    ratio: Tensor | None = None,
    waiting: Tensor | None = None,
    adapt: Tensor | None = None,
) -> None:
    """||W_dk||_F^2 of every block of the table's first column, into `out` (table.total,) float64.

    ratio, waiting, adapt: as in block_norms.py, the first two in float64.
    """
    table.launch("norms")
    launch_finish(table, table.partial, out, ratio, waiting, adapt)


def launch_finish(
    table: BlockTable,
    partial: Tensor,
    sums: Tensor,
    ratio: Tensor | None = None,
    waiting: Tensor | None = None,
    adapt: Tensor | None = None,
) -> None:
    """Add a table's partial sums up, chunk after chunk; with `ratio`, work out the learning-rate ratios too."""
    given = [None if one is None else one.data_ptr() for one in (partial, table.counts, sums, ratio, waiting, adapt)]
    table.library.block_update_finish(ctypes.byref(table.structure()), *given)


def eta_norms(table: BlockTable, scalars: Tensor, eta: Tensor, out: Tensor) -> None:
    """The sum of eta_t^2 over every block, as a step of `avagrad` rounds it, into `out` (table.total,) float64."""
    table.launch("etas", scalars=scalars, ratio=out, eta=eta)
    launch_finish(table, eta, out)


def sgd(
    table: BlockTable,
    scalars: Tensor,
    ratio: Tensor,
    *,
    momentum: bool,
    nesterov: bool,
    maximize: bool,
    norms: bool,
) -> None:
    """`block_update.sgd` on a CPU; scalars and ratio in float64, partial sums of squares into table.partial."""
    table.launch("sgd", momentum, nesterov, maximize, norms, scalars=scalars, ratio=ratio)


def adam(
    table: BlockTable,
    scalars: Tensor,
    ratio: Tensor,
    *,
    amsgrad: bool,
    decoupled: bool,
    maximize: bool,
    norms: bool,
) -> None:
    """`block_update.adam` on a CPU; scalars and ratio in float64."""
    table.launch("adam", amsgrad, decoupled, maximize, norms, scalars=scalars, ratio=ratio)


def avagrad(
    table: BlockTable,
    scalars: Tensor,
    ratio: Tensor,
    eta: Tensor,
    *,
    maximize: bool,
    norms: bool,
) -> None:
    """`block_update.avagrad` on a CPU; scalars, ratio and eta in float64."""
    table.launch("avagrad", maximize, norms, scalars=scalars, ratio=ratio, eta=eta)
