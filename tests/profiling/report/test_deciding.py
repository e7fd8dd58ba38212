"""What a decision rests on, of known rounds: its tables, its sentences, and its file."""

from __future__ import annotations

import pytest

from decisions import HAND, LOCK_FREE, LOOP, THREADS, decision, way
from hogstream.profiling.report import deciding
from hogstream.profiling.results.files import BadResultError, decoded, encoded
from hogstream.profiling.results.records import SignedSpread, Spread
from hogstream.profiling.results.schema import Decision


def made() -> Decision:
    locked = way(*THREADS, 110, in_time=(-0.1, 0.0, 0.1, 0.2, 0.3))
    locked.latency_us = Spread.of([50.0, 52.0, 54.0, 56.0, 58.0])
    locked.lock_wait_us = SignedSpread.of([5.0, 6.0, 7.0, 8.0, 9.0])
    ways = [way(*LOOP, 99), locked, way(*LOCK_FREE, 1650), way(*HAND, 10)]
    return decision(ways)


def test_tables_have_a_row_a_way() -> None:
    speeds, losses, under_lock = deciding.tables(made())
    assert speeds.rows == [
        ("a plain loop", "-", "1", "2", "99.0", "97.0 to 101.0", "-", "-"),
        ("threads", "locked", "2", "1", "110", "108 to 112", "54", "1.0/3"),
        ("threads", "lock-free", "2", "1", "1,650", "1,617 to 1,683", "-", "1.0/3"),
        ("by hand", "locked", "2", "1", "10.0", "9.8 to 10.2", "-", "-"),
    ]
    assert losses.rows[0] == ("a plain loop", "-", "1", "1,234", "0.5000", "-", "-")
    assert losses.rows[1][-2:] == ("0.1000", "-0.1000 to 0.3000")
    assert under_lock.rows == [("2", "1", "0.900", "0.1000", "1.100", "1.078 to 1.122")]
    for table in deciding.tables(made()):
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_sentences_begin_with_the_answer_and_end_with_warnings() -> None:
    answer, bound, waits, how, warning = deciding.said(made())
    assert answer.startswith("Use lock-free over threads with 2 workers: it makes 1,650 updates/s")
    assert bound == (
        "With 2 workers lock-free could make at most 1.100 times (95 %: 1.078 to 1.122) the "
        "updates/s of locked, if the lock itself cost nothing, by Amdahl's law: it would be held "
        "for an update, 0.1000 ms (95 %: 0.0980 to 0.1020), which is 10.0 % of an iteration with "
        "its gradient, 0.900 ms (95 %: 0.882 to 0.918)."
    )
    assert waits.endswith("waited for the lock: 7 us (95 %: 5 to 9) over threads with 2 workers.")
    assert "with 1,234 parameters" in how
    assert warning == "Without a plain loop, which failed: LookupError."


def test_a_wait_that_may_be_noise_is_told_as_such() -> None:
    unsure = made()
    unsure.results[1].lock_wait_us = SignedSpread.of([-5.0, -1.0, 1.0, 2.0, 3.0])
    waits = deciding.said(unsure)[2]
    assert waits.endswith("1 us (95 %: -5 to 3) over threads with 2 workers, which may be noise.")
    unsure.results[1].lock_wait_us = None
    assert not any("waited for the lock" in each for each in deciding.said(unsure))


def test_a_file_says_what_was_decided_and_nothing_else() -> None:
    mine = made()
    assert decoded(encoded(mine), Decision) == mine
    for text, said in (
        (b'"use": 2', "use must be less than 4, got 9"),
        (b'"next_best": 1', "next_best must be less than 4, got 9"),
        (b'"policy": "lock-free"', "is of the same configuration as another"),
    ):
        wrong = encoded(mine)
        assert text in wrong
        replacement = b'"policy": "locked"' if b"policy" in text else text[:-1] + b"9"
        with pytest.raises(BadResultError, match=said):
            decoded(wrong.replace(text, replacement), Decision)
