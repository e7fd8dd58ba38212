"""Biased matrix factorisation of ratings, as a step that Numba compiles.

A rating is predicted as the mean of all, a bias of the user, one of the item, and the product of
their factors (Koren, Bell, Volinsky 2009, "Matrix Factorization Techniques for Recommender
Systems"). A user's bias and factors are one row of a table, and so are an item's: an update touches
two rows. L2 regularisation is the coupled weight decay of the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hogstream.scheduler import NativeWorker, SharedParameters
from hogstream.workloads.movielens.ratings import Indices, Ratings

#: Columns of a table: a bias and 111 factors. A row fills seven cache lines, of which no other has
#: a part: else workers that update neighbours would wait for each other's lines.
WIDTH = 112
#: What factors start from: normal, of this standard deviation.
SPREAD = 0.1
# An epoch goes block by block: the samples of an eighth of the users, and for these a sixteenth of
# the items after the other.
_USER_BLOCKS, _ITEM_BLOCKS = 8, 16


class Fold(NamedTuple):
    """A training part and a test part of ratings.

    Attributes:
        ratings: Of which it is a fold.
        train: Indices of the training part.
        test: Those of the test part.
    """

    ratings: Ratings
    train: Indices
    test: Indices

    @property
    def mean(self) -> np.float32:
        """Of the ratings of the training part."""
        mean: np.float32 = self.ratings.values[self.train].mean(dtype=np.float64).astype(np.float32)
        return mean

    @property
    def samples(self) -> tuple[npt.NDArray[Any], ...]:
        """Users, items and ratings less their mean, of the training part."""
        ratings, train = self.ratings, self.train
        return ratings.users[train], ratings.items[train], ratings.values[train] - self.mean


def make_parameters(ratings: Ratings, width: int, seed: int) -> SharedParameters:
    """New tables, ``users`` and ``items``, of shape (users, width) and (items, width), float32."""
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for name, count in (("users", ratings.user_count), ("items", ratings.item_count)):
        table = SPREAD * torch.randn(count, width, generator=generator)
        table[:, 0] = 0  # biases
        tables[name] = table
    return SharedParameters(tables)


def make_worker(shared: SharedParameters, fold: Fold, seed: int) -> NativeWorker:
    """A worker that factorises the training part of a fold.

    Args:
        shared: From ``make_parameters``.
        fold: Whose.
        seed: Of the orders in which it goes through samples.
    """
    samples = fold.samples
    return NativeWorker(
        shared,
        factorise(),
        samples,
        {"users": 1, "items": 1},
        order=BlockOrder(samples[0], samples[1], seed),
        chunk=len(fold.train) // 4,  # of some 5 ms
        seed=seed,
    )


def rmse(tables: Mapping[str, torch.Tensor], fold: Fold) -> float:
    """The root of the mean squared error over the test part.

    Predictions are cut off at the least and the greatest rating there is, as Surprise does.

    Args:
        tables: By name.
        fold: Whose.
    """
    ratings = fold.ratings
    users, items = (tables[name].numpy() for name in ("users", "items"))
    p, q = users[ratings.users[fold.test]], items[ratings.items[fold.test]]
    predicted = fold.mean + p[:, 0] + q[:, 0] + np.einsum("nk,nk->n", p[:, 1:], q[:, 1:])
    predicted = predicted.clip(ratings.values.min(), ratings.values.max())
    error = predicted.astype(np.float64) - ratings.values[fold.test]
    return float(np.sqrt(np.square(error).mean()))


class BlockOrder:
    """Orders of samples in which workers beside each other seldom meet.

    Users and items are cut into blocks of as many samples each. A part is of one block of users,
    and goes through the blocks of items from one on that no other part begins with. So what a
    worker writes is mostly in its own core's cache. Nothing keeps two from the same row: that is a
    race, as ever. Samples are shuffled once, within their block; each epoch has the parts in an
    order of its own.
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
        of_user = _cut(np.bincount(users), _USER_BLOCKS, generator)[users]
        of_item = _cut(np.bincount(items), _ITEM_BLOCKS, generator)[items]
        first = of_user * (_ITEM_BLOCKS // _USER_BLOCKS)
        place = of_user * _ITEM_BLOCKS + (of_item - first) % _ITEM_BLOCKS
        order = generator.permutation(len(place))
        order = order[np.argsort(place[order], kind="stable")]
        self._parts = np.split(order, np.cumsum(np.bincount(of_user))[:-1])

    def __call__(self, generator: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        """The parts of an epoch."""
        return [self._parts[index] for index in generator.permutation(len(self._parts))]


def _cut(
    counts: npt.NDArray[np.int64], blocks: int, generator: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """In which block each owner of so many samples is, which has about as many as any other."""
    shuffled = generator.permutation(len(counts))
    ends = np.cumsum(counts[shuffled])
    block_of = np.empty(len(counts), np.uint8)
    block_of[shuffled] = (ends - 1) * blocks // ends[-1]
    return block_of


@cache
def factorise() -> Any:
    """The step, compiled; sums of products may be added in any order."""
    import numba

    return numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})(_factorise)


def _factorise(parameters: Any, samples: Any, state: Any) -> Any:
    users, items = parameters
    of_user, of_item, ratings = samples
    user, item = of_user[state.sample], of_item[state.sample]
    p, q = users[user], items[item]
    predicted = p[0] + q[0]
    for factor in range(1, len(p)):
        predicted += p[factor] * q[factor]
    error = predicted - ratings[state.sample]
    state.rows[0][0], state.rows[1][0] = user, item
    of_p, of_q = state.grads[0][0], state.grads[1][0]
    of_p[0] = of_q[0] = error
    for factor in range(1, len(p)):
        of_p[factor] = error * q[factor]
        of_q[factor] = error * p[factor]
    return error * error
