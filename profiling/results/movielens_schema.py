"""The result file of ``hogstream movielens``: ratings factorised, by cross-validation."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from hogstream.profiling.results.records import (
    Count,
    Measurement,
    Number,
    Positive,
    PositiveSpread,
    Ratio,
    Record,
    SignedSpread,
    Size,
)


class MovieLensSettings(Record):
    """What ``movielens`` was asked for.

    Attributes:
        data: The name of the file.
        model: ``mf`` for biased matrix factorisation, ``fm`` for a factorisation machine.
        ratings: How many there are.
        users: Of how many users.
        items: Of how many items.
        width: Columns of a table: a bias and factors.
        workers: How many, of each policy.
        epochs: How many a training took.
        target: RMSE that was to be reached.
        folds: How many the ratings were cut into.
        repeats: How often each was trained.
        seed: Of folds, first values and orders.
        hyperparameters: Numbers and switches of the update, by name.
    """

    data: str
    model: str
    ratings: Size
    users: Size
    items: Size
    width: Size
    workers: Size
    epochs: Size
    target: Positive
    folds: Size
    repeats: Size
    seed: Count
    hyperparameters: dict[str, float | bool]


class MovieLensRun(Record):
    """Trainings by a policy, by one worker alone (lock-free), or by Surprise's ``SVD``.

    Samples are of folds: all of the first repeat, then all of the next.

    Attributes:
        name: Who trained.
        workers: How many there were.
        seconds: Of a training; tables are copied meanwhile, and evaluated later.
        epochs: How many that took.
        rmse: On the part held out, in the end.
        curve: Of the first fold: seconds since the start, epochs, and RMSE; of Surprise, which
            cannot be evaluated meanwhile, in the end.
        reached: Whether the target was, in each fold.
        seconds_to_target: By a line between the copies before and after; of a fold that did not
            reach it, until its end: it would have taken longer.
        staleness: The mean; null if not known.
        gains: How many times as fast it reached the target as each other, by name, if it did in all
            folds.
    """

    name: str
    workers: Size
    seconds: PositiveSpread
    epochs: Size
    rmse: SignedSpread
    curve: Annotated[list[tuple[Number, Number, Number]], Meta(min_length=1)]
    reached: list[bool]
    seconds_to_target: PositiveSpread
    staleness: Number | None
    gains: dict[str, Ratio]


class MovieLens(Measurement, kw_only=True, tag="movielens"):
    """``hogstream movielens``: policies first, then those beside them."""

    settings: MovieLensSettings
    results: Annotated[list[MovieLensRun], Meta(min_length=1)]
