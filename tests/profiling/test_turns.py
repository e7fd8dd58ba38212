"""Taking turns: who goes first, and what is sampled."""

from __future__ import annotations

import pytest
import torch

from hogstream.profiling.turns import Rate, in_turn, interleave, sample_in_turn


def test_each_goes_first_in_its_turn() -> None:
    assert [in_turn("abc", index) for index in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_calls_are_timed_in_turn_after_each_was_warmed_up() -> None:
    done: list[str] = []
    calls = {name: lambda name=name: done.append(name) for name in ("first", "second")}
    seconds = interleave(calls, torch.device("cpu"), rounds=3)
    assert done == ["first", "second", "first", "second", "second", "first", "first", "second"]
    assert {name: len(each) for name, each in seconds.items()} == {"first": 3, "second": 3}
    assert min(min(each) for each in seconds.values()) >= 0


def test_on_a_gpu_a_sample_is_of_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("synchronized"))
    seconds = interleave({"a": lambda: done.append("a")}, torch.device("cuda", 0), rounds=2)
    sample = ["synchronized", *["a"] * 50, "synchronized"]
    assert done == ["a", *sample, *sample]
    assert len(seconds["a"]) == 2


def test_rates_are_sampled_in_turn() -> None:
    done: list[tuple[str, int]] = []

    def seconds_of(name: str, each: float, times: int) -> float:
        done.append((name, times))
        return each * times

    samples = sample_in_turn(
        {
            "slow": Rate(lambda times: seconds_of("slow", 0.5, times), 3.0),
            "fast": Rate(lambda times: seconds_of("fast", 0.003, times), 6.0),
        },
        rounds=3,
    )
    assert done[-6:] == [
        *(("slow", 1), ("fast", 8)),  # 8 times take 20 ms or more, 4 do not
        *(("fast", 8), ("slow", 1)),
        *(("slow", 1), ("fast", 8)),
    ]
    assert samples["slow"] == [6.0] * 3
    assert samples["fast"] == pytest.approx([2000.0] * 3)


def test_a_first_call_that_compiles_is_not_taken_for_a_sample() -> None:
    done: list[int] = []

    def seconds_of(times: int) -> float:
        done.append(times)
        return 0.004 * times + (1.0 if len(done) == 1 else 0.0)

    sample_in_turn({"rate": Rate(seconds_of, 1.0)}, rounds=2)
    assert done[-2:] == [8, 8]
