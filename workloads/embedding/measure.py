"""Embeddings trained by each policy, by several numbers of workers, and by gensim, in turn."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch

from hogstream.profiling.environment import describe_environment
from hogstream.profiling.interruption import gather_until_interrupted
from hogstream.profiling.results.confidence import spread_warnings
from hogstream.profiling.results.embedding_schema import (
    Embedding,
    EmbeddingRun,
    EmbeddingSettings,
)
from hogstream.profiling.results.records import PositiveSpread, Ratio, SignedSpread
from hogstream.profiling.turns import in_turn
from hogstream.scheduler import SchedulerSettings, StreamScheduler
from hogstream.workloads.embedding import gensim
from hogstream.workloads.embedding.corpus import Corpus, noise_words
from hogstream.workloads.embedding.gensim import GENSIM, GENSIM_FILE
from hogstream.workloads.embedding.skip_gram import (
    HYPERPARAMETERS,
    HeldOut,
    make_parameters,
    make_worker,
)

# One sentence in so many is held out, and so many pairs of them at most are evaluated.
_HELD_OUT = 50
_EVALUATED = 1 << 16


@dataclass(frozen=True)
class Task:
    """What is trained, and how.

    Attributes:
        corpus: The text.
        data: Its name.
        width: Columns of a table.
        window: How many words on either side a word predicts, at most.
        negative: Words of noise.
        min_count: Words that occur less often were left out of the corpus.
        epochs: How many each training takes.
        rounds: How often each contender trains, with other first values.
        seed: Of all random numbers.
        workers: Numbers of workers.
        policies: Their names.
    """

    corpus: Corpus
    data: str
    width: int
    window: int
    negative: int
    min_count: int
    epochs: int
    rounds: int
    seed: int
    workers: Sequence[int]
    policies: Sequence[str]

    @property
    def contenders(self) -> list[tuple[str, int]]:
        """Who trains, with how many workers: policies, then gensim if it is installed."""
        others = [GENSIM, GENSIM_FILE] if find_spec("gensim") else []
        return [(name, workers) for name in (*self.policies, *others) for workers in self.workers]


class Training(NamedTuple):
    """What one training came to.

    Attributes:
        seconds: Of all epochs.
        loss: Of what is held out, at the end.
        staleness: The mean of updates that were looked at; None if none was.
    """

    seconds: float
    loss: float
    staleness: float | None


class Parts(NamedTuple):
    """What a text is cut into.

    Attributes:
        train: What is trained on.
        held_out: Its other sentences.
        evaluated: Pairs of those, and noise.
    """

    train: Corpus
    held_out: Corpus
    evaluated: HeldOut

    @classmethod
    def of(cls, task: Task) -> Parts:
        """Holds out one sentence in 50.

        Raises:
            ValueError: If the text has too few for that.
        """
        rest, held_out = task.corpus.split(_HELD_OUT)
        generator = np.random.default_rng(task.seed)
        evaluated = HeldOut.draw(held_out, task.window, task.negative, _EVALUATED, generator)
        return cls(rest, held_out, evaluated)


def measure(
    task: Task, command: str, on_step: Callable[[str], object] = lambda _: None
) -> Embedding:
    """Trains with each contender in turn.

    Args:
        task: What is trained.
        command: What repeats it, for the result.
        on_step: Called before each training with what is to be done.

    Returns:
        The result; interrupted, of the rounds until then.

    Raises:
        KeyboardInterrupt: If interrupted before the end of a round.
        MeasurementError: If a worker fails before that.
        ValueError: If the corpus is too small for a part of it to be held out.
    """
    parts = Parts.of(task)
    rounds, end = gather_until_interrupted(_rounds(task, parts, on_step))
    results = _results(task, len(parts.train.tokens), rounds)
    return Embedding(
        command=command,
        environment=describe_environment(torch.device("cpu"), "numba", 1),
        partial=end.partial,
        error=end.error,
        warnings=spread_warnings(
            {
                f"words/s of {run.name}, workers={run.workers}": run.words_per_second.estimate
                for run in results
            }
        ),
        settings=EmbeddingSettings(
            data=task.data,
            words=len(parts.train.tokens),
            vocabulary=len(task.corpus.words),
            held_out=len(parts.evaluated.noise),
            width=task.width,
            window=task.window,
            negative=task.negative,
            min_count=task.min_count,
            epochs=task.epochs,
            rounds=task.rounds,
            seed=task.seed,
            hyperparameters=asdict(HYPERPARAMETERS),
        ),
        results=results,
    )


async def _rounds(
    task: Task, parts: Parts, on_step: Callable[[str], object]
) -> AsyncIterator[dict[tuple[str, int], Training]]:
    """Yields what all came to, one round after the other."""
    settings = SchedulerSettings(workers=1, hyperparameters=HYPERPARAMETERS)
    # What is compiled is compiled first, for a training of no account.
    await train(replace(task, epochs=1), parts._replace(train=parts.held_out), settings, task.seed)
    for index in range(task.rounds):
        seed = task.seed + index
        done: dict[tuple[str, int], Training] = {}
        for name, workers in in_turn(task.contenders, index):
            on_step(f"round {index + 1}: {name}, workers={workers}")
            if name in (GENSIM, GENSIM_FILE):
                done[name, workers] = await asyncio.to_thread(
                    train_gensim, name, workers, seed, task, parts
                )
            else:
                own = replace(settings, workers=workers, policy=name)
                done[name, workers] = await train(task, parts, own, seed)
        yield done


async def train(task: Task, parts: Parts, settings: SchedulerSettings, seed: int) -> Training:
    """Trains for some epochs, each with a learning rate that is lower by the same amount.

    Args:
        task: What is trained.
        parts: Of its text.
        settings: How the scheduler runs.
        seed: Of first values, and of all else that is random.
    """
    shared = make_parameters(task.corpus, task.width, seed)
    noise = noise_words(task.corpus.counts)
    start, staleness = settings.hyperparameters, Counter[int]()
    began = time.perf_counter()
    async with StreamScheduler(shared, settings) as scheduler:
        for epoch in range(task.epochs):
            scheduler.hyperparameters = replace(start, lr=start.lr * (1 - epoch / task.epochs))
            generator = np.random.default_rng([seed, epoch])
            for windows in parts.train.draw_windows(task.window, generator):
                if count := len(windows.tokens):
                    drawn = generator.choice(noise, count)
                    worker = make_worker(shared, windows, drawn, task.window, task.negative, seed)
                    staleness += (await scheduler.run(worker, updates=count)).staleness
        seconds = time.perf_counter() - began
    tables = (shared.views[name].numpy() for name in ("words", "contexts"))
    ages = sum(age * count for age, count in staleness.items())
    mean = ages / staleness.total() if staleness else None
    return Training(seconds, parts.evaluated.loss(*tables), mean)


def train_gensim(name: str, workers: int, seed: int, task: Task, parts: Parts) -> Training:
    """Trains by gensim; as ``train`` has it.

    Args:
        name: Which way it is given the text.
        workers: How many threads.
        seed: Of all that is random.
        task: What is trained.
        parts: Of its text.
    """
    seconds, words, contexts = gensim.train(
        name,
        parts.train,
        epochs=task.epochs,
        workers=workers,
        seed=seed,
        vector_size=task.width,
        window=task.window,
        negative=task.negative,
    )
    return Training(seconds, parts.evaluated.loss(words, contexts), None)


def _results(
    task: Task, words: int, rounds: Sequence[dict[tuple[str, int], Training]]
) -> list[EmbeddingRun]:
    rates = {
        each: [words * task.epochs / done[each].seconds for done in rounds]
        for each in task.contenders
    }
    results = []
    for name, workers in task.contenders:
        mine = [done[name, workers] for done in rounds]
        known = [each.staleness for each in mine if each.staleness is not None]
        results.append(
            EmbeddingRun(
                name=name,
                workers=workers,
                words_per_second=PositiveSpread.of(rates[name, workers]),
                loss=SignedSpread.of([each.loss for each in mine]),
                staleness=float(np.mean(known)) if known else None,
                gains={
                    other: gain
                    for (other, count), theirs in rates.items()
                    if count == workers
                    and other != name
                    and (gain := Ratio.of(rates[name, workers], theirs)) is not None
                },
                speedup=Ratio.of(rates[name, workers], rates[name, min(task.workers)]),
            )
        )
    return results
