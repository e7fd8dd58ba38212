"""A factorisation machine of degree 2, as a step that Numba compiles (Rendle 2010, ICDM).

A sample has some features, each with a weight and factors in one row of a table. Its prediction is
the mean of all ratings, plus the weights, plus the product of the factors of each two features. All
pairs are had from the sum of the factors, and of their squares, in time that follows the features.

Features are the user, the item, and how many ratings either has in the training part: in which
tenth of the users, or of the items, that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hogstream.scheduler import NativeWorker, SharedParameters
from hogstream.workloads.movielens.block_order import work_in_blocks
from hogstream.workloads.movielens.factorization import SPREAD
from hogstream.workloads.movielens.fold import Fold

#: How many features a sample has.
FEATURES = 4
_TENTHS = 10


def features(fold: Fold) -> npt.NDArray[np.int32]:
    """Those of each rating, by their numbers in the table: int32, shape (n, FEATURES)."""
    ratings = fold.ratings
    columns: list[npt.NDArray[Any]] = [ratings.users, ratings.items]
    counts = ratings.user_count, ratings.item_count
    for owners, count in zip((ratings.users, ratings.items), counts, strict=True):
        known = np.bincount(owners[fold.train], minlength=count)
        columns.append(_tenths(known)[owners])
    firsts = np.cumsum([0, *counts, _TENTHS])
    numbered: npt.NDArray[np.int32] = (np.stack(columns, axis=1) + firsts).astype(np.int32)
    return numbered


def _tenths(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """In which tenth of all each one is, by its count."""
    ranks = np.empty(len(counts), np.int64)
    ranks[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    return ranks * _TENTHS // len(counts)


def make_parameters(fold: Fold, width: int, seed: int) -> SharedParameters:
    """A new table ``features``, of shape (features, width), float32."""
    generator = torch.Generator().manual_seed(seed)
    count = fold.ratings.user_count + fold.ratings.item_count + 2 * _TENTHS
    table = SPREAD * torch.randn(count, width, generator=generator)
    table[:, 0] = 0  # weights
    return SharedParameters({"features": table})


def make_worker(shared: SharedParameters, fold: Fold, workers: int, seed: int) -> NativeWorker:
    """A worker that learns the training part of a fold.

    Args:
        shared: From ``make_parameters``.
        fold: Whose.
        workers: How many there are.
        seed: Of the orders in which it goes through samples.
    """
    of_ratings = features(fold)[fold.train]
    tables = {"features": FEATURES}
    return work_in_blocks(shared, learn(), (of_ratings,), tables, fold, workers, seed)


def predict(tables: Mapping[str, torch.Tensor], fold: Fold) -> npt.NDArray[np.float32]:
    """Predictions for the test part: shape (m,).

    Args:
        tables: By name, as of ``make_parameters``.
        fold: Whose.
    """
    rows = tables["features"].numpy()[features(fold)[fold.test]]  # (m, FEATURES, width)
    factors = rows[:, :, 1:]
    pairs = np.square(factors.sum(1)).sum(1) - np.square(factors).sum((1, 2))
    predicted: npt.NDArray[np.float32] = fold.mean + rows[:, :, 0].sum(1) + pairs / 2
    return predicted


@cache
def learn() -> Any:
    """The step, compiled; sums of products may be added in any order."""
    import numba

    return numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})(_learn)


def _learn(parameters: Any, samples: Any, state: Any) -> Any:
    table, (of_sample, ratings) = parameters[0], samples
    rows, grads = state.rows[0], state.grads[0]
    predicted = -ratings[state.sample]
    width = table.shape[1]
    for place in range(len(rows)):
        rows[place] = of_sample[state.sample, place]
        predicted += table[rows[place], 0]
    for factor in range(1, width):
        total = table[rows[0], factor]
        squares = total * total
        for place in range(1, len(rows)):
            value = table[rows[place], factor]
            total += value
            squares += value * value
        predicted += (total * total - squares) / 2
        grads[0, factor] = total  # for now
    error = predicted
    for place in range(len(rows) - 1, -1, -1):
        grads[place, 0] = error
        for factor in range(1, width):
            grads[place, factor] = error * (grads[0, factor] - table[rows[place], factor])
    return error * error
