"""A text as numbers of words: read from a file, with the windows that are drawn around them."""

from __future__ import annotations

import os
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from hogstream.scheduler.checks import check_integer

#: Words that are more frequent than this are thinned out. It is what gensim has by default; the
#: paper has 1e-5, for texts of a billion words.
SUBSAMPLING = 1e-3
#: Longer sentences are cut, as gensim does: there are texts of a single line.
LONGEST_SENTENCE = 10_000
# To what power of its frequency a word is drawn as noise: section 2.2 of the paper.
_NOISE_POWER = 0.75
_NOISE_WORDS = 1 << 20
# Characters that are read of a line at a time.
_CHARACTERS = 1 << 20
# Windows are drawn for so many words at a time: some seconds' work, in some 30 MB.
_BLOCK = 1 << 20


class Windows(NamedTuple):
    """Words of sentences, and what stands near each: ``tokens[first:last]``, but for itself.

    Attributes:
        tokens: Numbers of words: int32, shape (n,).
        firsts: Where the window of each begins: int32, shape (n,).
        lasts: Where it has ended: int32, shape (n,).
    """

    tokens: npt.NDArray[np.int32]
    firsts: npt.NDArray[np.int32]
    lasts: npt.NDArray[np.int32]

    def pairs(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """All pairs of a word and one in its window: the former and the latter, shape (m,)."""
        lengths = self.lasts - self.firsts
        centres = np.repeat(np.arange(len(lengths)), lengths)
        # Of each window, its place less how many pairs there are before it.
        shifts = np.repeat(self.firsts - (np.cumsum(lengths) - lengths), lengths)
        contexts = np.arange(len(centres)) + shifts
        others = centres != contexts
        return self.tokens[centres[others]], self.tokens[contexts[others]]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Sentences as numbers of words, which are numbered by their frequency, from 0.

    Attributes:
        words: The vocabulary, v words, the most frequent one first.
        counts: How often each occurs in the whole text: int64, shape (v,).
        tokens: The words of all sentences: int32, shape (n,).
        ends: Where each sentence ends in ``tokens``, ascending: int64, shape (s,).
    """

    words: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]

    def split(self, every: int) -> tuple[Corpus, Corpus]:
        """Holds out one in so many sentences; both parts have the vocabulary of the whole.

        Args:
            every: At least 2.

        Returns:
            The larger part, and what is held out.

        Raises:
            ValueError: If there are less than two sentences, or a number is out of range.
        """
        check_integer("every", every, at_least=2)
        if len(self.ends) < 2:
            raise ValueError("must have at least two sentences, one a line, to hold out one")
        is_out = np.arange(len(self.ends)) % every == 0
        return self._part(~is_out), self._part(is_out)

    def _part(self, taken: npt.NDArray[np.bool_]) -> Corpus:
        lengths = np.diff(self.ends, prepend=0)
        tokens = self.tokens[np.repeat(taken, lengths)]
        return Corpus(self.words, self.counts, tokens, np.cumsum(lengths[taken]))

    def sentences(self) -> Iterator[list[str]]:
        """The words of each sentence."""
        for sentence in np.split(self.tokens, self.ends[:-1]):
            yield [self.words[number] for number in sentence]

    def draw_windows(self, window: int, generator: np.random.Generator) -> Iterator[Windows]:
        """Draws the windows of an epoch, as word2vec does, in the order of the text.

        Frequent words are left out at random; then each word has a window of its own, of 1 to
        ``window`` words on either side within the sentence.

        Args:
            window: The widest.
            generator: Of all that is random.

        Yields:
            Those of some 2^20 words of the text at a time, or less where sentences end.
        """
        kept = keep_probabilities(self.counts)
        start = 0
        while start < len(self.ends):
            begin = self.ends[start - 1] if start else 0
            stop = max(int(np.searchsorted(self.ends, begin + _BLOCK, "right")), start + 1)
            ends = self.ends[start:stop]
            tokens = self.tokens[begin : ends[-1]]
            stays = generator.random(len(tokens), np.float32) < kept[tokens]
            before = np.concatenate([[0], np.cumsum(stays)])
            yield windows_within(tokens[stays], before[ends - begin], window, generator)
            start = stop


def read_corpus(path: str | os.PathLike[str], min_count: int = 5) -> Corpus:
    """Reads a text: a sentence or a paragraph a line, words with white space between them.

    Words are in lower case. Of a file that is larger than memory, what must fit is 4 bytes for each
    word, and the different words.

    Args:
        path: The file, in UTF-8.
        min_count: Words that occur less often are left out.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not text in UTF-8, or less than two different words are left; names the
            file. If ``min_count`` is out of range.
    """
    check_integer("min_count", min_count, at_least=1)
    numbers: defaultdict[str, int] = defaultdict()
    numbers.default_factory = numbers.__len__
    tokens, ends = array("i"), array("q")
    try:
        with Path(path).open(encoding="utf-8") as file:
            for words in _sentences(file):
                tokens.extend(map(numbers.__getitem__, words))
                ends.append(len(tokens))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: must be text in UTF-8") from None
    if not tokens:
        raise ValueError(f"{path}: must have words, got none")
    corpus = _frequent(
        list(numbers), np.frombuffer(tokens, np.int32), np.frombuffer(ends, np.int64), min_count
    )
    if len(corpus.words) < 2:
        raise ValueError(
            f"{path}: must have at least two different words that occur min_count={min_count} "
            f"times or more, got {len(corpus.words)}"
        )
    return corpus


def _sentences(file: TextIO) -> Iterator[list[str]]:
    """Yields the words of each line, or of as much of it as a sentence may have."""
    words: list[str] = []
    cut = ""  # the beginning of a word that goes on
    while text := file.readline(_CHARACTERS):
        words += (cut + text).lower().split()
        cut = "" if text[-1].isspace() else words.pop()
        while len(words) > LONGEST_SENTENCE:
            yield words[:LONGEST_SENTENCE]
            words = words[LONGEST_SENTENCE:]
        if text.endswith("\n"):
            yield words
            words = []
    yield [*words, cut] if cut else words


def _frequent(
    names: list[str], tokens: npt.NDArray[np.int32], ends: npt.NDArray[np.int64], min_count: int
) -> Corpus:
    """A corpus of words that are frequent enough, numbered by their frequency."""
    counts = np.bincount(tokens)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts >= min_count)]
    renumbered = np.full(len(names), -1, np.int32)
    renumbered[order] = np.arange(len(order))
    tokens = renumbered[tokens]
    stays = tokens >= 0
    before = np.concatenate([[0], np.cumsum(stays)])
    ends = np.unique(before[ends])
    words = tuple(names[number] for number in order)
    return Corpus(words, counts[order], tokens[stays], ends[ends > 0])


def keep_probabilities(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """With what probability each word stays, when frequent ones are thinned out.

    That of word2vec's code, and gensim's: sqrt(t / f) + t / f of a word of frequency f, at most 1.
    Section 2.3 of the paper has sqrt(t / f).

    Args:
        counts: How often each occurs: shape (v,).
    """
    over = SUBSAMPLING * counts.sum() / counts
    kept: npt.NDArray[np.float32] = np.minimum(np.sqrt(over) + over, 1).astype(np.float32)
    return kept


def noise_words(counts: npt.NDArray[np.int64], size: int = _NOISE_WORDS) -> npt.NDArray[np.int32]:
    """Words as often as they are drawn as noise: by their frequency to the power of 0.75.

    Args:
        counts: How often each occurs: shape (v,).
        size: How many.

    Returns:
        Ascending numbers of words: shape (size,).
    """
    shares = np.cumsum(counts**_NOISE_POWER)
    places = (np.arange(size) + 0.5) * (shares[-1] / size)
    noise: npt.NDArray[np.int32] = np.searchsorted(shares, places).astype(np.int32)
    return noise


def windows_within(
    tokens: npt.NDArray[np.int32],
    ends: npt.NDArray[np.int64],
    window: int,
    generator: np.random.Generator,
) -> Windows:
    """Windows of random width around the words of sentences, which end where those do.

    Args:
        tokens: The words: shape (n,).
        ends: Where each sentence ends, in ascending order; some may be empty: shape (s,).
        window: The widest: widths are drawn from 1 to it, on either side.
        generator: Of widths.
    """
    widths = generator.integers(1, window + 1, len(tokens))
    lengths = np.diff(ends, prepend=0)
    starts, stops = np.repeat(ends - lengths, lengths), np.repeat(ends, lengths)
    places = np.arange(len(tokens))
    firsts = np.maximum(starts, places - widths).astype(np.int32)
    lasts = np.minimum(stops, places + widths + 1).astype(np.int32)
    return Windows(tokens, firsts, lasts)
