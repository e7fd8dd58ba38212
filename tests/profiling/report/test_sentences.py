"""The answers and what stands behind them, of results whose numbers are known."""

from __future__ import annotations

import copy
import re

import pytest

from hogstream.profiling.report import answers, rows, sentences
from hogstream.profiling.report.answers import Fact
from hogstream.profiling.results.diff import diff_runs
from hogstream.profiling.results.files import ResultFile
from hogstream.profiling.results.gains import training_gains
from hogstream.profiling.results.records import PositiveSpread, Ratio, Spread
from hogstream.profiling.results.schema import Bench, Compare, Shares, Train
from report_testing import committed, full_bench, with_gains, with_today

SPEEDS = {"lock-free": 200.0, "locked": 100.0, "ordered": 160.0}


def known_bench() -> Bench:
    """Three sizes; lock-free gains most over ordered with 2 workers at the first."""
    bench = full_bench("races")
    for run in bench.results:
        run.updates_per_second = Spread.of([SPEEDS[run.policy] + step for step in range(5)])
    best = next(run for run in bench.results if run.policy == "lock-free")
    best.updates_per_second = Spread.of([300.0, 303.0, 306.0, 309.0, 312.0])
    best.staleness.mean, best.staleness.max = 5.05, 791.0
    best.lost_updates_fraction = 0.0273
    best.share_of_ceilings = Shares("L2", 0.61, 0.2, 0.3)
    with_gains(bench.results)
    return bench


def facts(answer: answers.Answer) -> dict[str, Fact]:
    return {fact.name: fact for fact in answer.facts}


def test_answer_tells_policy_gain_cost_and_machine() -> None:
    answer = answers.answer(known_bench())
    assert answer.verdict == (
        "At best lock-free makes 1.89 times (95 %: 1.88 to 1.90) the updates/s of ordered (the "
        "stronger of locked and ordered) with 2 workers at 2^12 elements. Lock-free is the fastest "
        "at each of 3 sizes, at 3 of them beyond noise over every other policy."
    )
    told = facts(answer)
    gain = told["Gain at best"]
    assert gain.value == "1.89x"  # 306 / 162: over ordered, and not 3.00x over locked
    assert gain.detail.startswith("95 %: 1.88 to 1.90; lock-free over ordered (the stronger base")
    assert "with 2 workers at 2^12 elements" in gain.detail
    assert told["Gain beyond noise"].value == "6 of 6"
    assert (told["Cost: staleness"].value, told["Cost: lost updates"].value) == ("5.0", "2.73 %")
    assert "791 at most" in told["Cost: staleness"].detail
    assert told["Machine"].value == "2 cores"
    assert told["Machine"].detail == "AMD EPYC (cpu, 2 cores), numba backend"


def test_first_sentence_tells_the_gain_over_a_lock_and_over_what_people_run_today() -> None:
    bench = with_today(known_bench())
    first = (
        "At best lock-free makes 1.89 times (95 %: 1.88 to 1.90) the updates/s of ordered (the "
        "stronger of locked and ordered) with 2 workers at 2^12 elements, and 10.00 times (95 %: "
        "10.00 to 10.00) those of the fastest of what people run today, threads with "
        "torch.optim.RMSprop."
    )
    assert sentences.of_bench(bench)[0] == first
    assert answers.answer(bench).verdict.startswith(f"{first} Lock-free is the fastest")
    (said,) = [each for each in sentences.of_bench(bench) if "with 4 workers at 2^16" in each]
    assert said.startswith("Lock-free's updates/s with 4 workers at 2^16 elements: 10.00x those of")
    assert (
        "13.00x those of processes with torch.optim.RMSprop under a lock (13.00 to 13.00)" in said
    )
    assert said.endswith("14.00x those of threads with rmsprop_ under a lock (14.00 to 14.00).")


def test_first_sentence_takes_the_fastest_of_what_people_run_today_but_for_our_own_update() -> None:
    bench = with_today(known_bench())
    assert bench.today is not None
    for run in bench.today:  # ours under a lock is the fastest now, then processes with a lock
        rank = {"rmsprop_": 1000.0}.get(run.update, 500.0 if run.lock else 100.0)
        rank += run.spread_over == "processes"
        run.updates_per_second = PositiveSpread.of([rank] * 5)
        run.lock_free_ratio = Ratio(median=2.5, interval=(2.0, 3.0))
    told = sentences.headline(bench)
    assert told is not None
    assert told.endswith(
        "2.50 times (95 %: 2.00 to 3.00) those of the fastest of what people run today, processes "
        "with torch.optim.RMSprop under a lock."
    )


def test_what_people_run_today_is_a_table() -> None:
    bench = known_bench()
    assert rows.today(bench) is None
    bench = with_today(bench)
    narrow, wide = rows.today(bench), rows.today(bench, intervals=True)
    assert narrow is not None
    assert wide is not None
    assert len(narrow.rows) == len(wide.rows) == 6 * 5
    assert narrow.rows[3] == (
        *("2^12", "2", "processes, with a lock", "torch.optim.RMSprop", "24", "13.00x"),
    )
    assert wide.rows[3][-1] == "13.00 to 13.00"
    assert bench.today is not None
    bench.today[0].lock_free_ratio = None
    told = rows.today(bench)
    assert told is not None
    assert told.rows[0][-1] == "-"


def test_verdict_tells_where_the_gain_ends_and_what_bounds_it() -> None:
    said = " ".join(sentences.verdict(known_bench()))
    for part in (
        "The greatest gain of lock-free over ordered (the stronger of locked and ordered) "
        "is 1.89x (95 %: 1.88 to 1.90) with 2 workers",
        "Lock-free clearly gains over the stronger of locked and ordered, with most worker counts, "
        "up to 2^20 elements",
        "5.0 updates on average and 791 at most",
        "2.73 % of the updates were lost",
        "With 2 workers at 2^12 elements it takes 61 % of the bandwidth of L2, 20 % of the launch "
        "rate of a lane, 30 % of the turns of the event loop.",
    ):
        assert part in said


def test_a_gain_within_noise_is_told_as_such() -> None:
    bench = known_bench()
    for run in bench.results:
        run.updates_per_second = Spread.of([90.0, 95.0, 100.0, 110.0, 120.0])
    with_gains(bench.results)
    answer = answers.answer(bench)
    assert "at none of them beyond noise" in answer.verdict
    assert facts(answer)["Gain beyond noise"].value == "0 of 6"


def test_a_policy_alone_is_compared_with_nothing() -> None:
    bench = known_bench()
    bench.results = [run for run in bench.results if run.policy == "ordered"]
    with_gains(bench.results)
    answer = answers.answer(bench)
    assert answer.verdict == "Only ordered was measured: there is nothing to compare it with."
    assert facts(answer)["Updates/s at most"].value == "162"
    assert sentences.verdict(bench) == []


def test_lost_updates_that_were_not_counted_are_not_told_as_none() -> None:
    bench = known_bench()
    for run in bench.results:
        run.lost_updates_fraction = None
    lost = facts(answers.answer(bench))["Cost: lost updates"]
    assert (lost.value, lost.detail) == ("not counted", "--telemetry counts them")


def train_of(missed: int = 0, **seconds: list[float]) -> Train:
    """Trainings that took so long; of lock-free's, the first rounds missed the target."""
    train = committed("train-digits", Train)
    template = train.results[0]
    train.results = []
    for name, rounds in seconds.items():
        run = copy.copy(template)
        run.policy = name.replace("_", "-") if name.startswith("lock") else name.replace("_", " ")
        run.seconds_to_target = run.updates_to_target = PositiveSpread.of(rounds)
        run.reached = [index >= missed or name != "lock_free" for index in range(len(rounds))]
        train.results.append(run)
    for run in train.results:
        run.gains = training_gains(run, train.results)
    return train


def test_training_is_as_much_faster_as_its_seconds_are_fewer() -> None:
    train = train_of(lock_free=[2.0] * 5, locked=[8.0] * 5, ordered=[3.0] * 5, by_hand=[9.0] * 5)
    answer, said = answers.answer(train), sentences.of_train(train)
    assert answer.verdict == said[0]
    assert said[0] == (
        "Lock-free is sooner: lock-free reached test accuracy 0.97 after 2.00 s (the median; in 5 "
        "of 5 rounds), and ordered, the strongest other, after 3.00 s; that is 1.50 times (95 %: "
        "1.50 to 1.50) as fast."
    )
    assert said[1] == (
        "Lock-free reached the target 4.50 times (95 %: 4.50 to 4.50) as fast as processes by hand "
        "with torch.optim.RMSprop under a lock."
    )
    told = facts(answer)
    assert told["As fast as ordered"].value == "1.50x"
    assert told["As fast as by hand"].value == "4.50x"
    assert rows.training(train).rows[1][-1] == "4.00x"


LOCKED = [6.0, 5.0, 4.5, 3.0, 2.0]


@pytest.mark.parametrize(
    ("missed", "seconds", "said"),
    [
        (
            0,
            {"lock_free": [2.0, 3.0, 4.0, 5.0, 6.0], "locked": LOCKED},
            "It makes no difference here: lock-free reached test accuracy 0.97 after 4.00 s .*, "
            "and locked, the strongest other, after 4.50 s; .* as fast, which is within noise.",
        ),
        (
            0,
            {"lock_free": [4.0] * 5, "by_hand": [2.0] * 5},
            "Lock-free is later: .*, and by hand, the strongest other, after 2.00 s; that is 0.50 ",
        ),
        (
            0,
            {"lock_free": [2.0] * 3, "locked": [6.0] * 3},
            "Too few rounds to tell who is sooner: .*; that is 3.00 times as fast.",
        ),
        (
            2,
            {"lock_free": [4.0] * 5, "locked": [8.0] * 5},
            r"Lock-free is sooner: .* \(the median; in 3 of 5 rounds\)",
        ),
        (
            3,
            {"lock_free": [4.0] * 5, "locked": [8.0] * 5},
            "Lock-free reached test accuracy 0.97 in 2 of 5 rounds only; locked in 5 of 5.",
        ),
        (
            0,
            {"locked": [2.0] * 5},
            "Locked reached test accuracy 0.97 after 2.00 s .*, with nothing to compare it with.",
        ),
    ],
    ids=["noise", "later", "few", "mostly", "missed", "alone"],
)
def test_training_answers_who_was_sooner(
    missed: int, seconds: dict[str, list[float]], said: str
) -> None:
    train = train_of(missed, **seconds)
    assert re.match(said, sentences.of_train(train)[0])
    assert answers.answer(train).verdict == sentences.of_train(train)[0]


def test_a_target_that_was_missed_mostly_is_told_as_a_bound() -> None:
    mine, theirs = rows.training(train_of(3, lock_free=[4.0] * 5, locked=[8.0] * 5)).rows
    assert mine[2:6] == ("2 of 5", ">4.00", "-", ">4")
    assert theirs[2:6] == ("5 of 5", "8.00", "8.00 to 8.00", "8")


def test_who_has_other_rounds_is_not_set_against_others() -> None:
    train = train_of(lock_free=[2.0] * 5, locked=[3.0] * 4)
    assert [run.gains for run in train.results] == [{}, {}]
    train = train_of(lock_free=[2.0] * 5, locked=[3.0] * 5)
    train.results[1].partial = True
    assert training_gains(train.results[0], train.results) == {}
    assert training_gains(train.results[1], train.results) == {}


def test_rivals_are_told_by_bytes_per_second_and_not_by_time() -> None:
    compare = committed("compare", Compare)
    compare.results = [
        each
        for each in compare.results
        if each.shape == "2^20" and each.peer in ("hogstream", "torch-adam-fused", "torch-foreach")
    ]
    times = {
        "hogstream": Ratio(median=1.0, interval=(1.0, 1.0)),
        "torch-adam-fused": Ratio(median=1.0, interval=(0.9, 1.1)),  # which moves 28 to our 20
        "torch-foreach": Ratio(median=4.0, interval=(3.0, 5.0)),
    }
    for each in compare.results:
        each.time_against_hogstream = times[each.peer]
    said = sentences.of_compare(compare)[0]
    assert said == "2^20: more bytes/s than hogstream: torch-adam-fused (1.40x)."
    answer = answers.answer(compare)
    assert answer.verdict == (
        "hogstream moves the most bytes/s, or as many within noise, at 0 of 1 shape; it is ahead "
        "of all others beyond noise at 0."
    )
    told = facts(answer)
    assert told["At 2^20, the largest"].value == "0.71x"  # 20 / 28
    assert told["At 2^20, the largest"].detail.startswith("95 %: 0.64 to 0.79;")
    assert told["torch.optim.RMSprop"].value == "4.00x to 4.00x"


def test_a_diff_tells_what_changed_and_whether_it_is_like_for_like() -> None:
    first, second = full_bench(), full_bench(speed=4.0)
    second.settings.scheduling.depth = 4
    diff = diff_runs(ResultFile("a.json", first), ResultFile("b.json", second))
    answer = answers.diff_answer(diff, second)
    assert answer.verdict == (
        "The second run is faster beyond noise in 8 and slower in 0 of 76 configurations."
    )
    told = facts(answer)
    assert told["Changed beyond noise"].value == "8 of 76"
    assert told["Faster, the most"].detail.startswith("95 %: ")
    assert "Slower, the most" not in told
    assert told["Like for like"].value == "no"
    assert "depth" in told["Like for like"].detail
    again = answers.diff_answer(
        diff_runs(ResultFile("a.json", first), ResultFile("b.json", first)), first
    )
    assert facts(again)["Like for like"].value == "yes"


def test_warnings_are_those_that_change_the_answer() -> None:
    bench = committed("bench", Bench)
    assert len(bench.warnings) == 2
    assert sentences.warnings(bench) == bench.warnings[:1]
    assert re.match(r"The spread of \d+ of 76 timings is too wide", bench.warnings[0])
    assert bench.warnings[1] in sentences.of_bench(bench)  # told, but not as a warning


@pytest.mark.parametrize(
    ("partial", "error", "said"),
    [
        (False, None, []),
        (True, None, ["Interrupted: these are only the results that there were by then."]),
        (
            True,
            "worker 3 failed",
            [
                "Ended early, as worker 3 failed: these are only the results that there were by "
                "then."
            ],
        ),
    ],
)
def test_what_is_not_whole_is_told(partial: bool, error: str | None, said: list[str]) -> None:
    bench = full_bench()
    bench.partial, bench.error = partial, error
    assert sentences.interruption(bench) == said
