"""One result against another: known rounds, and what is said of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from hogstream.profiling.report.page import render_page
from hogstream.profiling.report.rows import changes
from hogstream.profiling.report.sentences import of_diff
from hogstream.profiling.results.diff import (
    FASTER,
    SAME,
    SLOWER,
    UNKNOWN,
    Diff,
    diff_runs,
    false_alarms,
)
from hogstream.profiling.results.files import Reported, ResultFile
from hogstream.profiling.results.records import PositiveSpread, Spread
from hogstream.profiling.results.schema import Bench, Compare, Train
from report_testing import committed, full_bench, with_today

ROUNDS = [98.0, 99.0, 100.0, 101.0, 102.0]


def diff(first: Reported, second: Reported) -> Diff:
    return diff_runs(ResultFile("first.json", first), ResultFile("second.json", second))


def bench_of(**rounds: list[float]) -> Bench:
    """A bench with a policy of 2 workers at 2^12 elements for each list of rounds."""
    bench = full_bench("races")
    template = bench.results[0]
    bench.results = []
    for policy, speeds in rounds.items():
        run = copy.copy(template)
        run.policy, run.updates_per_second = policy.replace("_", "-"), Spread.of(speeds)
        run.workers, run.elements, run.gains = 2, 4096, {}
        bench.results.append(run)
    return bench


def test_what_people_run_today_is_compared_too() -> None:
    first, second = with_today(full_bench()), with_today(full_bench(speed=2.0))
    found = {change.name: change for change in diff(first, second).changes}
    change = found["processes with torch.optim.RMSprop under a lock, 4 workers, 2^16 elements"]
    assert (change.verdict, change.first.unit) == (FASTER, "updates/s")
    assert len(found) == 36 + 5 * 8  # with eight of lock-free


def verdicts(found: Diff) -> dict[str, str]:
    return {change.name.partition(",")[0]: change.verdict for change in found.changes}


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (ROUNDS, [1.5 * speed for speed in ROUNDS], FASTER),
        (ROUNDS, [0.9 * speed for speed in ROUNDS], SLOWER),
        (ROUNDS, list(reversed(ROUNDS)), SAME),
        (ROUNDS, [90.0, 95.0, 103.0, 110.0, 140.0], SAME),  # a glance at medians says 3 % faster
        (ROUNDS[:4], [2 * speed for speed in ROUNDS[:4]], UNKNOWN),  # too few
        ([0.0, *ROUNDS], [*ROUNDS, 100.0], UNKNOWN),  # it stood still in one round
        (ROUNDS, [*(1.5 * speed for speed in ROUNDS), 150.0], FASTER),  # as many are not needed
    ],
    ids=["faster", "slower", "shuffled", "noise", "few", "stood_still", "unequal"],
)
def test_verdict_is_by_the_rounds_and_not_by_the_medians(
    first: list[float], second: list[float], verdict: str
) -> None:
    found = diff(bench_of(locked=first), bench_of(locked=second))
    assert verdicts(found)["locked"] == verdict


def test_all_configurations_are_listed_by_effect_and_less_time_is_faster() -> None:
    first = bench_of(lock_free=ROUNDS, locked=ROUNDS)
    second = bench_of(lock_free=[1.3 * speed for speed in ROUNDS], locked=[0.5 * s for s in ROUNDS])
    for kernel in first.kernels:
        kernel.milliseconds = PositiveSpread.of(ROUNDS)
    second.kernels = [copy.copy(kernel) for kernel in first.kernels[:3]]
    second.kernels[0].milliseconds = PositiveSpread.of([speed / 4 for speed in ROUNDS])
    second.kernels[1].milliseconds = PositiveSpread.of(ROUNDS[:1])
    found = diff(first, second)
    told = [(row[0].split(",")[0], row[4], row[7]) for row in changes(found).rows]
    assert told == [
        ("hogstream", "4.000x", FASTER),
        ("locked", "0.500x", SLOWER),
        ("lock-free", "1.300x", FASTER),
        ("NumPy expression", "1.000x", SAME),
        ("hogstream", "1.020x", UNKNOWN),  # 100 ms over 98
    ]
    assert found.only_first == ("torch RMSprop (foreach), 2^24 elements, alone",)
    said = " ".join(of_diff(found))
    assert "faster beyond noise in 2 and slower in 1 of 4 configurations" in said
    assert (
        "They differ most of all in hogstream, numba, 2^24 elements, alone: 4.00x (95 %: 3.8"
        in said
    )
    assert "Only the first run has 1 configuration of these." in said


def test_optimizers_are_told_apart_at_each_shape() -> None:
    first, second = committed("compare", Compare), committed("compare", Compare)
    for time in second.results:
        if (time.peer, time.shape) == ("torch-foreach", "2^20"):
            samples = [sample / 3 for sample in time.milliseconds.samples]
            time.milliseconds = PositiveSpread.of(samples)
    found = diff(first, second)
    assert len(found.changes) + len(found.ceilings) == len(first.results)
    changed = [change for change in found.changes if change.verdict == FASTER]
    assert [change.name for change in changed] == ["torch-foreach, 2^20"]
    assert changed[0].speed is not None
    assert changed[0].speed.median == pytest.approx(3)


def test_memory_that_was_slower_between_two_compares_is_told() -> None:
    first, second = committed("compare", Compare), committed("compare", Compare)
    for time in second.results:
        if (time.peer, time.shape) == ("memory-copy", "2^24"):
            time.gigabytes_per_second /= 2
    found = diff(first, second)
    assert not [change for change in found.changes if change.verdict != SAME]
    assert "memory-copy, 2^24 (GB/s) 0.50x" in " ".join(of_diff(found))


def trained(rounds: list[float]) -> Train:
    train = committed("train-digits", Train)
    for run in train.results:
        run.updates_per_second = Spread.of(rounds)
    return train


def test_of_trainings_with_few_rounds_nothing_can_be_told() -> None:
    found = diff(trained([100.0]), trained([200.0] * 4))
    assert set(verdicts(found).values()) == {UNKNOWN}
    assert "Neither faster nor slower can be told" in of_diff(found)[0]


def test_rounds_of_training_are_set_against_each_other() -> None:
    found = diff(trained(ROUNDS), trained([0.5 * speed for speed in ROUNDS]))
    assert verdicts(found) == dict.fromkeys(
        ("lock-free", "locked", "ordered", "awaited", "one alone", "by hand"), SLOWER
    )


def test_what_differs_but_for_the_code_is_told() -> None:
    first, second = full_bench(), full_bench()
    second.environment.device_name, second.environment.commit = "H200", "abc"
    second.environment.versions["torch"] = "2.11"
    second.settings.scheduling.depth = 4
    copy_speed = second.ceilings.memory.copy_gigabytes_per_second
    assert copy_speed is not None
    copy_speed.median *= 1.5
    for run in second.results:
        run.dtype = "bfloat16"
    found = diff(first, second)
    names = [name for name, _, _ in found.differences]
    assert names == ["device_name", "torch", "commit", "depth", "dtype"]
    assert ("depth", "8", "4") in found.differences
    said = " ".join(of_diff(found))
    assert "Like is not set against like: the runs differ in device_name, torch, depth, dty" in said
    assert "memory, copy (GB/s) 1.50x of what it was" in said
    html = render_page([ResultFile("first.json", first), ResultFile("second.json", second)])
    assert "H200" in html
    assert "second.json against first.json" in html


def test_the_same_machine_and_settings_are_like_against_like() -> None:
    first, second = full_bench(), full_bench()
    second.environment.commit = "abc"
    said = " ".join(of_diff(diff(first, second)))
    assert "Like is not" not in said
    assert "Nothing changed beyond noise, of 76 configurations." in said


@pytest.mark.slow
def test_many_verdicts_raise_false_alarms_as_often_as_is_said() -> None:
    random = np.random.default_rng(0)
    for count in (1, 8, 40, 120):
        alarms = random.binomial(count, 0.05, size=100_000)
        assert (alarms <= false_alarms(count)).mean() >= 0.945
        if false_alarms(count):
            assert (alarms <= false_alarms(count) - 1).mean() < 0.955
    said = " ".join(of_diff(diff(full_bench("sweep"), full_bench("sweep", seed=1))))
    assert "of 124 configurations up to 10 may seem changed by chance alone" in said


def test_verdicts_on_equal_runs_are_wrong_once_in_twenty_at_most() -> None:
    random = np.random.default_rng(3)
    first, second = (
        bench_of(**{f"p{index}": noise(random) for index in range(150)}) for _ in range(2)
    )
    told = [verdict for name, verdict in verdicts(diff(first, second)).items() if name[0] == "p"]
    assert len(told) == 150
    assert len(told) - told.count(SAME) <= 12  # of 7.5; more has a chance of 1 in 30


def noise(random: np.random.Generator) -> list[float]:
    return [float(speed) for speed in 100 * np.exp(0.1 * random.standard_normal(5))]
