"""Biased matrix factorisation of ratings, as a step that Numba compiles.

A rating is predicted as the mean of all, a bias of the user, one of the item, and the product of
their factors (Koren, Bell, Volinsky 2009, "Matrix Factorization Techniques for Recommender
Systems"). A user's bias and factors are one row of a table, and so are an item's: an update touches
two rows. L2 regularisation is the coupled weight decay of the update.
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
from hogstream.workloads.movielens.fold import Fold

#: Columns of a table: a bias and 111 factors. A row fills seven cache lines, of which no other has
#: a part: else workers that update neighbours would wait for each other's lines.
WIDTH = 112
#: What factors start from: normal, of this standard deviation.
SPREAD = 0.1


def make_parameters(fold: Fold, width: int, seed: int) -> SharedParameters:
    """New tables, ``users`` and ``items``, of shape (users, width) and (items, width), float32."""
    generator, ratings = torch.Generator().manual_seed(seed), fold.ratings
    counts = {"users": ratings.user_count, "items": ratings.item_count}
    tables = {
        name: SPREAD * torch.randn(count, width, generator=generator)
        for name, count in counts.items()
    }
    for table in tables.values():
        table[:, 0] = 0  # biases
    return SharedParameters(tables)


def make_worker(shared: SharedParameters, fold: Fold, workers: int, seed: int) -> NativeWorker:
    """A worker that factorises the training part of a fold.

    Args:
        shared: From ``make_parameters``.
        fold: Whose.
        workers: How many there are.
        seed: Of the orders in which it goes through samples.
    """
    features = fold.ratings.users[fold.train], fold.ratings.items[fold.train]
    tables = {"users": 1, "items": 1}
    return work_in_blocks(shared, factorise(), features, tables, fold, workers, seed)


def predict(tables: Mapping[str, torch.Tensor], fold: Fold) -> npt.NDArray[np.float32]:
    """Predictions for the test part: shape (m,).

    Args:
        tables: By name, as of ``make_parameters``.
        fold: Whose.
    """
    ratings = fold.ratings
    users, items = (tables[name].numpy() for name in ("users", "items"))
    p, q = users[ratings.users[fold.test]], items[ratings.items[fold.test]]
    products = np.einsum("nk,nk->n", p[:, 1:], q[:, 1:])
    predicted: npt.NDArray[np.float32] = fold.mean + p[:, 0] + q[:, 0] + products
    return predicted


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
