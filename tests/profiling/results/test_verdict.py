"""Which way is to be used, of ways whose rounds are known; and what it is said to gain and cost."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest

from decisions import CALM, HAND, LOCK_FREE, LOOP, PROCESSES, THREADS, WILD, Kind, way
from hogstream.profiling.results.schema import Way
from hogstream.profiling.results.verdict import answer, decided, most_gain, simplicity


@dataclass
class Case:
    """Ways, which is to be used, and what the answer says of it."""

    ways: list[Way]
    use: int
    said: str


WORSE, BETTER, UNSURE = (0.1, 0.2, 0.3, 0.4, 0.5), (-0.4,) * 5, (-0.1, 0.1, 0.2, 0.3, 0.4)
DIVERGED = (
    "Every way diverged, to a loss that is not finite, so none can be recommended: lower lr, and "
    "look at the data."
)
CASES = {
    "alone": Case(
        [way(*LOOP, 100)],
        0,
        "Use a plain loop, which makes 100 updates/s with torch on 2 threads: there is",
    ),
    "clearly the fastest": Case(
        [way(*LOOP, 100), way(*THREADS, 110), way(*LOCK_FREE, 165)],
        2,
        "Use lock-free over threads with 2 workers: it makes 165 updates/s, 1.50 times (95 %: 1.50 "
        "to 1.50) those of the next best, locked over threads with 2 workers, 1.65 times (95 %: "
        "1.65 to 1.65) a plain loop's, with a staleness of 1.0 on average and 3 at most.",
    ),
    "the loop is": Case(
        [way(*LOOP, 165), way(*THREADS, 110)],
        0,
        "Use a plain loop: it makes 165 updates/s with torch on 2 threads, 1.50 times (95 %: 1.50 "
        "to 1.50) those of the next best, locked over threads with 2 workers.",
    ),
    "noise": Case(
        [way(*LOOP, 100), way(*PROCESSES, 120, rounds=WILD)],
        0,
        "It makes no difference here: use a plain loop, at 100 updates/s with torch on 2 threads; "
        "the fastest of the others, locked over processes with 2 workers, makes 1.20 times (95 %: "
        "0.61 to 1.94) as many, which is no clear difference, and it is less simple.",
    ),
    "sure, but too little": Case([way(*LOOP, 100), way(*THREADS, 104)], 0, "It makes no diff"),
    "enough": Case([way(*LOOP, 100), way(*THREADS, 105)], 1, "Use locked over threads"),
    "threads are simpler": Case(
        [way(*LOOP, 100), way(*THREADS, 150), way(*LOCK_FREE, 152), way(*PROCESSES, 155)],
        1,
        "Use locked over threads with 2 workers, at 150 updates/s, 1.50 times (95 %: 1.50 to 1.50) "
        "a plain loop's, with a staleness of 1.0 on average and 3 at most; the fastest of the "
        "others, locked over processes with 2 workers, makes 1.03 times",
    ),
    "threads may be no faster than a loop": Case(
        [way(*LOOP, 100), way(*THREADS, 120, rounds=WILD), way(*PROCESSES, 130)],
        2,
        "Use locked over processes with 2 workers, at 130 updates/s, 1.30 times (95 %: 1.30 to "
        "1.30) a plain loop's, with a staleness of 1.0 on average and 3 at most; the fastest of "
        "the others, locked over threads with 2 workers, makes 0.92 times (95 %: 0.47 to 1.49) as "
        "many, which is no clear difference.",
    ),
    "by hand": Case([way(*LOOP, 100), way(*PROCESSES, 150), way(*HAND, 200)], 2, "Use locked over"),
    "it does not learn": Case(
        [way(*LOOP, 100), way(*THREADS, 120), way(*LOCK_FREE, 200, in_time=WORSE)], 1, "Use locked"
    ),
    "it learns less as it is slower": Case(
        [way(*LOOP, 100), way(*THREADS, 50), way(*LOCK_FREE, 80, in_time=WORSE)],
        0,
        "Use a plain loop: it makes 100 updates/s with torch on 2 threads, 1.25 times (95 %: 1.25 "
        "to 1.25) those of the next best, lock-free over threads with 2 workers.",
    ),
    "perhaps it does not": Case(
        [way(*LOOP, 100), way(*LOCK_FREE, 200, in_time=UNSURE)],
        1,
        "Use lock-free over threads with 2 workers: it makes 200 updates/s, 2.00 times (95 %: 2.00 "
        "to 2.00) those of the next best, a plain loop, with a staleness of 1.0 on average and 3 "
        "at most, and after the same 1,234 updates a loss that is 0.2 higher (95 %: -0.1 to 0.4, "
        "which may be noise) than a plain loop's.",
    ),
    "it learns more": Case(
        [way(*LOOP, 100), way(*LOCK_FREE, 200, in_time=BETTER)],
        1,
        "a loss that is 0.4 lower (95 %: -0.4 to -0.4) than a plain loop's.",
    ),
    "it diverges": Case([way(*LOOP, 100), way(*THREADS, 200, diverged=True)], 0, "Use a plain"),
    "the loop diverges": Case(
        [way(*LOOP, 200, diverged=True), way(*THREADS, 100), way(*LOCK_FREE, 110)],
        2,
        "Use lock-free over threads with 2 workers: it makes 110 updates/s, 1.10 times (95 %: 1.10 "
        "to 1.10) those of the next best, locked over threads with 2 workers, with",
    ),
    "without a loop it diverges": Case(
        [way(*THREADS, 100), way(*LOCK_FREE, 200, diverged=True)], 0, "Use locked over threads"
    ),
    "all but one diverge": Case(
        [way(*LOOP, 200, diverged=True), way(*THREADS, 100)],
        1,
        "Use locked over threads with 2 workers, which makes 100 updates/s: there is nothing to",
    ),
    "all diverge": Case(
        [way(*LOOP, 100, diverged=True), way(*THREADS, 200, diverged=True)], 1, DIVERGED
    ),
    "all diverge in too few rounds": Case(
        [way(*kind, 100, diverged=True, rounds=CALM[:4]) for kind in (LOOP, THREADS)], 0, DIVERGED
    ),
    "one diverges alone": Case([way(*LOOP, 100, diverged=True)], 0, DIVERGED),
    "too few rounds": Case(
        [way(*LOOP, 100, rounds=CALM[:4]), way(*THREADS, 300, rounds=CALM[:4])],
        0,
        "4 of 5 rounds tell nothing for sure: until then use a plain loop, which is the simplest "
        "and makes 99.5 updates/s with torch on 2 threads; the fastest of the others, locked over "
        "threads with 2 workers, makes 298.",
    ),
    "no loop was measured": Case([way(*THREADS, 100), way(*LOCK_FREE, 200)], 1, "Use lock-free"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_simplest_of_what_is_not_clearly_slower_is_to_be_used(name: str) -> None:
    case = CASES[name]
    for ways in (case.ways, case.ways[::-1]):  # however they are ordered
        verdict = decided(ways)
        assert verdict.use is case.ways[case.use]
        assert case.said in answer(verdict)


def test_ways_from_the_simplest_on() -> None:
    kinds: list[Kind] = [
        LOOP,
        ("threads", "lock-free", 1),
        THREADS,
        ("threads", "ordered", 2),
        LOCK_FREE,
        ("threads", "lock-free", 4),
        ("processes", "lock-free", 1),
        PROCESSES,
        ("processes", "lock-free", 2),
        HAND,
    ]
    ways = [way(*kind, 100) for kind in kinds]
    shuffled = Random(0).sample(ways, len(ways))
    assert [each.name for each in sorted(shuffled, key=simplicity)] == [each.name for each in ways]


@pytest.mark.parametrize(
    ("workers", "share", "gain"),
    [(1, 0.5, 1.0), (2, 0.0, 1.0), (2, 0.04, 1.04), (2, 1.0, 2.0), (8, 0.5, 4.5), (8, 1.0, 8.0)],
)
def test_lock_free_gains_no_more_than_amdahl_says(workers: int, share: float, gain: float) -> None:
    assert most_gain(workers, share) == pytest.approx(gain)
    # Workers who all wait for each other make an update in each time of an update; who do not wait
    # make one each in the time of an iteration; and no order of theirs is worse than in turn.
    update, gradient = share, 1 - share
    in_turn, at_once = workers / (gradient + workers * update), workers / (gradient + update)
    assert at_once / in_turn == pytest.approx(gain)
