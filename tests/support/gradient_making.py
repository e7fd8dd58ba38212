"""What makes gradients on the driver of tests: memory that is poisoned, and streams."""

from __future__ import annotations

import asyncio
import types
import weakref
from collections.abc import Callable, Coroutine, Generator
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch

from gpu_testing import TestGpu


class Memory:
    """Memory for gradients: poisoned the moment that nobody refers to it, then given to others.

    So does torch's allocator, but for the poison; here no operation of any stream may still use it.
    """

    def __init__(self, gpu: TestGpu, elements: int, dtype: torch.dtype) -> None:
        self._gpu = gpu
        self._dtype = np.dtype(str(dtype).removeprefix("torch."))
        self._elements = elements
        self._free: list[np.ndarray[Any, Any]] = []
        self._closed = False
        self.before_poison: Callable[[int], None] = lambda address: None

    def take(self) -> torch.Tensor:
        """A tensor of NaN, of which nobody else knows."""
        block = self._free.pop() if self._free else np.full(self._elements, np.nan, self._dtype)
        view = block[:]  # which the storage of the tensor refers to, and nobody else
        weakref.finalize(view, self._end, block).atexit = False
        return torch.from_numpy(view)

    def poison(self, address: int) -> None:
        """The owner of a gradient may write it from now on."""
        if not self._closed:
            size = self._elements * self._dtype.itemsize
            self._gpu.tests.host_write(address, size, poison=True)

    @property
    def blocks(self) -> int:
        """How many gradients were given back."""
        return len(self._free)

    def close(self) -> None:
        """Poisons no more."""
        self._closed = True

    def _end(self, block: np.ndarray[Any, Any]) -> None:
        if not self._closed:
            self.before_poison(block.ctypes.data)
        self.poison(block.ctypes.data)
        self._free.append(block)


class Streams:
    """The streams that make gradients, and those that are held for a while.

    Attributes:
        unsubmitted: The stream that makes a gradient which was not submitted, by its address.
    """

    def __init__(self, gpu: TestGpu) -> None:
        self._gpu = gpu
        self._held: set[int] = set()
        self._makers: set[int] = {0}
        self.unsubmitted: dict[int, int] = {}

    def fill(self, grad: torch.Tensor, value: float) -> None:
        """Has the current stream make a gradient."""
        stream = self._gpu.current_stream()
        self._makers.add(stream)
        self.unsubmitted[grad.data_ptr()] = stream
        self._gpu.torch.launch_fill(stream, grad, value)

    def hold(self, stream: int, seconds: float) -> None:
        """Holds a stream for a time of the event loop's."""
        self._gpu.tests.hold(stream)
        self._held.add(stream)
        asyncio.get_running_loop().call_later(seconds, self._release, stream)

    def settle(self) -> None:
        """Waits until what makes gradients is done, as the owner of one does who gives it up."""
        self.release()
        with suppress(RuntimeError), self._gpu.torch.entered():  # if the device is lost
            for stream in tuple(self._makers):
                self._gpu.tests.call("cuStreamSynchronize", stream)

    def release(self) -> None:
        """Lets all streams go on."""
        for stream in tuple(self._held):
            self._release(stream)

    def _release(self, stream: int) -> None:
        if stream in self._held:
            self._held.discard(stream)
            self._gpu.tests.release(stream)


async def within(
    gpu: TestGpu, stream: int, function: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """Runs a coroutine with a stream as the current one: not what others do while it waits."""
    await _steps(gpu, stream, function())


@types.coroutine
def _steps(
    gpu: TestGpu, stream: int, coroutine: Coroutine[Any, Any, None]
) -> Generator[Any, Any, None]:
    go_on: Callable[[Any], Any] = coroutine.send
    value: Any = None
    try:
        while True:
            try:
                with ExitStack() as entered:
                    with suppress(RuntimeError):  # if the device is lost
                        entered.enter_context(gpu.computing(stream))
                    awaited = go_on(value)
            except StopIteration:
                return
            try:
                value, go_on = (yield awaited), coroutine.send
            except BaseException as error:
                value, go_on = error, coroutine.throw
    finally:
        coroutine.close()
