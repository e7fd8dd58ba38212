"""MovieLens: ratings of films, read from files, downloaded if asked for, and cut into folds."""

from hogstream.workloads.movielens.download import LICENCE, download_ml_100k
from hogstream.workloads.movielens.ratings import Ratings, folds, read_ratings

__all__ = ["LICENCE", "Ratings", "download_ml_100k", "folds", "read_ratings"]
