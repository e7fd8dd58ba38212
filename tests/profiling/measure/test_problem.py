"""What a user brings to decide for: taken as it is, or refused with a reason."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

import problems
from hogstream.profiling.measure import problem as job
from hogstream.profiling.measure.problem import Start, checked_problem, make_by_hand, make_worker
from hogstream.scheduler import ModelWorker, SettingError, SharedParameters

REFUSED = {
    "not_three": r"make must return \(model, loss, batches\), got a tuple of 2",
    "no_model": "make must return a torch.nn.Module first, got str",
    "frozen": "make must return a model with a parameter that requires a gradient, got none",
    "no_loss": "make must return a loss that is called with model and batch, got float",
    "no_batches": "make must return batches that can be iterated over, got int",
    "empty": "make must make what can be trained, but failed: RuntimeError: batches must hold",
    "not_a_scalar": r"make must return a loss that returns a tensor of one element, got \(4,\)",
    "a_float": "make must return a loss that returns a tensor of one element, got float",
    "no_gradient": "make must return a loss that depends on a parameter",
    "fails": r"make must make .* but failed: LookupError: no data here \(.*problems.py:\d+\)",
    "loss_fails": r"make must make what can be trained, but failed: TypeError: .*",
    "of_two_dtypes": "make must make what can be trained, but failed: TypeError: .* must be torch",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused(name: str) -> None:
    with pytest.raises(SettingError, match=f"^{REFUSED[name]}"):
        checked_problem(getattr(problems, name))


def test_what_cannot_be_called_is_refused() -> None:
    make: Any = 3
    with pytest.raises(SettingError, match=r"^make must be callable, got 3"):
        checked_problem(make)


def test_a_check_trains_nothing_and_batches_begin_anew() -> None:
    problem = checked_problem(problems.two_batches)
    assert problem.elements == 1
    assert problem.model.state_dict() == {"weight": torch.zeros(1), "batches": torch.tensor(0)}
    assert all(each.grad is None for each in problem.model.parameters())
    assert [next(problem.batches)[0].item() for _ in range(3)] == [2, 1, 2]  # 1 went to the check
    copied = problem.copied()
    assert copied.backward() == 9 * 1
    assert problem.model.state_dict()["batches"] == 0


def test_a_seed_that_make_sets_does_not_make_batches_the_same_everywhere() -> None:
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn.append(next(checked_problem(problems.line).batches).tolist())
    assert drawn[0] != drawn[1]


def test_a_start_is_found_again() -> None:
    model = torch.nn.BatchNorm1d(3)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    start = Start(model)
    model(torch.randn(8, 3))
    model.weight.data.add_(1)
    assert model.state_dict()["num_batches_tracked"] == 1
    start.restore()
    for name, each in model.state_dict().items():
        assert torch.equal(each, before[name])


def test_a_process_makes_a_problem_once(monkeypatch: pytest.MonkeyPatch) -> None:
    job._made_here.cache_clear()
    calls = []
    line = problems.line

    def counted() -> Any:
        calls.append(1)
        return line()

    monkeypatch.setattr(problems, "line", counted)
    monkeypatch.setattr(counted, "__module__", "problems")
    monkeypatch.setattr(counted, "__qualname__", "line")
    pickled = pickle.dumps(problems.line)
    shared = SharedParameters.from_module(line()[0])
    run: Any = None
    assert isinstance(make_worker(pickled, shared, 0), ModelWorker)
    assert make_worker(pickled, shared, 0) is not make_worker(pickled, shared, 0)
    loss, batches = make_by_hand(pickled, run)
    assert loss is problems.square_loss
    assert next(batches).shape == (4,)
    assert len(calls) == 1
    job._made_here.cache_clear()
