"""Bursts: the thread that computes a worker's gradients applies their updates too."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter, perf_counter_ns

from hogstream.scheduler.budget import Budget
from hogstream.scheduler.lanes.base import Applier
from hogstream.scheduler.update import Update

#: How long a burst lasts on a worker's own thread: then the event loop hears of what has landed,
#: which takes some 0.1 ms there and back.
SECONDS = 10e-3
#: And on the event loop's thread, which has messages to read.
SECONDS_ON_LOOP = 1e-3
#: More updates than can be made in that time.
MOST_UPDATES = 1024


class Burst:
    """Updates of one worker, made one after the other on the thread that calls ``run``.

    Each needs a permit. The thread takes one when it is about to apply an update; the event loop
    takes all that are left, and with that the burst is over, whatever is computed still.

    Attributes:
        updates: How many it may make.
        landed: Those that it has made, in order; for the event loop, when ``run`` has ended.
    """

    def __init__(
        self,
        make_update: Callable[[], Update],
        applier: Applier,
        updates: int,
        seconds: float,
        budget: Budget,
    ) -> None:
        """Begins nothing.

        Args:
            make_update: Computes a gradient.
            applier: Applies its update.
            updates: How many may be made, at least 1: taken from the budget.
            seconds: After which no further one is begun.
            budget: Of the run; once it is closed, no further one is begun.
        """
        self.updates = updates
        self.landed: list[Update] = []
        self._make_update = make_update
        self._applier = applier
        self._seconds = seconds
        self._budget = budget
        self._permits = [None] * updates  # for ``pop``, which no other thread can come between

    @property
    def made(self) -> int:
        """How many updates it has made."""
        return len(self.landed)

    def run(self) -> None:
        """Makes updates until there is no time left, or no permit, or one is left out or fails.

        Raises:
            Exception: Whatever a computation raises; the updates before it have landed.
        """
        until, process = perf_counter() + self._seconds, os.getpid()
        while self._permits:
            update = self._make_update()
            if os.getpid() != process:  # forked meanwhile: the burst is the parent's
                return
            if not self._take_permit():
                return
            self._apply(update)
            failed = update.error is not None or update.nonfinite
            if failed or perf_counter() >= until or self._budget.closed:
                return

    def end(self) -> int:
        """Has it make no more, from any thread: how many it has made, or is about to."""
        left = 0
        while self._take_permit():
            left += 1
        return self.updates - left

    def _take_permit(self) -> bool:
        try:
            self._permits.pop()
        except IndexError:
            return False
        return True

    def _apply(self, update: Update) -> None:
        """Applies an update; whatever goes wrong is its error, as on a lane."""
        try:
            self._applier.apply(update)
        except BaseException as error:
            update.error = error
            update.started_ns = update.landed_ns = perf_counter_ns()
            if not isinstance(error, Exception):
                raise
        finally:
            update.grad = None  # whose memory the next gradient may have
            self.landed.append(update)
