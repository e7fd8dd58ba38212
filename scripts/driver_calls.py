"""What CUDA's driver takes for the calls that lanes make; run it as a script, on a GPU.

Calls are made from compiled code, as lanes make them, so many in a row; the device does nothing
else, but where it says that another thread launches meanwhile.
"""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from hogstream.kernels.backends.numba_atomics import atomic_load, call
from hogstream.kernels.backends.numba_compile import njit
from hogstream.kernels.backends.triton_launch import (
    BLOCK,
    STORAGE,
    factor_words,
    switch_constants,
)
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from hogstream.scheduler.lanes.cuda_dense_update import UNUSED
from hogstream.scheduler.lanes.cuda_device import (
    CudaDevice,
    DeviceEvent,
    PinnedMemory,
    cuda_device,
)
from hogstream.scheduler.lanes.cuda_driver import (
    IS_CAPTURING,
    LAUNCH_GRAPH,
    LAUNCH_KERNEL,
    QUERY_EVENT,
    QUERY_STREAM,
    RECORD_EVENT,
    WAIT_EVENT,
    WRITE_VALUE,
)
from hogstream.scheduler.lanes.cuda_graphs import SCRATCH, Node, UpdateGraph
from hogstream.scheduler.lanes.cuda_kernels import UpdateKernels

CALLS, ROUNDS = 100, 15
DEVICE = torch.device("cuda", 0)
ELEMENTS_BLOCK = BLOCK[torch.float32]
CONSTANTS: dict[str, Any] = {
    "STORAGE": STORAGE[torch.float32],
    "GRAD_STORAGE": STORAGE[torch.float32],
    **switch_constants(Hyperparameters().switches),
    "SCALED": False,
    "LR_ON_DEVICE": False,
    "CHECKED": False,
    "BLOCK": ELEMENTS_BLOCK,
    "COUNTED": False,
}


@njit
def many(function: int, times: int, arguments: Any) -> int:
    """Calls a function of the driver so many times; 0 or an error."""
    error = 0
    for _ in range(times):
        error |= call(function, arguments) & 0xFFFF_FFFF
    return error


@njit
def spin(address: int, value: int) -> None:
    """Returns once a word has a value."""
    while atomic_load(address) != value:
        pass


class Calls:
    """What is called, and with what."""

    def __init__(self, device: CudaDevice) -> None:
        device.enter_thread()
        self.device = device
        self.stream, self.other = device.take_stream(), device.take_stream()
        self.event = DeviceEvent(device).handle
        self.pinned = PinnedMemory(device, 8)
        self._space = np.zeros(1, np.int64)
        self._kept: list[Any] = []
        found = device.function("rmsprop_kernel", CONSTANTS)
        self.kernels = UpdateKernels(found, None, ELEMENTS_BLOCK)

    def table(self) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """Each call that lanes make: its name, its place in the driver's table, its arguments."""
        space = self._space.ctypes.data
        yield "cuStreamIsCapturing", IS_CAPTURING, (self.stream, space)
        yield "cuEventRecord", RECORD_EVENT, (self.event, self.stream)
        yield "cuEventRecord, default stream", RECORD_EVENT, (self.event, 0)
        yield "cuEventQuery", QUERY_EVENT, (self.event,)
        yield "cuStreamQuery", QUERY_STREAM, (self.stream,)
        yield "cuStreamWaitEvent", WAIT_EVENT, (self.other, self.event, 0)
        yield "cuStreamWriteValue64", WRITE_VALUE, (self.stream, self.pinned.on_device, 1, 0)
        for elements in (1 << 10, 1 << 16, 1 << 20, 1 << 22):
            name = f"cuLaunchKernel, {elements:,} elements"
            yield name, LAUNCH_KERNEL, self.launch(elements, self.stream)
        for elements in (1 << 16, 1 << 20):
            for branches in (1, 16):
                name = f"cuGraphLaunch, 16 of {elements:,} elements, branches: {branches}"
                yield name, LAUNCH_GRAPH, (self.graph(elements, branches), self.stream)

    def launch(self, elements: int, stream: int) -> tuple[int, ...]:
        """The arguments of a launch of an update."""
        numbers = factor_words(Hyperparameters())
        values = np.array(
            [*self._columns(elements), *numbers, *[0] * (UNUSED + 2 + SCRATCH)], np.int64
        )
        places = values.ctypes.data + 8 * np.arange(len(values))
        self._kept.append((values, places))
        function, threads, shared = self.kernels.update
        programs = -(-elements // ELEMENTS_BLOCK)
        grid_and_block = programs, 1, 1, threads, 1, 1
        return function, *grid_and_block, shared, stream, places.ctypes.data, 0

    def graph(self, elements: int, branches: int) -> int:
        """A graph of 16 updates."""
        nodes = [Node(self._columns(elements), index % branches) for index in range(16)]
        made = UpdateGraph(self.device, self.kernels, nodes, factor_words(Hyperparameters()), 0)
        self._kept.append(made)
        return made.handle

    def _columns(self, elements: int) -> list[int]:
        tensors = [torch.ones(elements, device=DEVICE) for _ in range(3)]
        self._kept.append(tensors)
        columns: list[int] = LaunchTable([Operands(*tensors)]).columns[:, 0].tolist()
        return columns

    def call(self, function: int, arguments: tuple[int, ...], times: int = 1) -> None:
        """Makes a call so many times.

        Raises:
            RuntimeError: If the driver refuses.
        """
        if error := many(int(self.device.driver.table[function]), times, arguments):
            raise RuntimeError(f"a call of the driver failed with error {error}")

    @contextmanager
    def another_launches(self) -> Iterator[None]:
        """Another thread launches all the time."""
        arguments, stop = self.launch(1 << 10, self.other), threading.Event()

        def launch() -> None:
            self.device.enter_thread()
            while not stop.is_set():
                self.call(LAUNCH_KERNEL, arguments, CALLS)
                self.device.synchronize(self.other)

        self.call(LAUNCH_KERNEL, arguments)
        thread = threading.Thread(target=launch)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def landing(self) -> None:
        """Launches an update, and returns once a counter that is written behind it shows that."""
        word = ctypes.c_int64.from_address(self.pinned.address)
        word.value = 0
        self.call(LAUNCH_KERNEL, self._landing)
        self.call(WRITE_VALUE, (self.stream, self.pinned.on_device, 7, 0))
        spin(self.pinned.address, 7)

    def prepare_landing(self) -> None:
        """Makes what ``landing`` launches."""
        self._landing = self.launch(1 << 16, self.stream)
        self.landing()


def microseconds(call: Callable[[], object], times: int = 1) -> str:
    """The median of a call that does something so many times, and quartiles."""
    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        found.append(1e6 * (time.perf_counter() - start) / times)
    low, median, high = statistics.quantiles(found)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def device_microseconds(calls: Calls, function: int, arguments: tuple[int, ...]) -> str:
    """What the device takes for each of many calls, one after the other on their stream."""
    stream = torch.cuda.ExternalStream(calls.stream, device=DEVICE)
    found = []
    for _ in range(ROUNDS):
        before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        calls.call(function, arguments, CALLS)
        behind.record(stream)
        torch.cuda.synchronize()
        found.append(1e3 * before.elapsed_time(behind) / CALLS)
    return f"{statistics.median(found):.2f}"


def main() -> None:
    """Prints a table: microseconds of the calling thread, and of the device."""
    torch.ones(1, device=DEVICE)
    calls = Calls(cuda_device(0))
    print(f"On {torch.cuda.get_device_name(DEVICE)}, {ROUNDS} rounds of {CALLS} calls:\n")
    print("| call | thread, us | device, us |\n|---|---:|---:|")
    for name, function, arguments in calls.table():
        call = partial(calls.call, function, arguments, CALLS)
        call()
        works = function in (LAUNCH_KERNEL, LAUNCH_GRAPH)
        device = device_microseconds(calls, function, arguments) if works else ""
        print(f"| {name} | {microseconds(call, CALLS)} | {device} |")
    calls.prepare_landing()
    print(f"| launch, until a counter shows the landing | {microseconds(calls.landing)} | |")
    with calls.another_launches():
        recorded = (calls.event, 0)
        text = microseconds(partial(calls.call, RECORD_EVENT, recorded, CALLS), CALLS)
        print(f"| cuEventRecord, default stream, while another thread launches | {text} | |")


if __name__ == "__main__":
    main()
