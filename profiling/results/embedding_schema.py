"""The result file of ``hogstream embedding``: vectors of words, trained in several ways."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from hogstream.profiling.results.records import (
    Count,
    Measurement,
    Number,
    PositiveSpread,
    Ratio,
    Record,
    SignedSpread,
    Size,
)


class EmbeddingSettings(Record):
    """What ``embedding`` was asked for.

    Attributes:
        data: The name of the file.
        words: How many of its words are trained on: those that are frequent enough, of sentences
            that are not held out.
        vocabulary: How many different ones there are.
        held_out: How many pairs the loss is of.
        width: Columns of a table.
        window: How many words on either side a word predicts, at most.
        negative: Words of noise for each pair.
        min_count: Words that occur less often were left out.
        epochs: How many a training took.
        rounds: How often each trained, with other first values.
        seed: Of all random numbers.
        hyperparameters: Numbers and switches of the update in the first epoch, by name.
    """

    data: str
    words: Size
    vocabulary: Size
    held_out: Size
    width: Size
    window: Size
    negative: Size
    min_count: Size
    epochs: Size
    rounds: Size
    seed: Count
    hyperparameters: dict[str, float | bool]


class EmbeddingRun(Record):
    """Trainings by a policy, or by gensim, with so many workers.

    Attributes:
        name: Who trained.
        workers: How many there were.
        words_per_second: Words of the text, those too that were left out as frequent.
        loss: The mean over pairs that are held out, in the end.
        staleness: The mean; null if not known.
        gains: How many times as many words/s as each other with as many workers, by name.
        speedup: The same over its own with the fewest workers; null if it could not be told.
    """

    name: str
    workers: Size
    words_per_second: PositiveSpread
    loss: SignedSpread
    staleness: Number | None
    gains: dict[str, Ratio]
    speedup: Ratio | None


class Embedding(Measurement, kw_only=True, tag="embedding"):
    """``hogstream embedding``: policies first, then gensim, if it was installed."""

    settings: EmbeddingSettings
    results: Annotated[list[EmbeddingRun], Meta(min_length=1)]
