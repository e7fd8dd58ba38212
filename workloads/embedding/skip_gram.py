"""Skip-gram with negative sampling, as a step that Numba compiles.

A word's vector predicts which words stand near it, against others that are drawn as noise (Mikolov
et al. 2013, "Distributed Representations of Words and Phrases and their Compositionality", arXiv
1310.4546, equation 4). Each word has a row of two tables: ``words``, of what stands in the centre,
and ``contexts``, of what stands around it. The update of a pair touches one row of the first, and
of the second the context's row and one for each word of noise.
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
from hogstream.workloads.embedding.corpus import Corpus, Pairs, noise_words

#: Columns of a table. A row fills eight cache lines, of which no other has a part.
WIDTH = 128
#: The best of seven on a million words of ``scripts/make_text.py``, in 3 epochs.
HYPERPARAMETERS = Hyperparameters(lr=0.001, alpha=0.999, eps=1e-6)
# A worker takes so many pairs of the text at a time: some 5 ms.
_CHUNK = 4096
# Pairs that are evaluated at a time, so that rows stay in the cache.
_EVALUATED = 512


class HeldOut(NamedTuple):
    """What tables are evaluated by: n pairs, always with the same noise.

    Attributes:
        pairs: Of sentences that nobody trains on.
        noise: Words that are drawn beside each: int32, shape (n, negative); -1 where it was the
            context.
    """

    pairs: Pairs
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
        blocks = list(corpus.draw_pairs(window, generator))
        centres, contexts = (np.concatenate(each) for each in zip(*blocks, strict=True))
        if not len(centres):
            raise ValueError(
                "the text is too short: what is held out has no two words near each other"
            )
        taken = generator.permutation(len(centres))[:most]
        pairs = Pairs(centres[taken], contexts[taken])
        noise = generator.choice(noise_words(corpus.counts), (len(taken), negative))
        noise[noise == pairs.contexts[:, None]] = -1
        return cls(pairs, noise)

    def loss(self, words: npt.NDArray[np.float32], contexts: npt.NDArray[np.float32]) -> float:
        """The mean over pairs of what the step minimises.

        Args:
            words: Shape (v, width).
            contexts: Shape (v, width).
        """
        total = 0.0
        for start in range(0, len(self.noise), _EVALUATED):
            part = slice(start, start + _EVALUATED)
            noise = self.noise[part]
            rows = np.column_stack([self.pairs.contexts[part], noise])
            scores = np.einsum("nd,nkd->nk", words[self.pairs.centres[part]], contexts[rows])
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
    shared: SharedParameters, pairs: Pairs, noise: npt.NDArray[np.int32], negative: int, seed: int
) -> NativeWorker:
    """A worker that learns pairs, in pieces of the text whose order is random.

    Args:
        shared: From ``make_parameters``.
        pairs: At least one.
        noise: Words that are drawn as noise, in any order: as many as pairs.
        negative: How many beside each pair.
        seed: Of the order.
    """

    def order(generator: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        pieces = np.split(np.arange(len(noise)), range(_CHUNK, len(noise), _CHUNK))
        return [pieces[index] for index in generator.permutation(len(pieces))]

    tables = {"words": 1, "contexts": 1 + negative}
    samples = *pairs, noise
    return NativeWorker(shared, skip_gram(), samples, tables, order=order, chunk=_CHUNK, seed=seed)


@cache
def skip_gram() -> Any:
    """The step, compiled; sums of products may be added in any order."""
    import numba

    return numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})(_skip_gram)


def _skip_gram(parameters: Any, samples: Any, state: Any) -> Any:
    words, contexts = parameters
    of_centre, of_context, noise = samples
    centre, context = of_centre[state.sample], of_context[state.sample]
    word, of_word, rows = words[centre], state.grads[0][0], state.rows[1]
    state.rows[0][0] = centre
    of_word[:] = 0
    # Noise is taken one word after the other from a place that is far from the next sample's:
    # Knuth's multiplicative hashing. So it comes of one cache line, and only from the sample.
    place = ((state.sample * 2654435761 & 0xFFFFFFFF) * len(noise)) >> 32
    # log(1 + exp(wrong)) is max(wrong, 0) and the log of a factor, of which there is one product.
    loss, product = 0.0, 1.0
    for index in range(len(rows)):
        row, sign = context, -1.0
        if index > 0:
            row, sign = noise[(place + index) % len(noise)], 1.0
            if row == context:
                rows[index] = -1
                continue
        rows[index] = row
        other, of_other = contexts[row], state.grads[1][index]
        score = words.dtype.type(0)
        for column in range(len(word)):
            score += word[column] * other[column]
        wrong = sign * score
        tail = math.exp(-abs(wrong))
        loss += max(wrong, 0.0)
        product *= 1 + tail
        slope = words.dtype.type(sign * (1.0 if wrong > 0 else tail) / (1 + tail))
        for column in range(len(word)):
            of_word[column] += slope * other[column]
            of_other[column] = slope * word[column]
    return loss + math.log(product)
