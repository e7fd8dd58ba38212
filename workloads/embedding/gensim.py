"""Gensim's word2vec, to be measured beside ours; two ways to give it a text."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hogstream.workloads.embedding.corpus import SUBSAMPLING, Corpus

#: Its workers take sentences from Python, or each reads its own part of a file, without the GIL.
GENSIM, GENSIM_FILE = "gensim", "gensim corpus_file"


def train(
    name: str, corpus: Corpus, *, epochs: int, workers: int, seed: int, **shape: int
) -> tuple[float, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Trains skip-gram with negative sampling, and gensim's default learning rate.

    Args:
        name: ``GENSIM`` or ``GENSIM_FILE``.
        corpus: The sentences, which are in memory, or in a file before the clock starts.
        epochs: How many.
        workers: How many threads.
        seed: Of first values, and of all else that is random.
        **shape: ``vector_size``, ``window`` and ``negative``, as gensim has them.

    Returns:
        Seconds of all epochs; vectors of words and of contexts, in the order of ``corpus.words``,
        each of shape (v, vector_size).
    """
    model = _model(corpus, workers=workers, seed=seed, **shape)
    size = {"total_examples": len(corpus.ends), "total_words": len(corpus.tokens)}
    if name == GENSIM:
        seconds = _timed(model, corpus_iterable=list(corpus.sentences()), epochs=epochs, **size)
    else:
        with tempfile.TemporaryDirectory(prefix="hogstream-") as folder:
            path = Path(folder) / "sentences.txt"
            with path.open("w", encoding="utf-8") as file:
                file.writelines(" ".join(words) + "\n" for words in corpus.sentences())
            seconds = _timed(model, corpus_file=str(path), epochs=epochs, **size)
    order = [model.wv.key_to_index[word] for word in corpus.words]
    return seconds, model.wv.vectors[order], model.syn1neg[order]


def _model(corpus: Corpus, **settings: int) -> Any:
    from gensim.models import Word2Vec

    model = Word2Vec(sg=1, hs=0, min_count=1, sample=SUBSAMPLING, compute_loss=False, **settings)
    counts = dict(zip(corpus.words, corpus.counts.tolist(), strict=True))
    model.build_vocab_from_freq(counts, corpus_count=len(corpus.ends))
    return model


def _timed(model: Any, **text: Any) -> float:
    start = time.perf_counter()
    model.train(**text)
    return time.perf_counter() - start
