"""What torch does not do with CUDA streams: make them, destroy them, and copy unseen by it."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

_NON_BLOCKING = 1


def create_stream(device: torch.device) -> torch.cuda.ExternalStream:
    """A non-blocking stream of one's own; ``torch.cuda.Stream()`` hands out 32 in turn.

    It has the highest priority that there is: an update is short, and the sooner it lands, the
    less stale are the gradients that others make meanwhile.

    Raises:
        RuntimeError: If the driver refuses.
    """
    handle, lowest, highest = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    with torch.cuda.device(device):
        make_current(device)
        _call("cuCtxGetStreamPriorityRange", ctypes.byref(lowest), ctypes.byref(highest))
        _call("cuStreamCreateWithPriority", ctypes.byref(handle), _NON_BLOCKING, highest)
    return torch.cuda.ExternalStream(handle.value, device=device)


def make_current(device: torch.device) -> None:
    """Makes a device's context current on the calling thread, as the driver wants it to be."""
    torch.cuda.set_device(device)
    torch.cuda.current_stream(device).query()  # of what asks for a context, it waits for nothing


def destroy_stream(stream: torch.cuda.Stream) -> None:
    """Destroys a stream that ``create_stream`` made, once all on it is done.

    Raises:
        RuntimeError: If the device has failed.
    """
    stream.synchronize()  # torch may give its memory to another stream of the same handle
    _call("cuStreamDestroy_v2", ctypes.c_void_p(stream.cuda_stream))


def copy_to_host(target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
    """Copies a device's tensor to pinned memory, in the order of a stream.

    torch would note the stream in the pinned memory, and come back to it when that is freed, which
    may be after the stream was destroyed.
    """
    _call(
        "cuMemcpyDtoHAsync_v2",
        ctypes.c_void_p(target.data_ptr()),
        ctypes.c_uint64(source.data_ptr()),
        ctypes.c_size_t(source.nbytes),
        ctypes.c_void_p(stream.cuda_stream),
    )


def _call(function: str, *arguments: object) -> None:
    result = getattr(_driver(), function)(*arguments)
    if result != 0:
        raise RuntimeError(f"{function} failed with CUDA error {result}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
