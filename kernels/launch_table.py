"""Where the tensors of many updates lie in memory, so that one launch reaches them all."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hogstream.kernels.operands import Operands

#: The rows of a table: addresses of each update's tensors, or 0, and how many elements each has.
PARAM, GRAD, MS, GRAD_AVG, MOMENTUM_BUFFER, KAHAN_COMP, ELEMENTS = range(7)


class LaunchTable:
    """The addresses and lengths of a list of updates, all of the same dtypes and on one device.

    It holds no tensor: whoever launches it keeps them alive until then.

    Attributes:
        dtype: Of parameters.
        grad_dtype: Of gradients.
        device: Where they are.
        columns: int64, shape (7, updates), one row each for the addresses of ``param``, ``grad``,
            ``ms``, ``grad_avg``, ``momentum_buffer`` and ``kahan_comp`` (0 where there is none),
            and the number of elements.
        updates: How many updates there are.
        elements: How many elements they have together.
    """

    def __init__(self, operands: Sequence[Operands]) -> None:
        """Makes a table of checked operands, at least one, of the same dtypes and device."""
        first = operands[0]
        self.dtype, self.grad_dtype = first.param.dtype, first.grad.dtype
        self.device = first.param.device
        addresses = [
            0 if tensor is None else tensor.data_ptr() for each in operands for tensor in each
        ]
        rows = [addresses[row::ELEMENTS] for row in range(ELEMENTS)]  # which comes behind them
        rows.append([each.param.numel() for each in operands])
        self.columns: npt.NDArray[np.int64] = np.array(rows, np.int64)
        self.updates = len(operands)
        self.elements = int(self.columns[ELEMENTS].sum())
        self._on_device = _DeviceCopy()
        self._ms = weakref.ref(operands[0].ms.untyped_storage())

    def copy_to(self, columns: npt.NDArray[np.int64]) -> LaunchTable:
        """A table of the same updates, which shares what is on the device.

        Args:
            columns: Becomes its ``columns``. Between launches, addresses of gradients in there may
                change.
        """
        columns[...] = self.columns
        table = LaunchTable.__new__(LaunchTable)
        table.__dict__.update(self.__dict__)  # as ``copy`` does, in less time
        table.columns = columns
        return table

    @contextmanager
    def on_device(self, block: int) -> Iterator[DeviceTable]:
        """The table where a kernel launched in this context on the current stream can read it.

        Args:
            block: How many elements one program updates.
        """
        if self.device.type == "cuda":
            with self._on_device.of(self, block) as table:
                yield table
        else:  # Triton interprets: it reads the table itself
            yield DeviceTable(
                torch.from_numpy(self.columns), torch.from_numpy(self.split_into_blocks(block))
            )

    def split_into_blocks(self, block: int) -> npt.NDArray[np.int32]:
        """Which block of which update each program takes.

        Args:
            block: How many elements one program updates.

        Returns:
            Shape (2, programs): the index of the update, and of the block in it.
        """
        counts = -(-self.columns[ELEMENTS] // block)
        updates = np.repeat(np.arange(self.updates), counts)
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        return np.stack([updates, np.arange(len(updates)) - starts]).astype(np.int32)


#: The dtypes of parameters and gradients, and their device.
Kind = tuple[torch.dtype, torch.dtype, torch.device]


def kind_of(operands: Operands) -> Kind:
    """What is the same for all updates of a table."""
    return operands.param.dtype, operands.grad.dtype, operands.param.device


def make_tables(operands: Iterable[Operands]) -> list[LaunchTable]:
    """A table for all that are of the same dtypes and device, in the order of their first."""
    groups: dict[Kind, list[Operands]] = {}
    for each in operands:
        groups.setdefault(kind_of(each), []).append(each)
    return [LaunchTable(group) for group in groups.values()]


@dataclass(frozen=True)
class DeviceTable:
    """A table in a device's memory.

    Attributes:
        columns: As in ``LaunchTable``.
        blocks: int32, shape (2, programs): the update that each program works on, and the block.
    """

    columns: torch.Tensor
    blocks: torch.Tensor


@dataclass(frozen=True)
class _Upload:
    """A table on its way to a device, and the pinned memory that it is copied from."""

    table: DeviceTable
    staging: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, table: LaunchTable, block: int) -> _Upload:
        columns = torch.from_numpy(table.columns).pin_memory()
        blocks = torch.from_numpy(table.split_into_blocks(block)).pin_memory()
        on_device = (each.to(table.device, non_blocking=True) for each in (columns, blocks))
        return cls(DeviceTable(*on_device), (columns, blocks))

    def repeat(self) -> None:
        """Copies it once more."""
        columns, blocks = self.staging
        self.table.columns.copy_(columns, non_blocking=True)
        self.table.blocks.copy_(blocks, non_blocking=True)


# Uploads that were captured, by the memory of the first ``ms`` of a table, and by what they hold. A
# replay copies again, from the same pinned memory to the same table, so neither may change or be
# freed as long as there may be a graph; and none is replayed once what it updates is gone.
_captured: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[tuple[bytes, int], _Upload]]
_captured = weakref.WeakKeyDictionary()


def _capture(table: LaunchTable, block: int) -> DeviceTable:
    """Has the stream that is captured upload a table; one that was captured before, as then."""
    ms = table._ms()
    assert ms is not None  # whoever launches a table keeps its tensors
    uploads = _captured.setdefault(ms, {})
    key = table.columns.tobytes(), block
    if key in uploads:
        uploads[key].repeat()
    else:
        with _allowed_while_capturing():
            uploads[key] = _Upload.of(table, block)
    return uploads[key].table


#: ``CU_STREAM_CAPTURE_MODE_RELAXED``.
_RELAXED = 2


@contextmanager
def _allowed_while_capturing() -> Iterator[None]:
    """Allows this thread to pin memory while a stream is captured.

    To do so torch asks CUDA for events and for memory, which have nothing to do with the capture,
    but end it if they are not allowed. From 2.11 on torch allows them itself.
    """
    if torch.version.cuda is None:  # but ROCm
        yield
        return
    before = _exchange_mode(_RELAXED)
    try:
        yield
    finally:
        _exchange_mode(before)


def _exchange_mode(mode: int) -> int:
    """Sets what this thread may ask for while streams are captured, and gives what it was."""
    word = ctypes.c_int(mode)
    code = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(word))
    if code != 0:
        raise RuntimeError(f"CUDA's driver does not change the mode of captures: error {code}")
    return word.value


class _DeviceCopy:
    """What a table and its successors have on the device.

    Uploads are asynchronous, from pinned memory: torch's allocator keeps a pinned block from being
    used anew until the copy out of it has ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # from an upload until the launch that reads it
        self._stream: int | None = None
        self._sent: npt.NDArray[np.int64] | None = None  # where the device's gradients are
        self._table: DeviceTable | None = None

    @contextmanager
    def of(self, table: LaunchTable, block: int) -> Iterator[DeviceTable]:
        with self._lock:
            if torch.cuda.is_current_stream_capturing():
                yield _capture(table, block)
            else:
                yield self._refreshed(table, block)

    def _refreshed(self, table: LaunchTable, block: int) -> DeviceTable:
        stream = torch.cuda.current_stream(table.device).cuda_stream
        if self._table is None or self._sent is None or stream != self._stream:
            # Another stream would not wait for the uploads of this one.
            self._table, self._stream = _Upload.of(table, block).table, stream
            self._sent = table.columns[GRAD].copy()
        else:
            # Copies differ in their gradients alone.
            grads, sent = table.columns[GRAD], self._sent
            if not np.array_equal(grads, sent):
                self._sent = None  # until they are on their way
                staging = torch.from_numpy(grads).pin_memory()
                self._table.columns[GRAD].copy_(staging, non_blocking=True)
                sent[...] = grads
                self._sent = sent
        return self._table
