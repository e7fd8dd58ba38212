"""What turns come to, and decisions as a user asks for them."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import problems
from hogstream import profiling
from hogstream.profiling.environment import usable_cores
from hogstream.profiling.event_loop import run
from hogstream.profiling.measure import decision as job
from hogstream.profiling.measure.problem import checked_problem
from hogstream.profiling.measure.ways import Kind, PlainLoop, Turn, kinds_of, way_of
from hogstream.profiling.report import deciding
from hogstream.profiling.results.files import decoded
from hogstream.profiling.results.schema import Decision
from process_testing import interrupt_hogstream

Command = Callable[..., tuple[int, str, str]]
LOOP = PlainLoop.kind
LOCKED = Kind("threads", "locked", 2)
LOCK_FREE = Kind("threads", "lock-free", 2)
HAND = Kind("hand", "locked", 2)


def turn(updates: int, loss: float, latency_us: float | None = None) -> Turn:
    """So many updates, whose loss falls by 1 with each, down to ``loss``."""
    losses = [loss + updates - 1 - index for index in range(updates)]
    staleness = None if latency_us is None else 1.5
    return Turn(10.0 * updates, losses, 1, latency_us, staleness, None if latency_us is None else 4)


def test_losses_are_of_as_many_updates_and_of_the_same_time() -> None:
    turns = {
        LOOP: [turn(10, 5.0)] * 4 + [turn(8, 7.0)],
        LOCKED: [turn(20, 2.0, 30.0)] * 4 + [turn(9, 1.0, 40.0)],
    }
    loop, locked = (job._way(kind, turns) for kind in turns)
    assert loop.updates_compared == locked.updates_compared == 8
    # The last fifth of eight, of which it is two: 7 and 8 after the eighth.
    assert loop.loss is not None
    assert loop.loss.samples == [7.5] * 5
    assert (loop.loss_over_loop, loop.loss_over_loop_in_time) == (None, None)
    assert locked.loss is not None
    assert locked.loss_over_loop is not None
    assert locked.loss_over_loop_in_time is not None
    assert locked.loss.samples == [14.5] * 4 + [2.5]
    assert locked.loss_over_loop.samples == [7.0] * 4 + [-5.0]
    assert locked.loss_over_loop_in_time.samples == [3.5 - 5.5] * 4 + [1.5 - 7.5]
    assert locked.updates_per_second.samples == [200.0] * 4 + [90.0]
    assert (locked.most_staleness, loop.most_staleness) == (4, None)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_none(number: float) -> None:
    turns = {LOOP: [turn(5, 1.0)] * 5, LOCK_FREE: [turn(5, 1.0)] * 4 + [turn(5, number)]}
    way = job._way(LOCK_FREE, turns)
    assert (way.loss, way.loss_over_loop, way.loss_over_loop_in_time) == (None, None, None)
    assert job._way(LOOP, turns).loss is not None


def test_a_loss_that_is_no_number_after_the_updates_compared_is_none() -> None:
    later = replace(turn(5, 1.0), losses=[5.0, 4.0, 3.0, 2.0, 1.0, *[math.nan] * 5])
    turns = {LOOP: [turn(5, 1.0)] * 5, LOCK_FREE: [later] * 5}
    way = job._way(LOCK_FREE, turns)
    assert (way.updates_compared, way.loss) == (5, None)


def test_what_locked_waits_is_what_it_takes_more_than_lock_free() -> None:
    turns = {
        LOCKED: [turn(5, 1.0, latency) for latency in (50.0, 60.0)],
        LOCK_FREE: [turn(5, 1.0, latency) for latency in (45.0, 65.0)],
        HAND: [turn(5, 1.0)] * 2,
    }
    waits = {kind: job._way(kind, turns).lock_wait_us for kind in turns}
    assert waits.pop(LOCKED).samples == [5.0, -5.0]  # type: ignore[union-attr]
    assert waits == {LOCK_FREE: None, HAND: None}
    assert job._way(LOCKED, {LOCKED: turns[LOCKED]}).lock_wait_us is None


def test_which_ways_there_are() -> None:
    names = [kind.name for kind in kinds_of((1, 3), processes=True)]
    assert names == [
        "a plain loop",
        "one worker in a thread",
        "locked over threads with 3 workers",
        "ordered over threads with 3 workers",
        "lock-free over threads with 3 workers",
        "one worker in a process",
        "locked over processes with 3 workers",
        "lock-free over processes with 3 workers",
        "locked over processes by hand with 3 workers",
    ]
    assert [kind.name for kind in kinds_of((1, 3), processes=False)] == names[:5]
    assert len(kinds_of((2, 4), processes=True)) == 3 + 2 * 6
    assert job.default_workers() == (max(2, min(16, usable_cores())),)


@pytest.mark.slow
def test_a_user_decides_over_threads(hogstream: Command, tmp_path: Path) -> None:
    json_file = tmp_path / "decision.json"
    threads = torch.get_num_threads()
    status, out, err = hogstream(
        *("decide", "problems:line", "--no-processes", "--seconds", "0.6", "--workers", "2"),
        *("--lr", "0.05", "--json", json_file),
    )
    assert (status, err.count("\n")) == (0, 5 + 5 * 5)  # a line a step
    assert torch.get_num_threads() == threads
    decision = decoded(json_file.read_text("utf-8"), Decision)
    check(decision, kinds_of([2], processes=False))
    said = " ".join(out.split())
    for sentence in deciding.said(decision):
        assert sentence in said
    assert f"wrote {json_file}" in out
    assert decision.settings.make == "problems:line"
    assert decision.settings.lr == 0.05
    assert json.loads(json_file.read_text("utf-8"))["kind"] == "decide"


def check(decision: Decision, kinds: list[Kind]) -> None:
    """Checks what every decision must hold, with these ways."""
    assert [Kind(way.run_by, way.policy, way.workers) for way in decision.results] == kinds
    assert (decision.partial, decision.error, decision.elements) == (False, None, 1)
    assert decision.answer.startswith(("Use ", "It makes no difference here: use "))
    for way in decision.results:
        assert len(way.updates_per_second.samples) == job.ROUNDS
        assert way.updates_per_second.interval is not None
        assert way.torch_threads in (1, usable_cores())
        assert way.loss is not None
        assert way.loss.median >= 0
        scheduled = way.run_by in ("threads", "processes")
        assert (way.staleness is not None) == (way.latency_us is not None) == scheduled
        assert (way.lock_wait_us is not None) == (scheduled and way.policy == "locked")
        assert (way.loss_over_loop is None) == (way.run_by == "loop")
    (cost,) = decision.under_lock
    assert cost.workers == 2
    assert 1 < cost.most_gain.median < 2
    share = (cost.most_gain.samples[0] - 1) * (
        cost.gradient_ms.samples[0] + cost.update_ms.samples[0]
    )
    assert share == pytest.approx(cost.update_ms.samples[0])


@pytest.mark.slow
def test_processes_take_turns_and_end_with_their_ways() -> None:
    make = problems.two_batches
    problem = checked_problem(make)

    async def turns() -> list[list[Turn]]:
        async with AsyncExitStack() as stack:
            ways = [
                await stack.enter_async_context(way_of(kind, problem, make, 0.05))
                for kind in (Kind("processes", "lock-free", 1), HAND)
            ]
            return [[await way.turn(0.1) for _ in range(2)] for way in ways]

    scheduled, by_hand = run(turns())
    assert multiprocessing.active_children() == []
    for first, second in (scheduled, by_hand):
        assert first.updates_per_second > 0
        for turn_ in (first, second):  # each begins with a weight of 0
            assert {9.0, 36.0} & {*turn_.losses}
    assert scheduled[0].staleness == 0
    assert by_hand[0].staleness is None


@pytest.mark.slow
def test_an_interrupted_decision_tells_of_its_rounds(tmp_path: Path) -> None:
    json_file = tmp_path / "decision.json"
    status, out, err = interrupt_hogstream(
        "round 3: a plain loop",
        *("decide", "problems:line", "--no-processes", "--workers", "2", "--seconds", "1"),
        *("--json", json_file),
    )
    assert status == 130
    assert err.endswith("hogstream: interrupted\n")
    said = " ".join(out.split())
    assert "2 of 5 rounds tell nothing for sure: until then use a plain loop" in said
    assert "these are only the results that there were by then" in said
    decision = decoded(json_file.read_text("utf-8"), Decision)
    assert (decision.partial, decision.error) == (True, None)
    assert {len(way.updates_per_second.samples) for way in decision.results} == {2}


def test_a_loss_that_diverges_is_no_reason_to_fail() -> None:
    decision = profiling.decide(problems.diverges, workers=[2], seconds=0.2, processes=False)
    assert {way.loss for way in decision.results} == {None}
    assert "Every way diverged" in decision.answer


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"workers\[1\] must be an integer >= 1, got 0"):
        profiling.decide(problems.line, workers=[2, 0])
    with pytest.raises(ValueError, match="seconds must be a finite number > 0, got 0"):
        profiling.decide(problems.line, seconds=0)
    with pytest.raises(ValueError, match="lr must be a finite number >= 0, got -1"):
        profiling.decide(problems.line, lr=-1)
    with pytest.raises(AttributeError, match="has no attribute 'decided'"):
        profiling.decided  # noqa: B018


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("problems", "must be MODULE:NAME, such as my_module:name, got 'problems'"),
        ("no-module:make", "must be MODULE:NAME, such as my_module:name, got 'no-module:make'"),
        ("no_module:make", "cannot import no_module: ModuleNotFoundError: No module named"),
        ("problems:nothing", "problems has no nothing"),
        ("problems:not_three", "must return (model, loss, batches), got a tuple of 2"),
        ("problems:fails", "must make what can be trained, but failed: LookupError: no data here"),
        ("problems:torch", "must be callable, got <module 'torch'"),
    ],
)
def test_what_is_named_wrongly_is_a_line(hogstream: Command, name: str, said: str) -> None:
    status, out, err = hogstream("decide", name, "--no-processes")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert "MAKE'" in err
