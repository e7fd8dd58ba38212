"""Race counters: what they say of updates that overlap in a known way, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hogstream.kernels.race_counters import LANDED, OVERWRITTEN, SURVIVED, RaceCounters


@cache
def compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What compiled code does before and after an update of a block, to be called from here."""
    numba_kernels = pytest.importorskip("hogstream.kernels.backends.numba_kernels")
    from hogstream.kernels.backends.numba_compile import njit

    begin_block, end_block = numba_kernels.begin_block, numba_kernels.end_block

    @njit
    def begin(counts: int, blocks: int, block: int) -> Any:
        return begin_block(counts, blocks, block)

    @njit
    def end(counts: int, blocks: int, block: int, version: int, witness: int) -> None:
        end_block(counts, blocks, block, version, witness)

    return begin, end


def play(interleaving: str, counters: RaceCounters, block: int = 0) -> None:
    """Begins an update of a block at the first mention of a letter, and ends it at the second."""
    begin, end = compiled()
    where = counters.counts.data_ptr(), counters.blocks, block
    under_way: dict[str, tuple[int, int]] = {}
    for update in interleaving:
        if update in under_way:
            end(*where, *under_way.pop(update))
        else:
            under_way[update] = begin(*where)


@pytest.mark.parametrize(
    ("interleaving", "landed", "lost", "overwritten"),
    [
        pytest.param("", 0, 0, 0, id="none"),
        pytest.param("aabbcc", 3, 0, 0, id="one after another"),
        pytest.param("abab", 2, 1, 1, id="two that overlap"),
        pytest.param("abba", 2, 1, 1, id="one inside another"),
        pytest.param("abcabc", 3, 2, 3, id="three in lockstep"),
        pytest.param("abccba", 3, 2, 3, id="three nested"),
        pytest.param("sabbccddaees", 6, 5, 8, id="a straggler over five, of which one over three"),
        pytest.param("saabbccddees", 6, 5, 5, id="a straggler over five"),
        pytest.param("saattbbs", 4, 3, 3, id="a straggler over three"),
        pytest.param("saatst", 3, 1, 2, id="a straggler, overwritten by one that had read before"),
        pytest.param("abaccb", 3, 2, 2, id="a chain"),
    ],
)
def test_each_lost_update_is_counted_once(interleaving, landed, lost, overwritten):
    counters = RaceCounters.zeros(1, 1)
    play(interleaving, counters)
    assert (counters.landed, counters.lost, counters.overwritten) == (landed, lost, overwritten)
    assert counters.lost_fraction == (lost / landed if landed else None)


@given(st.permutations(list("aabbccddeeffgg")))
def test_what_survives_is_what_a_shared_set_would_hold(interleaving):
    counters = RaceCounters.zeros(1, 1)
    play("".join(interleaving), counters)

    # Each update reads the set of those before it, and writes it back with itself added.
    shared: frozenset[str] = frozenset()
    read: dict[str, frozenset[str]] = {}
    overlapping = 0
    for update in interleaving:
        if update in read:
            shared = read.pop(update) | {update}
            overlapping += len(read)  # those that end later
        else:
            read[update] = shared
    assert counters.landed - counters.lost == len(shared)
    assert counters.overwritten == overlapping


def test_blocks_are_counted_apart():
    counters = RaceCounters.zeros(25, 10)
    play("abab", counters, block=1)
    play("aa", counters, block=2)
    assert counters.counts[LANDED].tolist() == [0, 2, 1]
    assert counters.counts[SURVIVED].tolist() == [0, 1, 1]
    assert counters.counts[OVERWRITTEN].tolist() == [0, 1, 0]
    assert (counters.landed, counters.lost, counters.overwritten) == (3, 1, 1)


def test_counts_may_be_shared_or_kept():
    counters = RaceCounters.zeros(30, 10)
    counters.counts.share_memory_()
    play("abab", counters)
    opened = RaceCounters(30, 10, counters.counts)
    assert (opened.landed, opened.lost, opened.overwritten) == (2, 1, 1)
    play("aa", opened)
    assert counters.landed == 3


COUNTS = torch.zeros(3, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("elements", "block", "counts", "error", "message"),
    [
        (-1, 10, COUNTS, ValueError, r"elements must be >= 0, got -1"),
        (40, 0, COUNTS, ValueError, r"block must be >= 1, got 0"),
        (40, 10, COUNTS.int(), TypeError, r"counts must be an int64 tensor, got torch.int32"),
        (40, 10, [0] * 4, TypeError, r"counts must be an int64 tensor, got list"),
        (41, 10, COUNTS, ValueError, r"counts must be .* shape \(3, 5\), got \(3, 4\)"),
        (40, 10, COUNTS.T.contiguous().T, ValueError, r"must be contiguous .* strides \(1, 3\)"),
    ],
)
def test_refusals(elements, block, counts, error, message):
    with pytest.raises(error, match=message):
        RaceCounters(elements, block, counts)


@pytest.mark.parametrize(("elements", "block"), [(-1, 10), (40, 0)])
def test_zeros_refuses_the_same(elements, block):
    with pytest.raises(ValueError, match="must be >= "):
        RaceCounters.zeros(elements, block)
