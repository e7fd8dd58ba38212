"""A thread for each worker's blocking calls, which can be left behind if one hangs."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from hogstream.scheduler.thread_state import ThreadState


class WorkerThread:
    """A thread of one worker's own, started at its first call.

    It is always the same one, and not any of a pool: some state of CUDA libraries belongs to a
    thread and its stream. Unlike those of ``concurrent.futures``, it does not keep Python from
    ending if a call never returns.
    """

    def __init__(self, name: str, state: ThreadState | None = None) -> None:
        """Starts nothing.

        Args:
            name: Of the thread.
            state: What the thread starts with; None for what Python gives it.
        """
        self._name = name
        self._state = state
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[[], Any], on_end: Callable[[], None]) -> asyncio.Future[Any]:
        """Has the thread call a function, with the context variables that the caller has.

        Args:
            function: What to call.
            on_end: Called on the event loop when the function has returned or raised, whatever
                became of the future.

        Returns:
            Its result; cancelling it does not end the call.

        Raises:
            RuntimeError: If the thread cannot be started; ``on_end`` is not called then.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()

        def deliver(result: Any, error: BaseException | None) -> None:
            try:
                on_end()
            finally:
                if not future.done():
                    if error is None:
                        future.set_result(result)
                    else:
                        future.set_exception(error)

        def call() -> None:
            result, failure = None, None
            try:
                result = context.run(function)
            except BaseException as error:
                failure = error
            with suppress(RuntimeError):  # the loop is closed: the call outlived its scheduler
                loop.call_soon_threadsafe(deliver, result, failure)
            del failure  # which refers to this frame, and so to all that the function had

        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        self._calls.put(call)
        return future

    def close(self, *, hangs: bool = False) -> None:
        """Ends the thread; one that hangs ends when its call returns, if it ever does."""
        self._calls.put(None)
        if self._thread is not None and not hangs:
            self._thread.join()

    def _run(self) -> None:
        if self._state is not None:
            self._state.enter()
        while (call := self._calls.get()) is not None:
            call()
            del call  # and what it refers to, while the thread waits
