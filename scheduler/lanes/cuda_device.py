"""A GPU as lanes see it: the driver, torch's streams there, memory, kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple

import torch

from hogstream.kernels.backends.select import available_backends
from hogstream.scheduler.forks import let_go_in_forks
from hogstream.scheduler.lanes.cuda_driver import (
    CAPTURED,
    CudaDriver,
    CudaError,
    address,
    system_driver,
)

_NON_BLOCKING = 1
_THREAD_LOCAL = 1
_MAPPED = 2
_MAJOR, _MINOR, _WRITES_64_BITS = 75, 76, 122


class Image(NamedTuple):
    """A kernel's code, for the driver to load.

    Attributes:
        code: A cubin.
        threads: Of a program.
        shared: Bytes of shared memory that a program needs.
    """

    code: bytes
    threads: int
    shared: int


class Function(NamedTuple):
    """A kernel that is loaded.

    Attributes:
        handle: The driver's.
        threads: Of a program.
        shared: Bytes of shared memory that a program needs.
    """

    handle: int
    threads: int
    shared: int


class CudaDevice:
    """A GPU as lanes see it.

    Streams and kernels are kept for the life of the process: torch may note a stream in memory that
    it keeps, and come back to it long after its lane was closed.

    Attributes:
        driver: The driver's functions.
        index: Its number.
        context: That torch uses too; it need not be current on any thread.
    """

    def __init__(self, driver: CudaDriver, index: int) -> None:
        """Asks the driver for the context, which torch has made.

        Raises:
            CudaError: If the driver refuses.
            RuntimeError: If the GPU cannot write 64 bits in the order of a stream.
        """
        self.driver = driver
        self.index = index
        self._ordinal = ctypes.c_int()
        driver.call("cuDeviceGet", ctypes.byref(self._ordinal), index)
        self.context = driver.make("cuDevicePrimaryCtxRetain", self._ordinal)
        if not self._attribute(_WRITES_64_BITS):
            raise RuntimeError(
                f"cuda:{index} must write 64 bits in the order of a stream, but cannot"
            )
        self._idle_streams: list[int] = []
        self._functions: dict[tuple[Any, ...], Function] = {}
        let_go_in_forks(self)

    def let_go(self) -> None:
        """Forgets, in a child of ``os.fork``, what only the parent can use."""
        self._idle_streams.clear()

    # What torch does there

    def current_stream(self) -> int:
        """The stream that is current on the calling thread."""
        stream: int = torch._C._cuda_getCurrentRawStream(self.index)
        return stream

    def computing(self, stream: int) -> AbstractContextManager[object]:
        """A context in which a stream is the current one, on the thread that enters it."""
        device = torch.device("cuda", self.index)
        return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device))

    def compile(self, kernel: str, constants: dict[str, Any]) -> Image:
        """Compiles one of our kernels for this GPU.

        Args:
            kernel: Its name.
            constants: Its constexprs, and maybe more.

        Raises:
            RuntimeError: If it needs memory besides its arguments, as instrumented ones do.
        """
        from hogstream.kernels.backends import (
            triton_kernels,
            triton_row_access,
            triton_row_kernels,
        )
        from hogstream.kernels.backends.triton_compile import compile_for, cuda_target

        modules = triton_kernels, triton_row_kernels, triton_row_access
        found = next(getattr(each, kernel) for each in modules if hasattr(each, kernel))
        capability = 10 * self._attribute(_MAJOR) + self._attribute(_MINOR)
        compiled = compile_for(found, constants, cuda_target(capability))
        metadata = compiled.metadata
        scratch = metadata.global_scratch_size + getattr(metadata, "profile_scratch_size", 0)
        if scratch:
            raise RuntimeError(f"{kernel} must need no scratch, got {scratch} bytes: instrumented?")
        threads = metadata.num_warps * metadata.warp_size
        return Image(compiled.asm["cubin"], threads, metadata.shared)

    # What the driver does

    @contextmanager
    def current(self) -> Iterator[None]:
        """The context is current on the calling thread, and no capture of others is disturbed.

        In CUDA's usual mode, memory must not be allocated, or events asked for, while any thread
        captures a graph.
        """
        driver = self.driver
        driver.call("cuCtxPushCurrent_v2", address(self.context))
        try:
            mode = ctypes.c_int(_THREAD_LOCAL)
            driver.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
            try:
                yield
            finally:
                driver.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        finally:
            driver.make("cuCtxPopCurrent_v2")

    def enter_thread(self) -> None:
        """Makes the context current on the calling thread for good, and captures undisturbed."""
        self.driver.call("cuCtxPushCurrent_v2", address(self.context))
        self.disturb_no_capture()

    def disturb_no_capture(self) -> None:
        """Has what the calling thread asks for be allowed while others capture."""
        mode = ctypes.c_int(_THREAD_LOCAL)
        self.driver.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def wait(self, stream: int, event: int) -> None:
        """Has a stream wait for an event.

        Raises:
            CudaError: If the driver refuses.
        """
        with self.current():
            self.driver.call("cuStreamWaitEvent", address(stream), address(event), 0)

    def synchronize(self, stream: int) -> None:
        """Waits until a stream has done all that it was given.

        Raises:
            CudaError: If the device has failed.
        """
        with self.current():
            self.driver.call("cuStreamSynchronize", address(stream))

    def take_stream(self) -> int:
        """A stream that nobody uses, in no order with the default stream.

        It has the highest priority that there is: an update is short, and the sooner it lands, the
        less stale are the gradients that others make meanwhile.

        Raises:
            CudaError: If the driver refuses.
        """
        with suppress(IndexError):  # not if: another thread may be quicker
            return self._idle_streams.pop()
        lowest, highest = ctypes.c_int(), ctypes.c_int()
        with self.current():
            self.driver.call(
                "cuCtxGetStreamPriorityRange", ctypes.byref(lowest), ctypes.byref(highest)
            )
            return self.driver.make("cuStreamCreateWithPriority", _NON_BLOCKING, highest)

    def give_back_stream(self, stream: int) -> None:
        """Lets others use a stream."""
        self._idle_streams.append(stream)

    def function(self, kernel: str, constants: dict[str, Any]) -> Function:
        """One of our kernels, compiled and loaded when it is first asked for.

        Args:
            kernel: Its name.
            constants: Its constexprs, and maybe more.

        Raises:
            CudaError: If the driver cannot load it.
        """
        key = (kernel, *constants.items())
        found = self._functions.get(key)
        if found is None:
            image = self.compile(kernel, constants)
            with self.current():
                module = self.driver.make("cuModuleLoadData", image.code)
                handle = self.driver.make("cuModuleGetFunction", address(module), kernel.encode())
            found = self._functions[key] = Function(handle, image.threads, image.shared)
        return found

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self.driver.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._ordinal)
        return value.value


class PinnedMemory:
    """Memory of the host that the device writes.

    Attributes:
        address: As the host sees it.
        on_device: As the device sees it.
    """

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        """Allocates it, all zeros.

        Raises:
            CudaError: If there is no room.
        """
        self._device = device
        with device.current():
            self.address = device.driver.make("cuMemHostAlloc", ctypes.c_size_t(nbytes), _MAPPED)
            ctypes.memset(self.address, 0, nbytes)
            try:
                self.on_device = device.driver.make(
                    "cuMemHostGetDevicePointer_v2", address(self.address), 0
                )
            except CudaError:
                device.driver.call("cuMemFreeHost", address(self.address))
                raise

    def free(self) -> None:
        """Frees it; nothing may write it any more."""
        with self._device.current():
            self._device.driver.call("cuMemFreeHost", address(self.address))


class DeviceMemory:
    """Memory of the device.

    Attributes:
        address: Where it is.
    """

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        """Allocates it.

        Raises:
            CudaError: If there is no room.
        """
        self._device = device
        with device.current():
            self.address = device.driver.make("cuMemAlloc_v2", ctypes.c_size_t(nbytes))

    def free(self) -> None:
        """Frees it; nothing may use it any more."""
        with self._device.current():
            self._device.driver.call("cuMemFree_v2", address(self.address))


class DeviceEvent:
    """An event of the driver.

    Attributes:
        handle: The driver's.
    """

    def __init__(self, device: CudaDevice, *, timed: bool = False) -> None:
        """Makes it.

        Args:
            device: Of which.
            timed: Whether it takes the time, which costs ten times more.

        Raises:
            CudaError: If the driver refuses.
        """
        self._device = device
        with device.current():
            self.handle = device.driver.make("cuEventCreate", 0 if timed else 2)

    def record(self, stream: int) -> None:
        """Records it behind what a stream was given.

        Raises:
            CudaError: If the driver refuses, or the stream is captured: who waits for the event
                would be drawn into the capture.
        """
        driver, status = self._device.driver, ctypes.c_int()
        with self._device.current():
            driver.call("cuStreamIsCapturing", address(stream), ctypes.byref(status))
            if status.value:
                raise driver.error("cuEventRecord", CAPTURED)
            driver.call("cuEventRecord", address(self.handle), address(stream))

    def synchronize(self) -> None:
        """Waits until the device has come to it."""
        with self._device.current():
            self._device.driver.call("cuEventSynchronize", address(self.handle))

    def elapsed_time(self, end: DeviceEvent) -> float:
        """Milliseconds from this event to another, as float32."""
        milliseconds = ctypes.c_float()
        handles = address(self.handle), address(end.handle)
        with self._device.current():
            self._device.driver.call("cuEventElapsedTime", ctypes.byref(milliseconds), *handles)
        return milliseconds.value

    def destroy(self) -> None:
        """Destroys it."""
        with self._device.current():
            self._device.driver.call("cuEventDestroy_v2", address(self.handle))


def gpu_of(device: torch.device) -> CudaDevice | None:
    """The GPU that lanes run on for tensors of a device; None if that is no NVIDIA GPU.

    Raises:
        RuntimeError: If Numba is missing, which compiles what calls the driver.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    if (missing := available_backends()["numba"]) is not None:
        raise RuntimeError(f"lanes and events on {device} need Numba: {missing}")
    return cuda_device(device.index or 0)


@cache
def cuda_device(index: int) -> CudaDevice:
    """A GPU of this system, on which torch has been.

    Raises:
        OSError: If there is no driver.
        CudaError: If the driver refuses.
    """
    return CudaDevice(system_driver(), index)
