"""Updates on the machine that executes PTX, launched as ``triton_launch`` and lanes launch them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hogstream.kernels.backends.triton_launch import factor_words
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import ELEMENTS, GRAD, LaunchTable
from ptx_compiling import Compiled, Form
from ptx_machine import GlobalMemory, Launch

#: What every kernel of Triton's takes besides: two addresses of scratch, which ours need none of.
_SCRATCH = [0, 0]
#: The key of a step, as a signed integer, and what gradients are multiplied by, of forms that take
#: either.
KEY, GRAD_FACTOR = -0x0EDC_BA98_7654_3211, 0.3
#: Where ``row_words`` has how many positions there are.
_POSITIONS = 9
#: Locks of rows, and which of them the first row of a table has.
STRIPES, FIRST_LOCK = 4, 3
#: Bytes around a tensor that no thread may touch.
_MARGIN = 4096


class Watch(NamedTuple):
    """What an update may take besides.

    Attributes:
        key: Of the step.
        lr: Where the kernel reads it: float64, ().
        grad_factor: The same, of the factor of gradients.
        verdict: Where it finds whether to do anything: int32, (1,).
        counts: ``RaceCounters.counts``.
        locks: Those of rows: int32.
    """

    key: int = 0
    lr: torch.Tensor | None = None
    grad_factor: torch.Tensor | None = None
    verdict: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    locks: torch.Tensor | None = None

    @classmethod
    def of(cls, form: Form, device: Device, lr: float, blocks: int = 0) -> Watch:
        """What a form takes, on a device: a verdict that all is well, and some counts or other.

        Args:
            form: It.
            device: Where to put that.
            lr: The learning rate.
            blocks: How many the parameter has, if they are counted.
        """
        counts = torch.arange(3 * blocks).reshape(3, blocks)
        of_lr, of_grad = (torch.tensor(each, dtype=torch.float64) for each in (lr, GRAD_FACTOR))
        return cls(
            KEY if form.stochastic else 0,
            device.put("lr", of_lr) if form.lr_on_device else None,
            device.put("grad_factor", of_grad) if form.scaled else None,
            device.put("verdict", torch.zeros(1, dtype=torch.int32)) if form.checked else None,
            device.put("counts", counts) if form.counted else None,
            device.put("locks", torch.zeros(STRIPES, dtype=torch.int32)) if form.locked else None,
        )


class Device:
    """A device's memory.

    Attributes:
        memory: It, as the machine has it.
    """

    def __init__(self) -> None:
        self.memory = GlobalMemory()
        self._number = 0

    def put(self, name: str, values: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """A copy of a tensor on the device, with memory around it that is nobody's.

        Args:
            name: What messages call it.
            values: Of any shape.
            offset: By how many elements it lies off a multiple of 256 bytes.
        """
        size = values.numel() * values.element_size()
        room = torch.empty(size + 2 * _MARGIN, dtype=torch.uint8)
        start = (
            _MARGIN // 2 + -(room.data_ptr() + _MARGIN // 2) % 256 + offset * values.element_size()
        )
        copy = room[start : start + size].view(values.dtype).reshape(values.shape)
        copy.copy_(values)
        self.memory.add(name, copy)
        return copy

    def update(
        self,
        compiled: Compiled,
        table: LaunchTable,
        hyperparameters: Hyperparameters,
        watch: Watch = Watch(),  # noqa: B008 - it never changes
    ) -> Launch:
        """The launch of an update of tensors that are on the device."""
        programs, where = self._table(compiled, table)
        factors = factor_words(hyperparameters)
        if watch.lr is not None:
            factors[0] = watch.lr.data_ptr()
        arguments = [
            *where,
            *factors,
            watch.key,
            *map(_address, (watch.grad_factor, watch.verdict)),
        ]
        if not compiled.form.is_multi_tensor:
            arguments.append(_address(watch.counts))
        return self.launch(compiled, programs, arguments)

    def update_rows(
        self,
        compiled: Compiled,
        words: list[int],
        hyperparameters: Hyperparameters,
        verdict: torch.Tensor,
        watch: Watch = Watch(),  # noqa: B008 - it never changes
    ) -> Launch:
        """The launch of an update of rows that are on the device.

        Args:
            compiled: The kernel.
            words: What it takes first, as ``row_words`` has it.
            hyperparameters: Of the update.
            verdict: Where it says whether all rows are in the table.
            watch: What it may take besides; its verdict is what may forbid the update.
        """
        factors = factor_words(hyperparameters)
        if watch.lr is not None:
            factors[0] = watch.lr.data_ptr()
        addresses = map(_address, (watch.grad_factor, watch.verdict, verdict, watch.counts))
        programs = -(-words[_POSITIONS] // compiled.block)
        arguments = [*words, *factors, watch.key, *addresses, *locks_of(watch.locks)]
        return self.launch(compiled, programs, arguments)

    def check_finite(self, compiled: Compiled, table: LaunchTable, verdict: torch.Tensor) -> Launch:
        """The launch of what finds whether gradients are finite."""
        programs, where = self._table(compiled, table)
        if not compiled.form.is_multi_tensor:
            where = [where[GRAD], where[ELEMENTS]]
        return self.launch(compiled, programs, [*where, verdict.data_ptr()])

    def _table(self, compiled: Compiled, table: LaunchTable) -> tuple[int, list[int]]:
        """How many blocks to launch, and what a kernel takes first."""
        blocks = torch.from_numpy(table.split_into_blocks(compiled.block))
        if not compiled.form.is_multi_tensor:
            return blocks.shape[1], table.columns[:, 0].tolist()
        columns = self.put("columns", torch.from_numpy(table.columns))
        blocks = self.put("blocks", blocks)
        where = [columns.data_ptr(), table.updates, blocks.data_ptr(), blocks.shape[1]]
        return blocks.shape[1], where

    def launch(self, compiled: Compiled, programs: int, arguments: list[int]) -> Launch:
        """The launch of a kernel with its own arguments."""
        self._number += 1
        return Launch(
            compiled.program,
            (programs, 1, 1),
            [*arguments, *_SCRATCH],
            compiled.shared,
            self._number - 1,
        )


def locks_of(locks: torch.Tensor | None) -> list[int]:
    """What kernels of rows take last."""
    return [0, 0, 0] if locks is None else [locks.data_ptr(), FIRST_LOCK, len(locks)]


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
