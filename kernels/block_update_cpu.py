"""The optimizer steps of block_update.py and the norms of block_norms.py on a CPU: one compiled, threaded pass.

The loop is block_update_cpu.cpp, built at installation where a compiler is there and reached by ctypes, which
lets other Python threads run meanwhile. It shares the threads of torch, whose OpenMP library is loaded already.
"""

from __future__ import annotations

import ctypes
import importlib.util
from array import array
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from . import block_table
from .block_table import POINTERS

__all__ = ["BlockTable", "missing"]

CHUNK = 1 << 14  # elements: what one thread takes at a time, and whose sums are taken apart
_STRIP = 1024  # elements stepped together, as in the compiled file
_SHORT = 64  # columns: what beginning a run costs, in columns of a pass over a strip for one block more
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


class BlockTable(block_table.BlockTable):
    """The tables in a CPU's memory; the steps are the compiled loop's, a chunk of a tensor at a time."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        blocks: Sequence[tuple[Tensor, Tensor]],
        counts: Sequence[Sequence[int]],
    ) -> None:
        super().__init__(tensors, blocks, counts, torch.float64)
        library = _library()
        if isinstance(library, str):
            raise RuntimeError(library)
        self._library = library
        places: list[list[int]] = []  # B, the tensor's first band, its first block
        bands: list[list[int]] = []
        runs: list[list[int]] = []
        ids: list[Tensor] = []
        chunks: list[list[int]] = []
        sums, before = 0, 0
        for number, (tensor, (rows, columns), count) in enumerate(zip(tensors, blocks, counts, strict=True)):
            width, total = columns.numel(), tensor.numel()
            places.append([width, len(bands), self.bases[number]])
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
        places.append([0, len(bands), self.total])
        self.partial = torch.zeros(sums, dtype=self.acc, device="cpu")
        numbers = [torch.tensor(of, dtype=torch.int64, device="cpu") for of in (places, bands, runs, chunks)]
        short = torch.cat([torch.zeros(0, dtype=torch.int32, device="cpu"), *ids]).to(torch.int32)
        self._tables = [*numbers[:3], short, numbers[3]]  # alive as long as the library reads them
        self._pointers = array("q", bytes(8 * POINTERS * len(tensors)))
        self._structure = _Table(
            self._pointers.buffer_info()[0],
            *(one.data_ptr() for one in self._tables),
            len(chunks),
            sums=self.partial.data_ptr(),
        )
        self._reference = ctypes.byref(self._structure)

    @staticmethod
    def is_supported(tensor: Tensor) -> bool:
        return tensor.dtype in _DTYPES and tensor.numel() > 0

    def _take(self, addresses: list[int]) -> None:
        self._pointers[:] = array("q", addresses)  # in place: the library knows where they stand

    def launch(
        self,
        name: str,
        options: dict[str, bool] | None = None,
        scalars: Tensor | None = None,
        ratio: Tensor | None = None,
        eta: Tensor | None = None,
    ) -> None:
        table = self._structure
        table.threads = torch.get_num_threads()
        table.scalars, table.ratio, table.eta = _address(scalars), _address(ratio), _address(eta)
        step: Callable[..., None] = getattr(self._library, f"block_update_{name}")
        step(self._reference, _DTYPES[self.dtype], *(options or {}).values())

    def finish(
        self,
        partial: Tensor,
        sums: Tensor,
        ratio: Tensor | None = None,
        waiting: Tensor | None = None,
        adapt: Tensor | None = None,
    ) -> None:
        given = map(_address, (partial, self.counts, sums, ratio, waiting, adapt))
        self._library.block_update_finish(self._reference, *given)

    def eta_norms(self, scalars: Tensor, eta: Tensor, out: Tensor, etas: Callable[[], Sequence[Tensor]]) -> None:
        self.launch("etas", scalars=scalars, ratio=out, eta=eta)
        self.finish(eta, out)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _runs(blocks: Tensor) -> list[list[int]]:
    """[[end, block], ...] of the runs of equal blocks, (n,) int64."""
    values, lengths = torch.unique_consecutive(blocks, return_counts=True)
    return torch.stack([lengths.cumsum(0), values], 1).tolist()
