"""Skip-gram with negative sampling, as a step that Numba compiles.

A word's vector predicts which words stand near it, against others that are drawn as noise (Mikolov
et al. 2013, "Distributed Representations of Words and Phrases and their Compositionality", arXiv
1310.4546, equation 4). Each word has a row of two tables: ``words``, of what stands in the centre,
and ``contexts``, of what stands around it.

A sample is a word with all that stands in its window. Noise is drawn once for them all, and counts
for each: in expectation the loss is that of pairs with noise of their own. So 1 row of the first
table and some 11 of the second are updated, where pairs would update 42 in all (Ji et al. 2016,
"Parallelizing Word2Vec in Shared and Distributed Memory", arXiv 1604.04661).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.scheduler import NativeWorker, SharedParameters
from hogstream.workloads.embedding.corpus import Corpus, Windows, noise_words

#: Columns of a table. A row fills eight cache lines, of which no other has a part.
WIDTH = 128
#: The best of five on a million words of ``scripts/make_text.py``, in 3 epochs.
HYPERPARAMETERS = Hyperparameters(lr=0.002, alpha=0.999, eps=1e-6)
# A worker takes so many words of the text at a time: some milliseconds.
_CHUNK = 1024
# Pairs that are evaluated at a time, so that rows stay in the cache.
_EVALUATED = 512


class HeldOut(NamedTuple):
    """What tables are evaluated by: n pairs, always with the same noise.

    Attributes:
        centres: Words of sentences that nobody trains on: int32, shape (n,).
        contexts: One that stands near each: int32, shape (n,).
        noise: Words that are drawn beside each: int32, shape (n, negative); -1 where it was the
            context.
    """

    centres: npt.NDArray[np.int32]
    contexts: npt.NDArray[np.int32]
    noise: npt.NDArray[np.int32]

    @classmethod
    def draw(
        cls, corpus: Corpus, window: int, negative: int, most: int, generator: np.random.Generator
    ) -> HeldOut:
        """Draws pairs and noise.

        Args:
            corpus: Whose sentences are held out.
            window: The widest.
            negative: Words of noise for each pair.
            most: How many pairs at most.
            generator: Of all that is random.

        Raises:
            ValueError: If no two words stand near each other.
        """
        drawn = [each.pairs() for each in corpus.draw_windows(window, generator)]
        centres, contexts = (np.concatenate(each) for each in zip(*drawn, strict=True))
        if not len(centres):
            raise ValueError(
                "the text is too short: what is held out has no two words near each other"
            )
        taken = generator.permutation(len(centres))[:most]
        noise = generator.choice(noise_words(corpus.counts), (len(taken), negative))
        noise[noise == contexts[taken, None]] = -1
        return cls(centres[taken], contexts[taken], noise)

    def loss(self, words: npt.NDArray[np.float32], contexts: npt.NDArray[np.float32]) -> float:
        """The mean over pairs of what is minimised.

        Args:
            words: Shape (v, width).
            contexts: Shape (v, width).
        """
        total = 0.0
        for start in range(0, len(self.noise), _EVALUATED):
            part = slice(start, start + _EVALUATED)
            noise = self.noise[part]
            rows = np.column_stack([self.contexts[part], noise])
            scores = np.einsum("nd,nkd->nk", words[self.centres[part]], contexts[rows])
            scores[:, 0] *= -1
            losses = np.logaddexp(0, scores.astype(np.float64))
            total += losses[rows >= 0].sum()
        return float(total / len(self.noise))


def make_parameters(corpus: Corpus, width: int, seed: int) -> SharedParameters:
    """New tables, ``words`` and ``contexts``, of shape (words, width), float32.

    They begin as word2vec's: words uniform within 1/2 over width, contexts 0.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = len(corpus.words), width
    words = (torch.rand(shape, generator=generator) - 0.5) / width
    return SharedParameters({"words": words, "contexts": torch.zeros(shape)})


def make_worker(
    shared: SharedParameters,
    windows: Windows,
    noise: npt.NDArray[np.int32],
    window: int,
    negative: int,
    seed: int,
) -> NativeWorker:
    """A worker that learns words by what is near them, in pieces of the text in random order.

    Args:
        shared: From ``make_parameters``.
        windows: Of at least one word.
        noise: Words that are drawn as noise, in any order: as many as those of the text.
        window: How many words on either side there may be.
        negative: Words of noise.
        seed: Of the order.
    """

    def order(generator: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        pieces = np.split(np.arange(len(noise)), range(_CHUNK, len(noise), _CHUNK))
        return [pieces[index] for index in generator.permutation(len(pieces))]

    return NativeWorker(
        shared,
        skip_gram(negative),
        (*windows, noise),
        {"words": 1, "contexts": 2 * window + negative},
        order=order,
        chunk=_CHUNK,
        seed=seed,
    )


@cache
def skip_gram(negative: int) -> Any:
    """The step, compiled; sums of products may be added in any order.

    Its samples are ``tokens``, ``firsts``, ``lasts`` and ``noise``. A word that stands alone has no
    rows.

    Args:
        negative: Words of noise.
    """
    import numba

    compiled = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
    learn, count = compiled(_learn), compiled(_count)

    @compiled
    def step(parameters, samples, state) -> Any:  # type: ignore[no-untyped-def]
        words, contexts = parameters
        tokens, firsts, lasts, noise = samples
        place, rows = state.sample, state.rows[1]
        first, near = firsts[place], lasts[place] - firsts[place] - 1
        rows[:] = -1
        state.rows[0][0] = tokens[place] if near else -1
        word, of_word = words[tokens[place]], state.grads[0][0]
        of_word[:] = 0
        # Noise is taken one word after the other from a place that is far from the next sample's:
        # Knuth's multiplicative hashing. So it comes of one cache line, and only from the sample.
        drawn = ((place * 2654435761 & 0xFFFFFFFF) * len(noise)) >> 32
        loss = 0.0
        for index in range(near + negative):
            if index < near:
                at = first + index
                row, sign, weight = tokens[at + (at >= place)], -1.0, 1
            else:
                row, sign = noise[(drawn + index) % len(noise)], 1.0
                weight = near + (row == tokens[place]) - count(tokens, first, lasts[place], row)
            if weight:
                rows[index] = row
                loss += learn(word, contexts[row], sign, weight, of_word, state.grads[1][index])
        return loss

    return step


def _count(tokens: Any, first: Any, last: Any, word: Any) -> Any:
    """How often a word stands in a part of the text."""
    found = 0
    for place in range(first, last):
        found += tokens[place] == word
    return found


def _learn(word: Any, other: Any, sign: Any, weight: Any, of_word: Any, of_other: Any) -> Any:
    """Adds to the gradient of a word, and writes that of another, of the loss that it returns.

    That is log(1 + exp(sign * word @ other)), so often.
    """
    score = word[0] * other[0]
    for column in range(1, len(word)):
        score += word[column] * other[column]
    wrong = sign * score
    tail = math.exp(-abs(wrong))
    slope = word.dtype.type(weight * sign * (1.0 if wrong > 0 else tail) / (1 + tail))
    for column in range(len(word)):
        of_word[column] += slope * other[column]
        of_other[column] = slope * word[column]
    return weight * (max(wrong, 0.0) + math.log1p(tail))
