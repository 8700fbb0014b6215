"""Optimizer steps with numbers of their own for every stage block: one interface over two memories.

`block_update.BlockTable` runs them on a GPU, `block_update_cpu.BlockTable` on a CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["POINTERS", "SCALARS", "BlockTable"]

POINTERS = 5  # of a tensor: parameter, gradient, moments
SCALARS = 5  # of a block: rate, weight decay, and three that depend on the method


class BlockTable(ABC):
    """Where the blocks of many tensors of one dtype and device lie, as tables on that device, and steps over them.

    tensors: dense, any rank, read as matrices (A, B) over their memory; blocks: per tensor, (A,) and (B,)
    int64, element (a, b) belonging to block max(rows[a], columns[b]), counting from 0; counts: per tensor,
    the elements of each block. The addresses are read anew by `bind`, for tensors laid out like these.
    Everything that is added up or multiplied with is in `acc`: float64 for float64 tensors and on a CPU,
    float32 otherwise. Orders of addition depend on shapes alone.
    """

    partial: Tensor  # sums over each block of each piece that one program or thread takes

    def __init__(
        self,
        tensors: Sequence[Tensor],
        blocks: Sequence[tuple[Tensor, Tensor]],
        counts: Sequence[Sequence[int]],
        acc: torch.dtype,
    ) -> None:
        for number, (tensor, (rows, columns)) in enumerate(zip(tensors, blocks, strict=True)):
            if rows.numel() * columns.numel() != tensor.numel() or not self.is_supported(tensor):
                raise ValueError(
                    f"tensor {number} of shape {tuple(tensor.shape)}, {tensor.dtype}, is no matrix of "
                    f"{rows.numel()} x {columns.numel()} elements that the kernels take"
                )
        self.device, self.dtype, self.acc = tensors[0].device, tensors[0].dtype, acc
        self.bases = [0]  # the first block of each tensor, and the end
        for count in counts:
            self.bases.append(self.bases[-1] + len(count))
        self.strides = [tensor.stride() for tensor in tensors]
        self.counts = torch.tensor([n for count in counts for n in count], dtype=acc, device="cpu").to(self.device)
        self._addresses: list[int] = []

    @staticmethod
    @abstractmethod
    def is_supported(tensor: Tensor) -> bool:
        """Whether the kernels take a tensor's dtype and size; it must be dense in memory besides."""

    @property
    def total(self) -> int:
        """Blocks of all tensors together."""
        return self.bases[-1]

    def bind(self, columns: Sequence[Sequence[Tensor]]) -> None:
        """Take the addresses of up to five lists of tensors, each laid out like the table's own."""
        addresses = [0] * (POINTERS * len(self.strides))
        for at, tensors in enumerate(columns):
            addresses[at::POINTERS] = [tensor.data_ptr() for tensor in tensors]
        if addresses != self._addresses:
            self._addresses = addresses
            self._take(addresses)

    def bound(self, column: int) -> list[int]:
        """The addresses that `bind` took last of one list of tensors."""
        return self._addresses[column::POINTERS]

    def norms(
        self,
        out: Tensor,
        ratio: Tensor | None = None,
        waiting: Tensor | None = None,
        adapt: Tensor | None = None,
    ) -> None:
        """||W_dk||_F^2 of every block of the first list of tensors, into `out`.

        out: (total,) in `acc`. With `ratio` (same shape) also ||W_dk||_F / ||W_d0||_F, 1 for block 0, for
        tensors whose `adapt` (T,) int32 is 0 and for blocks that `waiting` (total,) marks (2: if it is zero); a
        block leaves that mark when its norm per element reaches block 0's.
        """
        self.launch("norms")
        self.finish(self.partial, out, ratio, waiting, adapt)

    def eta_norms(self, scalars: Tensor, eta: Tensor, out: Tensor, etas: Callable[[], Sequence[Tensor]]) -> None:
        """The sum of eta_t^2 over every block, of the second moments as they are, into `out` (total,).

        scalars, eta: as in `avagrad`; etas: gives the tensors eta_t, where no kernel works them out.
        """
        held, tensors = self._addresses, etas()
        self.bind([tensors])
        self.norms(out)
        self._addresses = held
        self._take(held)

    def sgd(
        self, scalars: Tensor, ratio: Tensor, *, momentum: bool, nesterov: bool, maximize: bool, norms: bool
    ) -> None:
        """g = G + decay W; m = mu m + gain g; W -= rate ratio (g + mu m if nesterov else m), block by block.

        Bound to [parameters, gradients] and, with momentum, the buffers. scalars: (total * 5 + 4,): per block
        rate, decay, gain, two unused; then mu. ratio: (total,). With `norms` the partial sums of the new
        ||W_dk||^2 are left in `partial`, for `finish`.
        """
        options = {"momentum": momentum, "nesterov": nesterov, "maximize": maximize, "norms": norms}
        self.launch("sgd", options, scalars, ratio)

    def adam(
        self, scalars: Tensor, ratio: Tensor, *, amsgrad: bool, decoupled: bool, maximize: bool, norms: bool
    ) -> None:
        """Adam with the age t of each block: W -= rate ratio / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps).

        Bound to [parameters, gradients, first, second moments] and, with amsgrad, the maxima. scalars:
        (total * 5 + 4,): per block rate, decay, 1 - beta1^t, sqrt(1 - beta2^t), unused; then 1 - beta1, beta2,
        1 - beta2, eps. The decoupled decay is rate ratio decay W: the block's rate, as for its gradient.
        """
        options = {"amsgrad": amsgrad, "decoupled": decoupled, "maximize": maximize, "norms": norms}
        self.launch("adam", options, scalars, ratio)

    def avagrad(self, scalars: Tensor, ratio: Tensor, eta: Tensor, *, maximize: bool, norms: bool) -> None:
        """AvaGrad: W -= rate ratio m eta_t / (1 - beta1^t), 1 / eta_t = sqrt(v_{t-1} / (1 - beta2^{t-1})) + eps.

        Bound to [parameters, gradients, first, second moments]. scalars: (total * 5 + 4,): per block rate,
        decay, 1 - beta1^t, sqrt(1 - beta2^{t-1}) (1 at t = 1), sqrt(1 - beta2^t); then 1 - beta1, beta2,
        1 - beta2, eps. ratio: (total,), the normaliser sqrt(d) / ||eta_t|| included. eta: like `partial`,
        zeros at first; receives the partial sums of eta_{t+1}^2, for `finish`.
        """
        self.launch("avagrad", {"maximize": maximize, "norms": norms}, scalars, ratio, eta)

    @abstractmethod
    def launch(
        self,
        name: str,
        options: dict[str, bool] | None = None,
        scalars: Tensor | None = None,
        ratio: Tensor | None = None,
        eta: Tensor | None = None,
    ) -> None:
        """Run one kernel over all bound tensors; the arguments are those of the method of that name."""

    @abstractmethod
    def finish(
        self,
        partial: Tensor,
        sums: Tensor,
        ratio: Tensor | None = None,
        waiting: Tensor | None = None,
        adapt: Tensor | None = None,
    ) -> None:
        """Add partial sums up, piece after piece; with `ratio`, work out the learning-rate ratios too, as `norms`."""

    @abstractmethod
    def _take(self, addresses: list[int]) -> None:
        """Put (T, POINTERS) addresses where the kernels read them."""
