"""Orders of samples in which workers beside each other seldom meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hogstream.scheduler import NativeWorker, SharedParameters
from hogstream.workloads.movielens.fold import Fold

#: In so many chunks, or more, workers go through an epoch: of some 5 ms each.
CHUNKS = 4
# Of users, and of items, about so many: a block of either fits into a core's own cache.
_USER_BLOCKS, _ITEM_BLOCKS = 8, 16


class BlockOrder:
    """Maps a generator to the parts of an epoch, as ``NativeWorker`` takes them.

    There are as many groups of users, and of items, as workers, and a part of an epoch for each
    group of either. As they are dealt, a worker has a group of users for its own, and goes from one
    group of items to the next, in which no other worker is if all are as fast (Gemulla et al. 2011,
    "Large-Scale Matrix Factorization with Distributed Stochastic Gradient Descent"). So what it
    writes is mostly in its own core's cache. Nothing keeps two from the same row: that is a race,
    as ever.

    Groups are of neighbours: a processor fetches the rows beside a row unasked, and would take them
    away from the core of whoever writes them. Within a part samples go from block to block of users
    and items, smaller than a cache, and are shuffled once within these.
    """

    def __init__(
        self, users: npt.NDArray[np.int32], items: npt.NDArray[np.int32], workers: int, seed: int
    ) -> None:
        """Cuts and shuffles.

        Args:
            users: Of each sample: shape (n,).
            items: The same.
            workers: How many there are.
            seed: Of the shuffling.
        """
        self._workers = workers
        of_user, user_group = _cut(np.bincount(users), workers, _USER_BLOCKS)[:, users]
        of_item, item_group = _cut(np.bincount(items), workers, _ITEM_BLOCKS)[:, items]
        part = user_group * workers + (item_group - user_group) % workers
        order = np.random.default_rng(seed).permutation(len(part))
        order = order[np.lexsort((of_item[order], of_user[order], part[order]))]
        ends = np.cumsum(np.bincount(part, minlength=workers * workers))
        self._parts = np.split(order, ends[:-1])

    def __call__(self, generator: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        """The parts of an epoch: the first of each worker, then the second of each, and so on."""
        rounds = generator.permutation(self._workers)
        each = range(self._workers)
        return [self._parts[worker * self._workers + turn] for turn in rounds for worker in each]


def work_in_blocks(
    shared: SharedParameters,
    step: Any,
    features: tuple[npt.NDArray[Any], ...],
    tables: Mapping[str, int],
    fold: Fold,
    workers: int,
    seed: int,
) -> NativeWorker:
    """A worker that goes through the training part of a fold in such an order.

    Args:
        shared: What it trains.
        step: As of ``NativeWorker``; its samples are features, and ratings less their mean.
        features: Of each rating of the training part: arrays of one length.
        tables: As of ``NativeWorker``.
        fold: Whose.
        workers: How many there are.
        seed: Of the orders.
    """
    users, items = fold.ratings.users[fold.train], fold.ratings.items[fold.train]
    return NativeWorker(
        shared,
        step,
        (*features, fold.centred),
        tables,
        order=BlockOrder(users, items, workers, seed),
        chunk=len(users) // max(CHUNKS, 2 * workers) + 1,
        seed=seed,
    )


def _cut(counts: npt.NDArray[np.int64], groups: int, blocks: int) -> npt.NDArray[np.int64]:
    """In which block each owner of so many samples is, and in which group: shape (2, owners).

    All blocks have about as many samples, and each is of one group.
    """
    each = -(-blocks // groups)
    ends = np.cumsum(counts)
    block = (ends - 1) * (groups * each) // ends[-1]
    return np.stack([block, block // each])
