"""What workers of a process report while they run, on its way to the parent."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence
from functools import partial
from typing import Any

from hogstream.scheduler.callbacks import Callbacks
from hogstream.scheduler.processes.channel import Channel

# What is gathered goes in one piece, so long after the one before: a message costs as much as some
# updates, on both sides. What comes later than that goes at once: the next iteration may be long.
_GATHERED_SECONDS = 0.01

#: A worker's number in its process, what it reports, and that itself: a result is pickled.
Reported = tuple[int, str, Any]


class Outbox(Callbacks):
    """Gathers losses and results in a process, and sends them in their order."""

    def __init__(self, channel: Channel, *, losses: bool, results: bool) -> None:
        """Gathers nothing yet.

        Args:
            channel: To the parent.
            losses: Whether it wants to know of losses.
            results: Whether it wants to know of what workers send.
        """
        super().__init__(
            partial(self._add, "loss") if losses else None,
            partial(self._add, "result") if results else None,
            end_run=lambda: None,
        )
        self._channel = channel
        self._gathered: list[Reported] = []
        self._loop = asyncio.get_running_loop()
        self._sent = self._loop.time() - _GATHERED_SECONDS

    def report_result(self, worker: int, value: Any) -> None:
        """Gathers a result, as it is now.

        Raises:
            TypeError: If it cannot be pickled.
        """
        if not self.hears_results:
            return
        try:
            pickled = pickle.dumps(value)
        except Exception as error:
            raise TypeError(
                f"value must be something that can be pickled, got {type(value).__name__}: {error}"
            ) from error
        super().report_result(worker, pickled)

    def send(self) -> None:
        """Sends all that was gathered."""
        if self._gathered:
            self._channel.send("reported", self._gathered)
            self._gathered = []
            self._sent = self._loop.time()

    def _add(self, kind: str, worker: int, content: Any) -> None:
        if not self._gathered:
            self._loop.call_at(self._sent + _GATHERED_SECONDS, self.send)
        self._gathered.append((worker, kind, content))


def report_to(callbacks: Callbacks, first: int, reported: Sequence[Reported]) -> None:
    """Calls, in the parent, for what a process has sent.

    Args:
        callbacks: Who hears of it. A result that cannot be unpickled here ends the run.
        first: The number of the process's first worker among those of all.
        reported: What it has sent, in order.
    """
    for worker, kind, content in reported:
        if kind == "loss":
            callbacks.report_loss(first + worker, content)
            continue
        try:
            value = pickle.loads(content)
        except Exception as error:
            callbacks.fail(error)
        else:
            callbacks.report_result(first + worker, value)
