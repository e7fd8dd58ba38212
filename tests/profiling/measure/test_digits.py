"""Training on the digits: what is made of trainings that diverge, and of several policies."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hogstream.profiling.measure import digits
from hogstream.profiling.report.answers import answer
from hogstream.profiling.report.sentences import of_train
from hogstream.profiling.results.files import read_result, write_result
from hogstream.profiling.results.gains import training_gains_of
from hogstream.profiling.results.records import Spread
from hogstream.profiling.results.schema import Train
from hogstream.scheduler import SchedulerSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("sklearn"), reason="no scikit-learn"),
]


def train(
    *policies: str, rounds: int, epochs: int = 1, on_step: Callable[[str], None] = lambda step: None
) -> Train:
    settings = digits.TrainSettings(
        device=torch.device("cpu"),
        backend="numpy",
        processes=1,
        epochs=epochs,
        rounds=rounds,
        seed=0,
        scheduling=SchedulerSettings(workers=2, backend="numpy"),
    )
    data = digits.load_digits(settings)
    return digits.run_training(settings, policies, data, "hogstream train", on_step)


def test_a_training_that_diverges_is_told_as_far_as_there_are_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "LEARNING_RATE", 1e36)
    result = train("lock-free", rounds=1)
    (run,) = result.results
    assert run.final_loss is None
    assert run.updates == 45
    assert 0 < len(run.losses) < 45  # the first batch is lost on what was not trained yet
    assert all(math.isfinite(loss) for _, loss in run.losses)
    write_result(result, tmp_path / "train.json")
    assert read_result(tmp_path / "train.json").result == result


def test_policies_that_finished_as_many_rounds_are_set_against_each_other() -> None:
    seconds = {
        "lock-free": Spread.of([1.0, 2.0, 1.0, 2.0, 1.0]),
        "locked": Spread.of([3.0, 6.0, 3.0, 6.0, 3.0]),
        "ordered": Spread.of([3.0, 6.0, 3.0, 6.0]),
    }
    gains = training_gains_of("lock-free", seconds)
    assert gains.keys() == {"locked"}
    assert (gains["locked"].median, gains["locked"].interval) == (3.0, (3.0, 3.0))
    result = train("lock-free", "locked", rounds=1)
    mine, theirs = result.results
    ratio = theirs.training_seconds.median / mine.training_seconds.median
    assert mine.gains["locked"].median == pytest.approx(ratio)
    assert theirs.gains["lock-free"].median == pytest.approx(1 / ratio)


def test_a_training_that_was_cut_short_is_not_the_soonest() -> None:
    def interrupt(step: str) -> None:
        if step.startswith("lock-free, round 1, epoch 2"):
            signal.raise_signal(signal.SIGINT)

    result = train("locked", "lock-free", rounds=1, epochs=2, on_step=interrupt)
    whole, short = result.results
    assert (whole.policy, whole.partial) == ("locked", False)
    assert (short.policy, short.partial) == ("lock-free", True)
    assert whole.gains == short.gains == {}
    assert answer(result).verdict.startswith("Locked trained in")
    assert not any("As fast" in fact.name for fact in answer(result).facts)


def test_rounds_are_those_that_were_made() -> None:
    def interrupt(step: str) -> None:
        if step.startswith("locked, round 6"):
            signal.raise_signal(signal.SIGINT)

    result = train("lock-free", "locked", rounds=1000, on_step=interrupt)
    said = " ".join(of_train(result))
    assert "over 5 rounds" in said
