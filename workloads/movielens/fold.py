"""A part of ratings to train on, and one to test on."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hogstream.workloads.movielens.ratings import Indices, Ratings


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
    def centred(self) -> npt.NDArray[np.float32]:
        """The ratings of the training part, less their mean: shape (n,)."""
        centred: npt.NDArray[np.float32] = self.ratings.values[self.train] - self.mean
        return centred

    def rmse(self, predicted: npt.NDArray[Any]) -> float:
        """The root of the mean squared error over the test part.

        Predictions are cut off at the least and the greatest rating there is, as Surprise does.

        Args:
            predicted: Of each rating of the test part: shape (m,).
        """
        values = self.ratings.values
        predicted = predicted.clip(values.min(), values.max()).astype(np.float64)
        return float(np.sqrt(np.square(predicted - values[self.test]).mean()))
