"""Programs that call the driver of ``cuda_testing`` themselves, for tests of that driver."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cuda_testing import NOT_READY, Driver, TestDevice, parameters


class Program:
    """A thread of a host, on which the device's context is current: a context manager.

    It keeps the tensors that it was given, and ends by destroying its events.

    Attributes:
        driver: The driver.
        device: Of it.
        out: Where a function may write what nobody wants.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.device = TestDevice(driver)
        self.out = (ctypes.c_uint64 * 8)()
        self._events: list[int] = []
        self._streams: list[int] = []
        self._kept: list[torch.Tensor] = []
        self.counters = 0

    def __enter__(self) -> Program:
        self("cuCtxPushCurrent_v2", self.device.context)
        self.counters = self.make("cuMemHostAlloc", ctypes.c_size_t(64), 2)
        ctypes.memset(self.counters, 0, 64)
        return self

    def __exit__(self, *error: object) -> None:
        for event in self._events:
            self.driver.call("cuEventDestroy_v2", event)
        self.driver.call("cuMemFreeHost", self.counters)
        self.driver.call("cuCtxPopCurrent_v2", None)

    def __call__(self, function: str, *arguments: Any) -> None:
        """Calls a function that has to succeed."""
        self.device.call(function, *arguments)

    def make(self, function: str, *arguments: Any) -> int:
        """What a function makes, which it gives by its first argument."""
        return self.device.make(function, *arguments)

    @contextmanager
    def without_context(self) -> Iterator[None]:
        """No context is current here."""
        self("cuCtxPopCurrent_v2", None)
        try:
            yield
        finally:
            self("cuCtxPushCurrent_v2", self.device.context)

    def stream(self, flags: int = 1) -> int:
        """A stream, non-blocking unless flags say otherwise."""
        self._streams.append(self.device.make_stream(flags))
        return self._streams[-1]

    def event(self, flags: int = 2) -> int:
        """An event, without times unless flags say otherwise."""
        self._events.append(self.make("cuEventCreate", flags))
        return self._events[-1]

    def query(self, stream: int) -> int:
        """What asking for a stream returns."""
        return self.driver.call("cuStreamQuery", stream)

    def waits(self, stream: int) -> bool:
        """Whether a stream has more to do, however often one asks."""
        for _ in range(1000):
            os.sched_yield()
            if self.query(stream) != NOT_READY:
                return False
        return True

    def synchronize(self, stream: int) -> None:
        """Waits for a stream."""
        self("cuStreamSynchronize", stream)

    def idle(self) -> None:
        """Waits for all streams, of which the program learns nothing."""
        for stream in (0, *self._streams):
            self.driver.wait_idle(stream)

    def kept(self, tensor: torch.Tensor) -> int:
        """The address of a tensor that lives as long as the program."""
        self._kept.append(tensor)
        return tensor.data_ptr()

    def launch(self, function: int, programs: int, arguments: Sequence[int], stream: int) -> Any:
        """Launches a kernel, and returns its arguments in memory."""
        made = parameters(arguments)
        self("cuLaunchKernel", function, programs, 1, 1, 128, 1, 1, 0, stream, made, None)
        return made.values

    def fill(self, stream: int, tensor: torch.Tensor, value: float) -> None:
        """Fills a tensor of float32 by a kernel."""
        programs = -(-tensor.numel() // 1024)
        self.launch(self.filler(), programs, self.fill_arguments(tensor, value), stream)

    def fill_arguments(self, tensor: torch.Tensor, value: float) -> tuple[int, int, int]:
        """Those of the kernel that fills."""
        (bits,) = struct.unpack("<i", struct.pack("<f", value))
        return self.kept(tensor), tensor.numel(), bits

    def filler(self) -> int:
        """The kernel that fills float32."""
        return self.device.function("fill_kernel", {"STORAGE": "fp32", "BLOCK": 1024})

    def try_fill(self, *, programs: int = 1, threads: int = 128, scratch: int = 0) -> int:
        """What a launch returns that may be wrong."""
        made = parameters(self.fill_arguments(torch.zeros(8), 1.0))
        made.values[3] = scratch
        shape = (programs, 1, 1, threads, 1, 1, 0)
        return self.driver.call("cuLaunchKernel", self.filler(), *shape, self.stream(), made, None)

    def copy(self, stream: int, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies a tensor."""
        addresses = self.kept(target), self.kept(source)
        self("cuMemcpyDtoDAsync_v2", *addresses, ctypes.c_size_t(source.nbytes), stream)

    def write(self, stream: int, value: int, place: int = 0) -> None:
        """Writes a value to one of eight counters, in the order of a stream."""
        self("cuStreamWriteValue64_v2", stream, self.counters + 8 * place, value, 0)

    def value(self, place: int = 0) -> int:
        """What a counter has."""
        return ctypes.c_uint64.from_address(self.counters + 8 * place).value

    def elapsed(self, start: int, end: int) -> float:
        """Milliseconds between two events."""
        milliseconds = ctypes.c_float()
        self("cuEventElapsedTime", ctypes.byref(milliseconds), start, end)
        return milliseconds.value

    @contextmanager
    def graph(self) -> Iterator[Graph]:
        """A graph, destroyed at the end with what was made of it."""
        graph = Graph(self)
        try:
            yield graph
        finally:
            graph.destroy()


class _KernelNode(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("shape", ctypes.c_uint * 7),  # of the grid, of a program, and its shared memory
        ("arguments", ctypes.c_void_p),
        *((name, ctypes.c_uint64) for name in ("extra", "kernel", "context")),
    )


class _MemsetNode(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("target", "pitch")),
        *((name, ctypes.c_uint) for name in ("value", "element")),
        *((name, ctypes.c_uint64) for name in ("width", "height")),
    )


class Graph:
    """A graph that a program makes node by node."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._executables: list[int] = []
        self._handle = program.make("cuGraphCreate", 0)

    def kernel(
        self, function: int, programs: int, arguments: Sequence[int], after: Sequence[int] = ()
    ) -> int:
        """Adds a launch behind other nodes; returns the node."""
        made = parameters(arguments)
        shape = (ctypes.c_uint * 7)(programs, 1, 1, 128, 1, 1, 0)
        node = _KernelNode(function, shape, ctypes.addressof(made), 0, 0, 0)
        return self._add("cuGraphAddKernelNode_v2", after, ctypes.byref(node))

    def fill(self, tensor: torch.Tensor, value: float, after: Sequence[int] = ()) -> int:
        """Adds a launch that fills a tensor of float32 of one program."""
        program = self._program
        return self.kernel(program.filler(), 1, program.fill_arguments(tensor, value), after)

    def memset(self, tensor: torch.Tensor, value: int, after: Sequence[int] = ()) -> int:
        """Adds a memset of a tensor, 4 bytes at a time."""
        address = self._program.kept(tensor)
        node = _MemsetNode(address, 0, value, 4, tensor.nbytes // 4, 1)
        context = self._program.device.context
        return self._add("cuGraphAddMemsetNode", after, ctypes.byref(node), context)

    def _add(self, function: str, after: Sequence[int], *arguments: Any) -> int:
        others = (ctypes.c_uint64 * len(after))(*after)
        return self._program.make(function, self._handle, others, len(after), *arguments)

    def executable(self) -> int:
        """What can be launched."""
        made = self._program.make("cuGraphInstantiateWithFlags", self._handle, 0)
        self._executables.append(made)
        return made

    def destroy(self) -> None:
        """Destroys it all."""
        for executable in self._executables:
            self._program("cuGraphExecDestroy", executable)
        self._program("cuGraphDestroy", self._handle)
