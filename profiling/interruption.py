"""Measurements that run under asyncio and may be cut short: by Ctrl-C, or by a worker's failure."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TypeVar

from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.event_loop import run
from hogstream.scheduler import WorkerError

T = TypeVar("T")


@dataclass(frozen=True)
class End:
    """How a measurement ended, as a result says it.

    Attributes:
        partial: Whether it was cut short.
        error: Why workers failed, which cut it short; None if they did not.
    """

    partial: bool = False
    error: str | None = None


def gather_until_interrupted(measure: AsyncIterator[T]) -> tuple[list[T], End]:
    """Runs a measurement to its end, or until SIGINT, or until workers or it fail.

    The first SIGINT cancels the measurement, which may clean up, and yield what it has by then. A
    second one ends the process as usual.

    Args:
        measure: Yields results.

    Returns:
        The results, and how it ended.

    Raises:
        KeyboardInterrupt: If interrupted before there was any result.
        MeasurementError: If workers failed before there was any result.
    """
    results: list[T] = []

    async def gather() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def interrupt() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            task.cancel()

        # Not Python's own handler: its KeyboardInterrupt may strike while a loop is made or closed,
        # and up to Python 3.10 anywhere.
        if threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            async for result in measure:
                results.append(result)  # noqa: PERF401 (extend would lose them when cancelled)
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    try:
        run(gather())
    except asyncio.CancelledError:
        if not results:
            raise KeyboardInterrupt from None
        return results, End(partial=True)
    except (WorkerError, MeasurementError) as error:
        if not results:
            raise MeasurementError(str(error)) from error
        return results, End(partial=True, error=str(error))
    return results, End()
