"""The factorisation of Surprise (``scikit-surprise``), to be measured beside ours."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from hogstream.workloads.movielens.factorization import Fold

#: How many its ``SVD`` takes by default.
EPOCHS = 20


def svd(seed: int) -> Any:
    """Its ``SVD``, with all defaults: 100 factors, 20 epochs, lr 0.005, regularisation 0.02.

    Its RMSE on MovieLens-100K is 0.934, as it publishes (https://surpriselib.com).
    """
    from surprise import SVD

    return SVD(random_state=seed)


def trainset(fold: Fold) -> Any:
    """The training part of a fold, as it takes it."""
    from surprise.trainset import Trainset

    ratings = fold.ratings
    of_users, of_items = defaultdict(list), defaultdict(list)
    columns = (each[fold.train].tolist() for each in (ratings.users, ratings.items, ratings.values))
    for user, item, value in zip(*columns, strict=True):
        of_users[user].append((item, value))
        of_items[item].append((user, value))
    scale = float(ratings.values.min()), float(ratings.values.max())
    users, items = range(ratings.user_count), range(ratings.item_count)
    return Trainset(
        of_users,
        of_items,
        len(users),
        len(items),
        len(fold.train),
        scale,
        {user: user for user in users},
        {item: item for item in items},
    )


def rmse(model: Any, fold: Fold) -> float:
    """The root of the mean squared error over the test part, as of ours."""
    ratings = fold.ratings
    users, items = ratings.users[fold.test], ratings.items[fold.test]
    products = np.einsum("nk,nk->n", model.pu[users], model.qi[items])
    predicted = model.trainset.global_mean + model.bu[users] + model.bi[items] + products
    predicted = predicted.clip(ratings.values.min(), ratings.values.max())
    return float(np.sqrt(np.square(predicted - ratings.values[fold.test]).mean()))
