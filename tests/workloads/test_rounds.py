"""Trainings in rounds: who reaches the target, when, and what is made of those that do not."""

from __future__ import annotations

import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.report.sentences import of_train
from hogstream.profiling.results.files import read_result, write_result
from hogstream.profiling.results.gains import ALONE
from hogstream.profiling.results.schema import Train
from hogstream.scheduler import WorkerContext
from hogstream.workloads import Target, Workload
from hogstream.workloads.rounds import TrainSettings, train
from hogstream.workloads.training import Limit
from tiny_workload import TINY, Counting, error_of_all

pytestmark = pytest.mark.slow


def trained(
    workload: Workload,
    *policies: str,
    rounds: int = 1,
    beside: bool = False,
    updates: int | None = None,
    on_step: Any = str,
) -> Train:
    settings = TrainSettings(
        device=torch.device("cpu"),
        backend="numpy",
        policies=policies,
        beside=beside,
        processes=1,
        limit=Limit(updates, 60.0),
        rounds=rounds,
        seed=0,
        scheduling=replace(workload.settings, backend="numpy"),
    )
    return train(workload, settings, "hogstream train", on_step)


def test_each_reaches_the_target_in_each_round(tmp_path: Path) -> None:
    steps: list[str] = []
    result = trained(TINY, "lock-free", "locked", rounds=2, on_step=steps.append)
    assert steps == [
        *("round 1: lock-free", "round 1: locked"),
        *("round 2: locked", "round 2: lock-free"),
    ]
    assert (result.partial, result.settings.workload) == (False, "tiny")
    mine, theirs = result.results
    for run in (mine, theirs):
        assert (run.reached, run.partial) == ([True, True], False)
        assert run.metric is not None
        assert max(run.metric.samples) <= TINY.target.value
        assert min(run.seconds_to_target.samples) > 0
        assert sum(run.seconds_to_target.samples) <= run.seconds
        assert sum(run.updates_to_target.samples) <= run.updates
        assert run.metrics[0][0] == 0.0
        assert run.metrics[0][1] > TINY.target.value
        assert run.metrics[-1][1] <= TINY.target.value
        assert run.losses[0][1] > run.losses[-1][1]
        assert [at for at, _ in run.losses] == sorted(at for at, _ in run.losses)
        assert run.evaluations >= 4
        assert 0 < run.evaluation_share < 1
    ratio = theirs.seconds_to_target.median / mine.seconds_to_target.median
    assert mine.gains["locked"].median == pytest.approx(ratio)
    assert theirs.gains["lock-free"].median == pytest.approx(1 / ratio)
    write_result(result, tmp_path / "train.json")
    assert read_result(tmp_path / "train.json").result == result


def test_one_worker_alone_takes_turns_and_what_has_no_training_by_hand_is_told() -> None:
    result = trained(Counting(), "lock-free", beside=True)
    mine, alone = result.results
    assert (mine.policy, mine.workers) == ("lock-free", 2)
    assert (alone.policy, alone.workers) == (ALONE, 1)
    assert alone.staleness.max == 0
    assert (mine.reached, alone.reached) == ([True], [True])  # by what workers have sent
    assert mine.losses == alone.losses == []
    assert mine.metrics[0][1] <= 50 * 100  # the untrained model has no metric
    said = "counting has no training by hand: it is not set against that."
    assert said in result.warnings
    assert said in of_train(result)


def test_a_training_that_does_not_get_there_is_given_up() -> None:
    never = replace(TINY, target=Target("error", -1.0, higher_is_better=False))
    result = trained(never, "lock-free", "locked", updates=40)
    for run in result.results:
        assert (run.reached, run.partial, run.updates) == ([False], False, 40)
        assert run.updates_to_target.samples == [40.0]
        assert run.gains == {}
    assert of_train(result)[0] == "Lock-free reached error -1 or less in 0 of 1 round only."


def test_a_training_that_diverges_is_told_as_far_as_there_are_numbers(tmp_path: Path) -> None:
    numbers = Hyperparameters(lr=1e30, eps_inside_sqrt=False)
    wild = replace(TINY, settings=replace(TINY.settings, hyperparameters=numbers))
    result = trained(wild, "lock-free", updates=40)
    (run,) = result.results
    assert (run.metric, run.reached) == (None, [False])
    assert run.updates == 40
    assert all(math.isfinite(loss) for _, loss in run.losses)
    write_result(result, tmp_path / "train.json")
    assert read_result(tmp_path / "train.json").result == result


def test_a_training_that_was_cut_short_is_told_as_far_as_it_went() -> None:
    learned: list[float] = []

    def interrupt(model: torch.nn.Module) -> float:
        error = error_of_all(model)
        if error < 0.1 and not learned:
            learned.append(error)
            signal.raise_signal(signal.SIGINT)
        return error

    never = Target("error", -1.0, higher_is_better=False)
    result = trained(replace(TINY, metric=interrupt, target=never), "lock-free", "locked")
    (short,) = result.results
    assert result.partial
    assert (short.policy, short.partial, short.reached) == ("lock-free", True, [False])
    assert short.updates > 0
    assert short.gains == {}


def test_a_training_that_was_cut_short_does_not_spoil_whole_ones() -> None:
    steps: list[str] = []

    def interrupt(model: torch.nn.Module) -> float:
        error = error_of_all(model)
        if error < 0.1 and steps[-1] == "round 2: locked":
            steps.append("interrupted")
            signal.raise_signal(signal.SIGINT)
        return error

    workload = replace(TINY, metric=interrupt)
    result = trained(workload, "locked", rounds=1000, on_step=steps.append)
    (run,) = result.results
    assert steps == ["round 1: locked", "round 2: locked", "interrupted"]
    assert (result.partial, run.partial, run.reached) == (True, False, [True])


@pytest.mark.parametrize("method", ["model", "worker", "evaluate"])
def test_a_workload_that_fails_ends_the_measurement_with_its_error(method: str) -> None:
    def fail(*_: object) -> None:
        raise LookupError("no data")

    failing = type("Failing", (Counting,), {method: fail})()
    with pytest.raises(MeasurementError, match=f"{method} of counting failed: LookupError: no"):
        trained(failing, "lock-free")


def test_an_evaluation_that_fails_late_ends_its_training() -> None:
    class Failing(Counting):
        def evaluate(self, model: torch.nn.Module, results: Any) -> float:
            if results:
                raise LookupError("no data")
            return 0.0

    result = trained(Failing(), "lock-free", "locked")
    assert result.partial
    assert result.error is not None
    assert result.error.startswith("evaluate of counting failed: LookupError: no data")
    assert [run.partial for run in result.results] == [True]


def test_a_worker_that_fails_ends_the_measurement() -> None:
    class Failing(Counting):
        def worker(self, shared: Any, process: int) -> Any:
            work = super().worker(shared, process)

            async def fail(context: WorkerContext) -> None:
                await work(context)
                if context.iteration == 3:
                    raise LookupError("no data")

            return fail

    result = trained(Failing(), "lock-free")
    assert result.error is not None
    assert "LookupError: no data" in result.error


@pytest.mark.parametrize(
    ("workload", "said"),
    [
        (replace(TINY, target=Target("error", 9.0, higher_is_better=False)), "has its target of 9"),
        (type("Wrong", (Counting,), {"evaluate": lambda *_: "x"})(), "must return a number, got"),
    ],
    ids=["reached", "text"],
)
def test_what_cannot_be_a_target_is_refused(workload: Workload, said: str) -> None:
    with pytest.raises(MeasurementError, match=said):
        trained(workload, "lock-free")


def test_rounds_begin_with_other_parameters_and_all_in_a_round_with_the_same() -> None:
    first = trained(TINY, "lock-free", "locked")
    starts = [run.metrics[0][1] for run in first.results]
    assert starts[0] == starts[1]
    torch.manual_seed(0)
    assert starts[0] == pytest.approx(error_of_all(TINY.make_model()))
