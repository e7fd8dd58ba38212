"""Ctrl-C during a measurement that runs under asyncio."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator
from typing import TypeVar

T = TypeVar("T")


def gather_until_interrupted(measure: AsyncIterator[T]) -> tuple[list[T], bool]:
    """Runs a measurement to its end, or until SIGINT.

    The first SIGINT cancels the measurement, which may clean up, and yield what it has by then. A
    second one ends the process as usual.

    Args:
        measure: Yields results.

    Returns:
        The results, and whether they are partial.

    Raises:
        KeyboardInterrupt: If interrupted before there was any result.
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
        asyncio.run(gather())
    except asyncio.CancelledError:
        if not results:
            raise KeyboardInterrupt from None
        return results, True
    return results, False
