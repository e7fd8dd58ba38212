"""Lanes on a GPU: each a CUDA stream of its own, and one thread that sees updates land."""

from __future__ import annotations

import ctypes
import threading
import time
from contextlib import AbstractContextManager, ExitStack
from queue import Empty, SimpleQueue

import torch

from hogstream.scheduler.lanes import Lane
from hogstream.scheduler.updates import Landings, Update

_CU_STREAM_NON_BLOCKING = 1
_BACK_OFF_SECONDS = (10e-6, 1e-3)


class CudaLane:
    """A lane that is a CUDA stream, owned by it and not from torch's pool of 32."""

    def __init__(self, device: torch.device, watcher: _Watcher) -> None:
        self._watcher = watcher
        self._handle = _create_stream(device)
        self._stream = torch.cuda.ExternalStream(self._handle.value, device=device)

    def launch(self, update: Update) -> None:
        """Launches an update on the stream, after all that its gradient depends on."""
        try:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                if update.after is not None and update.after.on_device is not None:
                    self._stream.wait_event(update.after.on_device)
                update.apply()
                update.on_device = self._stream.record_event(torch.cuda.Event())
        except BaseException as error:
            update.error = error
            if update.after is not None:
                update.on_device = update.after.on_device  # for the next in order to wait on
            if not isinstance(error, Exception):
                raise
        finally:
            self._watcher.watch(update)  # failed or not, it lands, and nobody waits for ever

    def computing(self) -> AbstractContextManager[object]:
        """Makes the lane's stream the current one, after the caller's current one."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def close(self) -> None:
        """Destroys the stream, once it is through."""
        self._stream.synchronize()
        _check(_driver().cuStreamDestroy_v2(self._handle), "cuStreamDestroy")


class CudaLanes:
    """A stream for each lane, and the watcher that they share."""

    def __init__(self, device: torch.device, count: int, landings: Landings) -> None:
        if torch.version.hip is not None:
            raise ValueError(f"shared must be on a CUDA or CPU device, got ROCm's {device}")
        self._watcher = _Watcher(landings)
        self.lanes: list[Lane] = []
        try:
            for _ in range(count):
                self.lanes.append(CudaLane(device, self._watcher))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Destroys every stream and ends the watcher."""
        with ExitStack() as each:  # also if one fails
            each.callback(self._watcher.close)
            for lane in self.lanes:
                each.callback(lane.close)


class _Watcher:
    """A thread that polls the events of updates in flight, and backs off when none has landed.

    A host callback in its place would wait for the GIL while it holds the driver's lock, and
    deadlock; ``event.synchronize`` would need a thread for each update in flight.
    """

    def __init__(self, landings: Landings) -> None:
        self._landings = landings
        self._launched: SimpleQueue[Update | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="hogstream-watcher", daemon=True)
        self._thread.start()

    def watch(self, update: Update) -> None:
        self._launched.put(update)

    def close(self) -> None:
        self._launched.put(None)
        self._thread.join()

    def _watch(self) -> None:
        in_flight: list[Update] = []
        shortest, longest = _BACK_OFF_SECONDS
        pause = shortest
        while True:
            try:
                while (update := self._launched.get(block=not in_flight)) is not None:
                    in_flight.append(update)
                return
            except Empty:
                pass
            still = [update for update in in_flight if not self._has_landed(update)]
            if len(still) < len(in_flight):
                pause = shortest
            else:
                time.sleep(pause)
                pause = min(2 * pause, longest)
            in_flight = still

    def _has_landed(self, update: Update) -> bool:
        if update.after is not None and update.after.landed_ns == 0:
            return False  # so that landings keep the order of the device
        try:
            if update.error is None and not update.on_device.query():
                return False
        except RuntimeError as error:  # the device failed
            update.error = error
        update.after = None  # or each update would keep all before it alive
        update.landed_ns = time.perf_counter_ns()
        self._landings.append(update)
        return True


def _create_stream(device: torch.device) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # makes the device's context current on this thread
        created = _driver().cuStreamCreate(ctypes.byref(handle), _CU_STREAM_NON_BLOCKING)
    _check(created, "cuStreamCreate")
    return handle


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(result: int, function: str) -> None:
    if result != 0:
        raise RuntimeError(f"{function} failed with CUDA error {result}")
