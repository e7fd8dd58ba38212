"""How much a run is to do: so many updates, or as many as it can in a time."""

from __future__ import annotations

import asyncio
import time

from hogstream.scheduler.checks import check_integer, check_number


class Budget:
    """How many updates workers may still submit, in iterations of one each or several.

    Attributes:
        updates: How many are left; None if there is no limit.
    """

    def __init__(self, updates: int | None, seconds: float | None) -> None:
        """Checks the limits.

        Raises:
            TypeError: If one is of a wrong type.
            ValueError: If both are None, or one is out of range.
        """
        if updates is None and seconds is None:
            raise ValueError("updates or seconds must be given, got neither")
        self.updates = None if updates is None else check_integer("updates", updates, at_least=1)
        self._seconds = None if seconds is None else check_number("seconds", seconds, above=0)
        self._deadline: float | None = None
        self._closes = float("inf")  # when no iteration begins any more
        self._under_way = 0
        self._waiting: list[asyncio.Future[None]] = []

    def start(self) -> None:
        """Starts the clock."""
        if self._seconds is not None:
            self._deadline = self._closes = time.perf_counter() + self._seconds

    def stop(self) -> None:
        """Has no iteration begin any more; those under way may take all that is left."""
        self._closes = float("-inf")

    @property
    def stopped(self) -> bool:
        """Whether ``stop`` was called."""
        return self._closes == float("-inf")

    @property
    def closes(self) -> float:
        """When no iteration begins any more, by ``time.perf_counter``."""
        return self._closes

    @property
    def closed(self) -> bool:
        """Whether no iteration begins any more; from any thread."""
        return time.perf_counter() >= self._closes

    @property
    def seconds(self) -> float | None:
        """How long they may still be started; None if there is no limit."""
        if self._deadline is None:
            return self._seconds
        return self._deadline - time.perf_counter()

    def take(self) -> bool:
        """Takes an update, and begins an iteration for it, if there is one left."""
        if time.perf_counter() >= self._closes:
            return False
        if self.updates is not None:
            if self.updates == 0:
                return False
            self.updates -= 1
        self._under_way += 1
        return True

    def take_more(self, count: int) -> int:
        """Takes so many updates more for an iteration, or as many as are left: how many."""
        if self.updates is not None:
            count = min(count, self.updates)
            self.updates -= count
        return count

    def take_part(self, parts: int, most: int, least: int = 0) -> int:
        """Takes more for an iteration, at most so many: how many.

        Args:
            parts: How many workers there are. They all have something to do until the end, if what
                one takes at once becomes less and less.
            most: If there are enough.
            least: If there are so many.
        """
        if self.updates is None:
            return most
        return self.take_more(max(min(self.updates // (4 * parts), most), least))

    async def take_back(self) -> bool:
        """Takes one that another gives back; False if nobody can any more."""
        while self._under_way:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter
            if self.take():
                return True
        return False

    def finish(self) -> None:
        """An iteration has ended, and has given back what it has not submitted."""
        self._under_way -= 1
        if not self._under_way:
            self._wake()

    def give_back(self, count: int) -> None:
        """So many that an iteration has taken come to nothing."""
        if count > 0:
            if self.updates is not None:
                self.updates += count
            self._wake()

    def spend(self, updates: int) -> None:
        """Takes so many, or as many as are left."""
        if self.updates is not None:
            self.updates = max(self.updates - updates, 0)

    def divided(self, parts: int) -> list[Budget]:
        """Budgets for so many to work beside each other; their updates differ by one at most."""
        each = []
        for index in range(parts):
            part = Budget(self.updates, self._seconds)
            if self.updates is not None:
                part.updates = (self.updates + index) // parts
            each.append(part)
        return each

    def is_spent(self) -> bool:
        """Whether all was done that it is for: ``stop`` does not spend it."""
        return self.updates == 0 or (
            self._deadline is not None and time.perf_counter() >= self._deadline
        )

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()
