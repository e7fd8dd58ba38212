"""A worker's turn: the thread that computes its gradients applies their updates too."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from hogstream.scheduler.budget import Budget
from hogstream.scheduler.lanes.base import Applier
from hogstream.scheduler.update import Update

#: How long a turn lasts on a worker's own thread: then the event loop hears of what has landed,
#: which takes some 0.1 ms there and back.
SECONDS_PER_TURN = 10e-3
#: And on the event loop's thread, which has messages to read.
SECONDS_ON_LOOP = 1e-3
#: More updates than can be made in that time.
MOST_UPDATES = 1024


class Turn:
    """Updates of one worker, made one after the other on the thread that calls ``make_updates``.

    Each needs a permit. The thread takes one when it is about to apply an update; the event loop
    takes all that are left, and with that the turn is over, whatever is computed still.

    Attributes:
        updates: How many it may make.
        landed: Those that it has made, in order; for the event loop, when it is over.
        ended: Whether it makes no more.
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
            budget: Of the run; once it is closed, no further update is begun.
        """
        self.updates = updates
        self.landed: list[Update] = []
        self.ended = False
        self._make_update = make_update
        self._applier = applier
        self._seconds = seconds
        self._budget = budget
        self._permits = [None] * updates  # for ``pop``, which no other thread can come between

    def make_updates(self) -> None:
        """Makes updates until there is no time left, or no permit, or one is left out or fails.

        Raises:
            Exception: Whatever a computation raises; the updates before it have landed.
        """
        until = perf_counter() + self._seconds
        while True:
            update = self._make_update()
            if not self._take_permit():
                return
            try:
                self._applier.apply(update)
            except BaseException as error:
                update.error = error
                raise
            finally:
                update.grad = None  # whose memory the next gradient may have
                self.landed.append(update)
            failed = update.error is not None or update.nonfinite
            if failed or not self._permits or perf_counter() >= until or self._budget.closed:
                return

    def end(self) -> int:
        """Has it make no more, from any thread: how many it has made, or is about to."""
        self.ended = True
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
