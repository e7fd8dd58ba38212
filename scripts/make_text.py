"""A text of made-up words, for trials: Zipf's frequencies, and topics that words belong to."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

_SENTENCE = 20
# How much of a sentence is of its own topic.
_SHARE = 0.6


def make_text(path: Path, words: int, vocabulary: int, topics: int, seed: int = 0) -> None:
    """Writes sentences of 20 words, each about one topic.

    Word number k is ``w<k>`` and belongs to topic ``k % topics``. In a sentence, 6 of 10 words are
    those of its topic; the others are any. Either are drawn by Zipf's law: 1 / (k + 1).

    Args:
        path: Of the file.
        words: How many, at least; the last sentence is whole.
        vocabulary: How many different ones at most.
        topics: How many.
        seed: Of all that is random.
    """
    generator = np.random.default_rng(seed)
    shares = np.cumsum(1 / np.arange(1, vocabulary + 1))
    sentences = -(-words // _SENTENCE)
    topic = generator.integers(topics, size=(sentences, 1))
    drawn = generator.random((sentences, _SENTENCE)) * shares[-1]
    numbers = np.minimum(np.searchsorted(shares, drawn), vocabulary - 1)
    # The word of the sentence's topic that stands next to what was drawn.
    of_topic = np.minimum(numbers // topics * topics + topic, vocabulary - 1)
    numbers = np.where(generator.random(drawn.shape) < _SHARE, of_topic, numbers)
    with path.open("w", encoding="utf-8") as file:
        for sentence in numbers.tolist():
            file.write(" ".join(f"w{number}" for number in sentence) + "\n")


def main() -> None:
    """Makes a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    for name, default in (("words", 2_000_000), ("vocabulary", 50_000), ("topics", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    make_text(given.file, given.words, given.vocabulary, given.topics)


if __name__ == "__main__":
    main()
