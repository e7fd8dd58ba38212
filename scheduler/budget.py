"""How much a run is to do: so many updates, or as many as it can in a time."""

from __future__ import annotations

import copy
import time

from hogstream.scheduler.checks import check_integer, check_number


class Budget:
    """How many iterations workers may still start.

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
        self._deadline = float("inf")

    def start(self) -> None:
        """Starts the clock."""
        if self._seconds is not None:
            self._deadline = time.perf_counter() + self._seconds

    @property
    def seconds(self) -> float | None:
        """How long they may still be started; None if there is no limit."""
        if self._seconds is None:
            return None
        return min(self._deadline - time.perf_counter(), self._seconds)

    def take(self) -> bool:
        """Takes an iteration, if there is one left."""
        if self.is_spent():
            return False
        if self.updates is not None:
            self.updates -= 1
        return True

    def give_back(self) -> None:
        """Returns one that came to nothing."""
        if self.updates is not None:
            self.updates += 1

    def spend(self, updates: int) -> None:
        """Takes so many, or as many as are left."""
        if self.updates is not None:
            self.updates = max(self.updates - updates, 0)

    def divided(self, parts: int) -> list[Budget]:
        """Budgets for so many to work beside each other; their updates differ by one at most."""
        each = [copy.copy(self) for _ in range(parts)]
        if self.updates is not None:
            for index, part in enumerate(each):
                part.updates = (self.updates + index) // parts
        return each

    def is_spent(self) -> bool:
        """Whether no iteration may be started any more."""
        return self.updates == 0 or time.perf_counter() >= self._deadline
