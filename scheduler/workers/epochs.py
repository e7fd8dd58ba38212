"""Epochs of samples, whose parts are dealt to workers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

#: Indices of samples, int64, shape (m,).
Indices = npt.NDArray[np.int64]
#: Maps a generator to the order of an epoch: whole, or in parts.
Order = Callable[[np.random.Generator], Indices | Sequence[Indices]]


class Epochs:
    """Deals the parts of an epoch to workers in turn, and takes care that none is left.

    A worker takes its own first, in their order, so that what it works on stays in its core's
    cache. One that has none left takes the last samples of who has most. The next epoch begins when
    all have been taken.
    """

    def __init__(self, size: int, order: Order | None, generator: np.random.Generator) -> None:
        """Begins none yet.

        Args:
            size: How many samples there are.
            order: Of an epoch; None for a permutation of all samples.
            generator: What orders are drawn from.
        """
        self._size, self._order, self._generator = size, order, generator
        self._parts: dict[int, list[Indices]] = defaultdict(list)  # by worker, the last one first

    def take(self, worker: int, workers: int, count: int) -> list[Indices]:
        """The samples that come next, so many, in parts of at least one.

        Args:
            worker: Whose.
            workers: How many there are.
            count: How many samples.

        Raises:
            ValueError: If ``order`` makes none, or of samples that are not there.
            Exception: Whatever ``order`` raises; no sample is lost then.
        """
        own, taken = self._parts[worker], list[Indices]()
        try:
            while count:
                if not own:
                    self._fill(own, workers, count)
                    continue
                part = own.pop()
                if len(part) > count:
                    own.append(part[count:])
                taken.append(part[:count])
                count -= len(taken[-1])
        except BaseException:
            own += reversed(taken)
            raise
        return taken

    def give_back(self, worker: int, samples: Indices) -> None:
        """Has samples that a worker has taken, and not come to, come next."""
        if len(samples):
            self._parts[worker].append(samples)

    def _fill(self, own: list[Indices], workers: int, count: int) -> None:
        """Gives a worker that has nothing left some of another's, or deals the next epoch."""
        most = max(self._parts.values(), key=lambda parts: sum(map(len, parts)))
        if not most:
            for index, part in enumerate(self._next()):
                if len(part):
                    self._parts[index % workers].insert(0, part)
            return
        last = most.pop(0)
        if len(last) > count:
            most.insert(0, last[:-count])
        own.append(last[-count:])

    def _next(self) -> list[Indices]:
        """The parts of the next epoch."""
        if self._order is None:
            return [self._generator.permutation(self._size)]
        made = self._order(self._generator)
        parts: list[Any] = list(made) if isinstance(made, (list, tuple)) else [made]
        for part in parts:
            _check_part(part, self._size)
        if not sum(map(len, parts)):
            raise ValueError("order must make at least one index, got none")
        # Copies: what made them may change them in place for the next epoch.
        return [part.copy() for part in parts]


def _check_part(part: Any, size: int) -> None:
    is_array = isinstance(part, np.ndarray) and part.dtype == np.int64 and part.ndim == 1
    if not is_array or (len(part) and (part.min() < 0 or part.max() >= size)):
        got = f"{part.dtype}, shape {part.shape}" if isinstance(part, np.ndarray) else repr(part)
        raise ValueError(
            f"order must make arrays of int64, shape (m,), of indices >= 0 and < {size}, got {got}"
        )
