"""Two runs compared: known rounds, and what is said of them."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from hogstream.profiling.report.page import render_report
from hogstream.profiling.results.comparison import (
    FASTER,
    SAME,
    SLOWER,
    UNKNOWN,
    Comparison,
    change_rows,
    compare_runs,
    comparison_sentences,
    false_alarms,
)
from hogstream.profiling.results.result_files import ResultFile, parse_result
from report_testing import committed, full_bench, old

ROUNDS = [98.0, 99.0, 100.0, 101.0, 102.0]


def compared(first: dict[str, Any], second: dict[str, Any]) -> Comparison:
    return compare_runs(parsed(first, "first.json"), parsed(second, "second.json"))


def parsed(result: dict[str, Any], name: str) -> ResultFile:
    return parse_result(json.dumps(result), name)


def bench_of(**rounds: list[float]) -> dict[str, Any]:
    """A bench with a policy of 2 workers at 2^12 elements for each list of rounds."""
    bench = full_bench("races")
    result = bench["results"][0]
    bench["results"] = [
        result
        | {"policy": policy.replace("_", "-"), "updates_per_second_of_rounds": speeds}
        | {"updates_per_second": float(np.median(speeds)), "workers": 2, "elements": 4096}
        for policy, speeds in rounds.items()
    ]
    return bench


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {change.name.partition(",")[0]: change.verdict for change in comparison.changes}


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
    comparison = compared(bench_of(locked=first), bench_of(locked=second))
    assert verdicts(comparison)["locked"] == verdict


def test_all_configurations_are_listed_by_effect_and_less_time_is_faster() -> None:
    first = bench_of(lock_free=ROUNDS, locked=ROUNDS)
    second = bench_of(lock_free=[1.3 * speed for speed in ROUNDS], locked=[0.5 * s for s in ROUNDS])
    for kernel in first["kernels"]:
        kernel["milliseconds_of_rounds"] = ROUNDS
    second["kernels"] = [dict(kernel) for kernel in first["kernels"]]
    second["kernels"][0]["milliseconds_of_rounds"] = [speed / 4 for speed in ROUNDS]
    del second["kernels"][1]["milliseconds_of_rounds"]
    del second["kernels"][3]
    comparison = compared(first, second)
    told = [(row[0].split(",")[0], row[4], row[7]) for row in change_rows(comparison)]
    assert told == [
        ("hogstream", "4.000x", FASTER),
        ("locked", "0.500x", SLOWER),
        ("lock-free", "1.300x", FASTER),
        ("NumPy expression", "1.000x", SAME),
        ("hogstream", "1.000x", UNKNOWN),
    ]
    assert comparison.only_first == ("torch RMSprop (foreach), 2^24 elements, alone",)
    said = " ".join(comparison_sentences(comparison))
    assert "faster beyond noise in 2 and slower in 1 of 4 configurations" in said
    assert "most of all hogstream, numba, 2^24 elements, alone: 4.00x (95 %: 3.8" in said
    assert "Only the first run has 1 configuration of these." in said


def test_optimizers_are_compared_at_each_shape() -> None:
    first, second = committed("compare"), committed("compare")
    for result in second["results"]:
        if (result["peer"], result["shape"]) == ("torch-foreach", "2^20"):
            samples = [sample / 3 for sample in result["milliseconds_of_rounds"]]
            result["milliseconds_of_rounds"] = samples
            result["milliseconds"] /= 3
    comparison = compared(first, second)
    assert len(comparison.changes) == len(first["results"])
    changed = [change for change in comparison.changes if change.verdict == FASTER]
    assert [change.name for change in changed] == ["torch-foreach, 2^20"]
    assert changed[0].speed is not None
    assert changed[0].speed.median == pytest.approx(3)


def test_trainings_have_one_run_each_so_nothing_can_be_told() -> None:
    comparison = compared(old("train-digits"), old("train-digits"))
    assert set(verdicts(comparison).values()) == {UNKNOWN}
    assert "Neither faster nor slower can be told" in comparison_sentences(comparison)[0]


def test_rounds_of_training_are_compared() -> None:
    first, second = committed("train-digits"), committed("train-digits")
    for train, factor in ((first, 1.0), (second, 0.5)):
        for result in train["results"]:
            result["updates_per_second_of_rounds"] = [factor * speed for speed in ROUNDS]
    comparison = compared(first, second)
    assert verdicts(comparison) == dict.fromkeys(("lock-free", "locked", "ordered"), SLOWER)
    html = render_report([parsed(first, "first.json"), parsed(second, "second.json")])
    headlines = re.findall('<span class="value">([^<]+)</span> <span class="what">([^<]+)', html)
    assert headlines == [
        ("0", "faster beyond noise"),
        ("3", "slower beyond noise"),
        ("0.50x", "slower, the most"),
    ]


def test_what_differs_but_for_the_code_is_told() -> None:
    first, second = full_bench(), full_bench()
    second["environment"] |= {"device_name": "H200", "commit": "abc"}
    second["environment"]["versions"]["torch"] = "2.11"
    second["settings"]["depth"] = 4
    second["ceilings"]["copy_gigabytes_per_second"] *= 1.5
    for result in second["results"]:
        result["dtype"] = "bfloat16"
    comparison = compared(first, second)
    names = [name for name, _, _ in comparison.differences]
    assert names == ["device_name", "torch", "commit", "depth", "dtype"]
    assert ("depth", "8", "4") in comparison.differences
    said = " ".join(comparison_sentences(comparison))
    assert (
        "no like-for-like comparison: the runs differ in device_name, torch, depth, dtype." in said
    )
    assert "memory, copy (GB/s) 1.50x of what it was" in said
    html = render_report([parsed(first, "first.json"), parsed(second, "second.json")])
    assert "H200" in html
    assert "second.json against first.json" in html


def test_the_same_machine_and_settings_are_like_for_like() -> None:
    first, second = full_bench(), full_bench()
    second["environment"]["commit"] = "abc"
    said = " ".join(comparison_sentences(compared(first, second)))
    assert "like-for-like" not in said
    assert "Nothing changed beyond noise, of 28 configurations." in said


def test_many_comparisons_raise_false_alarms_as_often_as_is_said() -> None:
    random = np.random.default_rng(0)
    for count in (1, 8, 40, 120):
        alarms = random.binomial(count, 0.05, size=100_000)
        assert (alarms <= false_alarms(count)).mean() >= 0.945
        if false_alarms(count):
            assert (alarms <= false_alarms(count) - 1).mean() < 0.955
    comparison = compared(full_bench("sweep"), full_bench("sweep", seed=1))
    said = " ".join(comparison_sentences(comparison))
    assert "of 124 configurations up to 10 may seem changed by chance alone" in said


def test_verdicts_on_equal_runs_are_wrong_once_in_twenty_at_most() -> None:
    random = np.random.default_rng(3)
    first, second = (
        bench_of(**{f"p{index}": noise(random) for index in range(150)}) for _ in range(2)
    )
    told = [
        verdict for name, verdict in verdicts(compared(first, second)).items() if name[0] == "p"
    ]
    assert len(told) == 150
    assert len(told) - told.count(SAME) <= 12  # of 7.5; more has a chance of 1 in 30


def noise(random: np.random.Generator) -> list[float]:
    return [float(speed) for speed in 100 * np.exp(0.1 * random.standard_normal(5))]
