"""Texts as numbers of words: what is read, what is left out, and which windows are drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from hogstream.workloads.embedding import corpus as module
from hogstream.workloads.embedding import read_corpus
from hogstream.workloads.embedding.corpus import (
    Corpus,
    keep_probabilities,
    noise_words,
    windows_within,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "text.txt"
    path.write_text(text, "utf-8")
    return path


def test_words_are_numbered_by_their_frequency(tmp_path):
    path = write(tmp_path, "The cat saw\tthe dog\n\nthe Dog ran\nzebra\nDOG  cat a dog")
    corpus = read_corpus(path, min_count=2)
    assert corpus.words == ("dog", "the", "cat")
    assert corpus.counts.tolist() == [4, 3, 2]
    assert list(corpus.sentences()) == [
        ["the", "cat", "the", "dog"],
        ["the", "dog"],
        ["dog", "cat", "dog"],
    ]
    assert corpus.tokens.dtype == np.int32
    assert corpus.ends.tolist() == [4, 6, 9]


@pytest.mark.parametrize("end", ["", " ", "\n"])
def test_a_line_is_read_in_pieces_and_cut_where_it_is_long(tmp_path, monkeypatch, end):
    monkeypatch.setattr(module, "_CHARACTERS", 7)
    monkeypatch.setattr(module, "LONGEST_SENTENCE", 3)
    words = ["ab", "cdefghijkl", "m", "ab", "m", "ab", "cdefghijkl", "ab"]
    path = write(tmp_path, " ".join(words) + "\nm ab" + end)
    sentences = list(read_corpus(path, min_count=1).sentences())
    assert sentences == [words[:3], words[3:6], words[6:], ["m", "ab"]]


def test_a_part_is_held_out_with_the_same_vocabulary(tmp_path):
    path = write(tmp_path, "a b\nb c c\nc a\na a\nd b\n")
    rest, out = read_corpus(path, min_count=1).split(2)
    assert rest.words == out.words == ("a", "b", "c", "d")
    assert list(out.sentences()) == [["a", "b"], ["c", "a"], ["d", "b"]]
    assert list(rest.sentences()) == [["b", "c", "c"], ["a", "a"]]
    assert rest.counts.sum() == 11


def test_a_single_sentence_is_not_split(tmp_path):
    corpus = read_corpus(write(tmp_path, "a b a b\n"), min_count=1)
    with pytest.raises(ValueError, match="must have at least two sentences"):
        corpus.split(2)


BAD = [
    (b"", 1, "must have words, got none"),
    (b" \n\t\n", 1, "must have words, got none"),
    (b"a b a c", 2, "at least two different words that occur min_count=2 times or more, got 1"),
    (b"\xff\xfe a", 1, "must be text in UTF-8"),
]


@pytest.mark.parametrize(("text", "min_count", "message"), BAD)
def test_a_file_of_no_use_is_refused_by_its_name(tmp_path, text, min_count, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_corpus(path, min_count)
    assert str(path) in str(raised.value)


def test_frequent_words_are_kept_as_often_as_word2vec_keeps_them():
    # Of a million words, 1 % and 0.4 % are 10 and 4 times as frequent as 1e-3.
    counts = np.array([986_000, 10_000, 4_000])
    kept = keep_probabilities(counts)
    assert kept[1] == pytest.approx(np.sqrt(0.1) + 0.1)
    assert kept[2] == pytest.approx(0.5 + 0.25)
    assert keep_probabilities(np.array([10_000, 999_000, 1_000]))[2] == 1


def test_noise_is_drawn_by_the_frequency_to_the_power_of_three_quarters():
    noise = noise_words(np.array([10_000, 16, 1]), 1009)
    assert noise.dtype == np.int32
    assert np.bincount(noise).tolist() == [1000, 8, 1]


def naive(sentences: list[list[int]], widths: list[int]) -> list[tuple[int, int]]:
    """All pairs, in order, word by word."""
    pairs, left = [], iter(widths)
    for sentence in sentences:
        for at, word in enumerate(sentence):
            width = next(left)
            near = [*sentence[max(at - width, 0) : at], *sentence[at + 1 : at + width + 1]]
            pairs += [(word, other) for other in near]
    return pairs


def test_pairs_are_those_within_windows_and_sentences():
    sentences = [[1, 2, 3, 4, 5, 6], [7], [], [8, 9]]
    tokens = np.concatenate([np.array(each, np.int32) for each in sentences])
    windows = windows_within(tokens, np.array([6, 7, 7, 9]), 3, np.random.default_rng(5))
    widths = np.random.default_rng(5).integers(1, 4, 9).tolist()
    assert set(widths) == {1, 2, 3}
    found = list(zip(*(each.tolist() for each in windows.pairs()), strict=True))
    assert found == naive(sentences, widths)
    assert {each.dtype for each in windows} == {np.dtype(np.int32)}


def test_an_epoch_has_each_sentence_once_whatever_the_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 5)
    ends = np.array([2, 4, 11, 13, 15])
    tokens = np.arange(15, dtype=np.int32)
    # Words so rare that each stays.
    corpus = Corpus(tuple(map(str, tokens)), np.ones(10_000, np.int64), tokens, ends)
    blocks = list(corpus.draw_windows(1, np.random.default_rng(0)))
    assert len(blocks) == 3
    found = [pair for block in blocks for pair in zip(*block.pairs(), strict=True)]
    assert found == naive([s.tolist() for s in np.split(tokens, ends[:-1])], [1] * 15)


def test_words_are_left_out_before_windows_are_laid():
    tokens = np.tile(np.array([0, 1], np.int32), 20_000)
    tokens[1::2] = np.arange(1, 20_001)
    counts = np.bincount(tokens)
    corpus = Corpus(tuple(map(str, range(20_001))), counts, tokens, np.array([40_000]))
    (windows,) = corpus.draw_windows(1, np.random.default_rng(0))
    centres, contexts = windows.pairs()
    share = np.sqrt(1 / 500) + 1 / 500
    # With nearly no word 0 left, its neighbours have each other.
    assert Counter(centres.tolist())[0] == pytest.approx(2 * share * 20_000, rel=0.15)
    assert (contexts - centres == 1).sum() == pytest.approx((1 - share) * 20_000, rel=0.02)


def test_an_epoch_is_drawn_again_by_its_seed(tmp_path):
    path = write(tmp_path, "a b c a d b c\n" * 50)
    corpus = read_corpus(path)
    first, again, other = (
        next(corpus.draw_windows(3, np.random.default_rng(seed))) for seed in (0, 0, 1)
    )
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))
