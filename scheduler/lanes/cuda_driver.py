"""The CUDA driver's functions: in a table of addresses for compiled code, and by name for Python.

They are those of ``libcuda.so.1``, or of any library that has the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

#: What compiled code calls, in the order of the table.
IN_TABLE = (
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuStreamWaitEvent",
    "cuStreamIsCapturing",
    "cuStreamQuery",
    "cuStreamSynchronize",
    "cuStreamWriteValue64_v2",
    "cuLaunchKernel",
    "cuGraphLaunch",
    "cuMemsetD32Async",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
)
(
    PUSH_CONTEXT,
    POP_CONTEXT,
    RECORD_EVENT,
    QUERY_EVENT,
    WAIT_EVENT,
    IS_CAPTURING,
    QUERY_STREAM,
    SYNCHRONIZE,
    WRITE_VALUE,
    LAUNCH_KERNEL,
    LAUNCH_GRAPH,
    SET_MEMORY,
    COPY_TO_HOST,
    COPY_ON_DEVICE,
) = range(len(IN_TABLE))

#: The error of what is not done yet: ``CUDA_ERROR_NOT_READY``.
NOT_READY = 600

#: The error of what is not possible in a capture: ``CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED``.
CAPTURED = 900

#: What Python calls besides.
_CALLED = (
    "cuGetErrorName",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuCtxGetStreamPriorityRange",
    "cuThreadExchangeStreamCaptureMode",
    "cuStreamCreateWithPriority",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime",
    "cuEventSynchronize",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer_v2",
    "cuMemFreeHost",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuGraphCreate",
    "cuGraphDestroy",
    "cuGraphAddKernelNode_v2",
    "cuGraphAddMemsetNode",
    "cuGraphInstantiateWithFlags",
    "cuGraphExecDestroy",
)

_OUT_OF_MEMORY = 2


class CudaError(RuntimeError):
    """A function of the driver failed.

    Attributes:
        code: The driver's error, a ``CUresult``.
    """

    def __init__(self, function: str, code: int, name: str) -> None:
        self.code = code
        super().__init__(f"{function} failed with {name}, CUDA's error {code}")

    def is_out_of_memory(self) -> bool:
        """Whether there was no memory for it."""
        return self.code == _OUT_OF_MEMORY


class CudaDriver:
    """A library's functions of the CUDA driver.

    Attributes:
        table: The addresses of those ``IN_TABLE``, int64.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """Finds all functions.

        Raises:
            RuntimeError: If the library lacks one, as a driver older than CUDA 12.0 does.
        """
        for name in (*IN_TABLE, *_CALLED):
            if not hasattr(library, name):
                raise RuntimeError(f"the driver must be of CUDA 12.0 or later: it lacks {name}")
        self._functions = {name: library[name] for name in (*IN_TABLE, *_CALLED)}
        self.table = np.array(
            [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in IN_TABLE],
            np.int64,
        )

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function.

        Args:
            function: Its name, version and all.
            arguments: As ``ctypes`` takes them: integers of 32 bits as they are.

        Raises:
            CudaError: If it fails.
        """
        code: int = self._functions[function](*arguments)
        if code != 0:
            raise self.error(function, code)

    def make(self, function: str, *arguments: Any) -> int:
        """What a function makes, a handle or an address, which it gives by its first argument.

        Raises:
            CudaError: If it fails.
        """
        made = ctypes.c_void_p()
        self.call(function, ctypes.byref(made), *arguments)
        return made.value or 0

    def error(self, function: str, code: int) -> CudaError:
        """The exception of an error that a function has returned."""
        name = ctypes.c_char_p()
        if self._functions["cuGetErrorName"](code, ctypes.byref(name)) != 0 or name.value is None:
            return CudaError(function, code, "an unknown error")
        return CudaError(function, code, name.value.decode())


def address(value: int) -> ctypes.c_void_p:
    """A handle, or an address of 64 bits, as an argument of ``CudaDriver.call``."""
    return ctypes.c_void_p(value)


def address_array(values: Sequence[int]) -> Any:
    """An array of them; it must live as long as the call."""
    return (ctypes.c_void_p * len(values))(*values)


@cache
def system_driver() -> CudaDriver:
    """That of this system.

    Raises:
        OSError: If there is no driver.
    """
    return CudaDriver(ctypes.CDLL("libcuda.so.1"))
