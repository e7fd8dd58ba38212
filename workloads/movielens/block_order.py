"""Orders of samples in which workers beside each other seldom meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hogstream.scheduler import NativeWorker, SharedParameters
from hogstream.workloads.movielens.fold import Fold

#: In so many chunks workers go through an epoch, of some 5 ms each.
CHUNKS = 4
_USER_BLOCKS, _ITEM_BLOCKS = 8, 16


class BlockOrder:
    """Maps a generator to the parts of an epoch, as ``NativeWorker`` takes them.

    Users and items are cut into blocks of neighbours with as many samples each. A part is of one
    block of users, and goes through the blocks of items from one on that no other part begins with.
    So what a worker writes is mostly in its own core's cache; and so are the rows beside it, which
    a processor fetches unasked, and would take away from the core of whoever writes them. Nothing
    keeps two from the same row: that is a race, as ever. Samples are shuffled once, within their
    block; each epoch has the parts in an order of its own.
    """

    def __init__(
        self, users: npt.NDArray[np.int32], items: npt.NDArray[np.int32], seed: int
    ) -> None:
        """Cuts and shuffles.

        Args:
            users: Of each sample: shape (n,).
            items: The same.
            seed: Of the shuffling.
        """
        generator = np.random.default_rng(seed)
        of_user = _cut(np.bincount(users), _USER_BLOCKS)[users]
        of_item = _cut(np.bincount(items), _ITEM_BLOCKS)[items]
        first = of_user * (_ITEM_BLOCKS // _USER_BLOCKS)
        place = of_user * _ITEM_BLOCKS + (of_item - first) % _ITEM_BLOCKS
        order = generator.permutation(len(place))
        order = order[np.argsort(place[order], kind="stable")]
        parts = np.split(order, np.cumsum(np.bincount(of_user))[:-1])
        self._parts = [part for part in parts if len(part)]

    def __call__(self, generator: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        """The parts of an epoch."""
        return [self._parts[index] for index in generator.permutation(len(self._parts))]


def work_in_blocks(
    shared: SharedParameters,
    step: Any,
    features: tuple[npt.NDArray[Any], ...],
    tables: Mapping[str, int],
    fold: Fold,
    seed: int,
) -> NativeWorker:
    """A worker that goes through the training part of a fold in such an order.

    Args:
        shared: What it trains.
        step: As of ``NativeWorker``; its samples are features, and ratings less their mean.
        features: Of each rating of the training part: arrays of one length.
        tables: As of ``NativeWorker``.
        fold: Whose.
        seed: Of the orders.
    """
    users, items = fold.ratings.users[fold.train], fold.ratings.items[fold.train]
    return NativeWorker(
        shared,
        step,
        (*features, fold.centred),
        tables,
        order=BlockOrder(users, items, seed),
        chunk=len(users) // CHUNKS + 1,
        seed=seed,
    )


def _cut(counts: npt.NDArray[np.int64], blocks: int) -> npt.NDArray[np.uint8]:
    """In which block each owner of so many samples is, which has about as many as any other."""
    ends = np.cumsum(counts)
    return ((ends - 1) * blocks // ends[-1]).astype(np.uint8)
