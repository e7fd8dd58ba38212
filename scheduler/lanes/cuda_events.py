"""Waits for events of CUDA without blocking an event loop, with a scheduler or without."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import numpy as np
import torch

from hogstream.scheduler.forks import let_go_in_forks
from hogstream.scheduler.lanes import cuda_device
from hogstream.scheduler.lanes.cuda_device import CudaDevice


async def cuda_event_done(event: torch.cuda.Event) -> None:
    """Waits until the device has come to an event, without blocking the event loop.

    Nothing calls back into Python from the device's driver, so it cannot deadlock: one thread for
    all waits asks the driver for the events, free of the GIL, and ends when nobody waits. A wait
    may be cancelled.

    Args:
        event: One that was recorded, on any stream of any GPU.

    Raises:
        TypeError: If it is no ``torch.cuda.Event``.
        ValueError: If it was not recorded, or is of no NVIDIA GPU.
        OSError: If there is no driver.
        RuntimeError: If Numba is missing, which compiles what asks, or the device has failed.
    """
    if not isinstance(event, torch.cuda.Event):
        raise TypeError(f"event must be a torch.cuda.Event, got {type(event).__name__}")
    if not event.cuda_event:
        raise ValueError("event must have been recorded, got one that was not")
    device = cuda_device.gpu_of(event.device)
    if device is None:
        raise ValueError(f"event must be of an NVIDIA GPU, got one of {event.device}")
    await _watcher.done(_Wait(event, device))


class _Wait:
    """A coroutine that waits for an event.

    Attributes:
        device: Of the event.
        future: Done when the event is.
    """

    def __init__(self, event: torch.cuda.Event, device: CudaDevice) -> None:
        self._event = event  # which must live as long
        self.device = device
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self._loop.create_future()

    def words(self) -> list[int]:
        """As the compiled function reads it."""
        device = self.device
        return [device.driver.table.ctypes.data, device.context, self._event.cuda_event, 0, 0, 0]

    def end(self, error: BaseException | None = None) -> None:
        """The device has come to it, or nobody will know; on the watcher's thread."""
        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._deliver, error)

    def error(self, code: int) -> BaseException | None:
        """What an error of the driver is; None for 0."""
        return self.device.driver.error("cuEventQuery", code) if code else None

    def _deliver(self, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)


class _Watcher:
    """A thread that asks for events, as long as anybody waits."""

    def __init__(self) -> None:
        self._begin()
        let_go_in_forks(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._waits: list[_Wait] = []
        self._thread: threading.Thread | None = None
        self._changed = np.zeros(1, np.int64)  # set when there is more to ask for, or less

    def let_go(self) -> None:
        """Forgets, in a child of ``os.fork``, what the parent waits for."""
        self._begin()

    async def done(self, wait: _Wait) -> None:
        """Waits; the thread has let go of the event then."""
        with self._lock:
            self._waits.append(wait)
            self._changed[0] = 1
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._watch, name="hogstream-events", daemon=True
                )
                self._thread.start()
        try:
            await wait.future
        finally:
            self._forget(wait)

    def _forget(self, wait: _Wait) -> None:
        with self._lock:
            if wait in self._waits:
                self._waits.remove(wait)
                self._changed[0] = 1

    def _watch(self) -> None:
        entered: set[CudaDevice] = set()
        while waits := self._begin_look():
            try:
                self._look(waits, entered)
            except BaseException as error:  # whatever it is, nobody waits for ever
                for wait in waits:
                    self._forget(wait)
                    wait.end(error)
            del waits

    def _look(self, waits: list[_Wait], entered: set[CudaDevice]) -> None:
        """Asks for events until one is done, or there are others to ask for."""
        from hogstream.scheduler.lanes import cuda_event_loop  # which needs Numba

        for device in {wait.device for wait in waits} - entered:
            device.disturb_no_capture()
            entered.add(device)
        events = np.array([wait.words() for wait in waits], np.int64)
        cuda_event_loop.watch(events.ctypes.data, len(waits), self._changed.ctypes.data)
        for wait, words in zip(waits, events.tolist(), strict=True):
            if words[cuda_event_loop.IS_DONE]:
                self._forget(wait)
                wait.end(wait.error(words[cuda_event_loop.EVENT_ERROR]))

    def _begin_look(self) -> list[_Wait]:
        """What to ask for now; if nothing, the thread ends."""
        with self._lock:
            self._changed[0] = 0
            if not self._waits:
                self._thread = None
            return list(self._waits)


_watcher = _Watcher()
