"""The factorisation of Surprise (``scikit-surprise``), to be measured beside ours."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

from hogstream.workloads.movielens.fold import Fold

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


def predict(model: Any, fold: Fold) -> npt.NDArray[np.float64]:
    """Predictions for the test part: shape (m,)."""
    ratings = fold.ratings
    users, items = ratings.users[fold.test], ratings.items[fold.test]
    products = np.einsum("nk,nk->n", model.pu[users], model.qi[items])
    biases = model.trainset.global_mean + model.bu[users] + model.bi[items]
    predicted: npt.NDArray[np.float64] = biases + products
    return predicted
