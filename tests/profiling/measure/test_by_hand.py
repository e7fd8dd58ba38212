"""Processes by hand: plain loops in them, what comes back, and how they end."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import pickle
from typing import Any

import pytest
import torch

from hand_work import (
    OneProcess,
    do_as_told,
    first_weight,
    line_and_batches,
    nothing_left,
    tell_of_itself,
)
from hogstream.profiling.environment import usable_cores
from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.event_loop import run
from hogstream.profiling.measure.by_hand import (
    ByHand,
    HandReport,
    HandRun,
    Hogwild,
    _Given,
    _Own,
)


def processes() -> list[str]:
    return sorted(each.name for each in multiprocessing.active_children())


def line() -> torch.nn.Module:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    return model


@pytest.mark.slow
def test_processes_share_a_model_and_tell_what_they_do() -> None:
    model = line()
    losses: list[tuple[int, float]] = []
    results: list[tuple[int, Any]] = []

    def note_loss(worker: int, loss: float) -> None:
        losses.append((worker, loss))

    def note_result(worker: int, result: Any) -> None:
        results.append((worker, result))

    async def measure() -> list[HandReport]:
        async with ByHand(tell_of_itself, model, processes=2, extra=torch.tensor(5.0)) as by_hand:
            assert processes() == ["hogstream-by-hand-0", "hogstream-by-hand-1"]
            by_hand.stop()  # without effect: nothing runs
            torch.manual_seed(1)
            reports = [
                await by_hand.run(updates=7, on_loss=note_loss, on_result=note_result),
                await by_hand.run(seconds=0.05),
            ]
            running = asyncio.ensure_future(
                by_hand.run(updates=10**9, on_result=lambda *_: by_hand.stop())
            )
            reports.append(await running)
            with pytest.raises(ValueError, match="updates or seconds must be given, got neither"):
                await by_hand.run()
            return reports

    counted, timed, stopped = run(measure())
    assert processes() == []
    assert sorted(counted.updates_by_process) == [3, 4]
    assert not counted.partial
    assert sorted(losses) == [
        (process, float(process))
        for process in (0, 1)
        for _ in range(counted.updates_by_process[process])
    ]
    abouts = {worker: [each for who, each in results if who == worker] for worker in (0, 1)}
    for worker, each in abouts.items():
        assert all(about == each[0] for about in each)
        assert len(each) == counted.updates_by_process[worker]
        assert each[0]["process"] == (worker, 2)
        assert each[0]["extra"] == 5
        assert each[0]["threads"] == counted.torch_threads == max(1, usable_cores() // 2)
    for mine, other in zip(abouts[0][0]["random"], abouts[1][0]["random"], strict=True):
        assert mine != other
    assert timed.seconds >= 0.05
    assert not timed.partial
    assert timed.updates_per_second == timed.updates / timed.seconds
    assert stopped.partial
    made = sum(each.updates for each in (counted, timed, stopped))
    assert first_weight(model) == made  # none was lost, as each was made under the lock


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "error", "said"),
    [
        (("go", "fail"), MeasurementError, "process 1 by hand failed: LookupError: no such batch"),
        (("hang", "die"), MeasurementError, "process 1 by hand ended with exit code -9"),
        (("go", "go"), asyncio.CancelledError, None),
    ],
)
def test_processes_end_however_a_run_does(
    told: Any, error: type[BaseException], said: str | None
) -> None:
    async def measure() -> None:
        async with ByHand(do_as_told, line(), processes=2, extra=told) as by_hand:
            running = asyncio.ensure_future(by_hand.run(updates=10**9))
            while told == ("go", "go") and not sum(by_hand._made):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            if told == ("go", "go"):
                running.cancel()
            with pytest.raises(error, match=said):
                await running
            assert by_hand.report is not None
            assert by_hand.report.partial
            assert processes() == []
            with pytest.raises(RuntimeError, match="the processes have ended"):
                await by_hand.run(updates=1)

    run(measure())


def test_a_run_tells_what_it_has_kept_and_what_is_wrong() -> None:
    end, its = multiprocessing.Pipe()
    own = _Own(0, 1, multiprocessing.Lock(), multiprocessing.Value("b", False), [0])
    mine = HandRun(own, _Given(line(), None), its, 2)
    with pytest.raises(RuntimeError, match=r"work must call going\(\) before each update"):
        mine.close()
    end.send(math.inf)
    while mine.going():
        mine.landed(0.5)
    mine.landed(0.25)
    with pytest.raises(TypeError, match="value must be something that can be pickled, got <func"):
        mine.send(lambda: None)
    mine.send("value")
    mine.landed(0.75)  # which is still to be told
    mine.close()
    assert end.recv() == (None, None)  # it has come to its first update
    told = []
    while end.poll():
        told += end.recv()[0]
    losses = [(True, loss) for loss in (0.5, 0.5, 0.25)]
    assert told == [*losses, (False, pickle.dumps("value")), (True, 0.75)]
    assert own.made == [4]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(TypeError, match="work must be a function of a module"):
        ByHand(lambda run: None, line(), processes=2)
    with pytest.raises(ValueError, match="processes must be an integer >= 1, got 0"):
        ByHand(do_as_told, line(), processes=0)
    with pytest.raises(RuntimeError, match="the processes have ended"):
        run(ByHand(do_as_told, line(), processes=1).run(updates=1))


@pytest.mark.parametrize("locked", [True, False])
def test_the_plain_loop_is_torchs(locked: bool) -> None:
    """Batches begin anew, and the lock is held around each step and nothing else."""
    model, expected = line(), line()
    one = OneProcess(model, 5)
    step = torch.optim.RMSprop.step

    def watched(optimizer: torch.optim.RMSprop) -> None:
        one.held.append(not one.lock.acquire(block=False))
        if not one.held[-1]:
            one.lock.release()
        step(optimizer)

    loop: Any = Hogwild(line_and_batches, {"lr": 0.1, "eps": 0.5}, locked=locked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.RMSprop, "step", watched)
        loop(one)
    assert one.held == [locked] * 5
    loss_of, batches = line_and_batches(one)  # type: ignore[arg-type]
    optimizer = torch.optim.RMSprop(expected.parameters(), lr=0.1, eps=0.5)
    losses = []
    for index in range(5):
        optimizer.zero_grad()
        loss = loss_of(expected, batches[index % 2])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert one.losses == losses
    assert first_weight(model) == first_weight(expected)


def test_batches_that_have_run_out_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="batches must hold at least one batch, got none"):
        Hogwild(nothing_left, {"lr": 0.1})(OneProcess(line(), 1))  # type: ignore[arg-type]
