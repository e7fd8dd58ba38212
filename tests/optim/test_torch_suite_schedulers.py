"""All of torch's schedulers of the learning rate, and its averages of models, over ours.

Each scheduler is driven over ours beside ``torch.optim.RMSprop``. What torch's tests hold of the
schedulers themselves (that a closed form equals its recurrence, values by hand, bad arguments of
theirs) is torch's own affair: they never see which optimizer it is, but for what is here.
"""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from types import MethodType
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import (
    SWALR,
    AveragedModel,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)
from torch.testing import assert_close

from hogstream.optim import RMSprop
from torch_suite import LeastSquares, each_info, filled, params_of


def half(step: int) -> float:
    return 0.5**step


class Slower:
    """A factor that is an object, which schedulers save."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, step: int) -> float:
        return 1 / (1 + self.by * step)


def sequential(optimizer: Any) -> Any:
    first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    second = lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[3])


def chained(optimizer: Any) -> Any:
    parts = [
        lr_scheduler.ConstantLR(optimizer, factor=0.25, total_iters=2),
        lr_scheduler.ExponentialLR(optimizer, gamma=0.9),
        lr_scheduler.MultiStepLR(optimizer, milestones=[2, 5], gamma=0.5),
    ]
    return lr_scheduler.ChainedScheduler(parts, optimizer=optimizer)


def chain_of_sequences(optimizer: Any) -> Any:
    parts = [sequential(optimizer), lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer=optimizer)


def of(kind: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda optimizer: kind(optimizer, **kwargs)


#: At least one of each scheduler that torch has.
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": of(lr_scheduler.LambdaLR, lr_lambda=half),
    "LambdaLR of objects": of(lr_scheduler.LambdaLR, lr_lambda=[Slower(0.1), Slower(0.5)]),
    "MultiplicativeLR": of(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.95),
    "StepLR": of(lr_scheduler.StepLR, step_size=3, gamma=0.1),
    "MultiStepLR": of(lr_scheduler.MultiStepLR, milestones=[2, 5, 9], gamma=0.1),
    "ConstantLR": of(lr_scheduler.ConstantLR, factor=0.5, total_iters=4),
    "LinearLR": of(lr_scheduler.LinearLR, start_factor=0.3, end_factor=0.7, total_iters=5),
    "ExponentialLR": of(lr_scheduler.ExponentialLR, gamma=0.9),
    "PolynomialLR": of(lr_scheduler.PolynomialLR, total_iters=8, power=2.0),
    "CosineAnnealingLR": of(lr_scheduler.CosineAnnealingLR, T_max=6, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": of(
        lr_scheduler.CosineAnnealingWarmRestarts, T_0=3, T_mult=2, eta_min=1e-4
    ),
    "CyclicLR": of(
        lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=False
    ),
    "CyclicLR with momentum": of(
        lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3, mode="exp_range", gamma=0.9
    ),
    "OneCycleLR": of(
        lr_scheduler.OneCycleLR, max_lr=[0.1, 0.2], total_steps=13, cycle_momentum=False
    ),
    "OneCycleLR with momentum": of(
        lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=13, anneal_strategy="linear"
    ),
    "ReduceLROnPlateau": of(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=1, cooldown=1),
    "ReduceLROnPlateau of each group": of(
        lr_scheduler.ReduceLROnPlateau, mode="max", patience=0, min_lr=[0.01, 0.001]
    ),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "ChainedScheduler of SequentialLR": chain_of_sequences,
    "SWALR": of(SWALR, swa_lr=[0.5, 0.01], anneal_epochs=5),
    "SWALR in a line": of(SWALR, swa_lr=0.01, anneal_epochs=5, anneal_strategy="linear"),
}
each_scheduler = pytest.mark.parametrize("scheduler_of", SCHEDULERS.values(), ids=SCHEDULERS)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},  # which some schedulers move against the learning rate
    "tensor": {"lr": torch.tensor(0.05)},  # one for all groups that have none of their own
}


class Course:
    """An optimizer of two groups under a scheduler, and what both have been since the start.

    The second group's learning rate is a tensor, which schedulers change in place.
    """

    def __init__(
        self, make: Callable[..., Any], scheduler_of: Callable[[Any], Any], **options: Any
    ):
        self.problem = LeastSquares.made("cpu")
        groups = [
            {"params": [self.problem.weight]},
            {"params": [self.problem.bias], "lr": torch.tensor(0.5)},
        ]
        self.optimizer = make(groups, **{"lr": 0.05, **deepcopy(options)})
        self.scheduler_of = scheduler_of
        self.scheduler = scheduler_of(self.optimizer)
        self.seen: list[list[float]] = []

    def run(self, epochs: int) -> None:
        for _ in range(epochs):
            self.problem.train(self.optimizer, 1)
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(float(len(self.seen) % 5 != 1))  # goes up again and again
            else:
                self.scheduler.step()
            groups = self.optimizer.param_groups
            self.seen.append(
                [float(group[name]) for group in groups for name in ("lr", "momentum")]
            )

    def resumed(self, make: Callable[..., Any], **options: Any) -> Course:
        """A course of new objects that have loaded the states of these."""
        other = Course(make, self.scheduler_of, **options)
        with torch.no_grad():
            for param, mine in zip(other.problem.params, self.problem.params, strict=True):
                param.copy_(mine)
        other.optimizer.load_state_dict(deepcopy(self.optimizer.state_dict()))
        other.scheduler.load_state_dict(deepcopy(self.scheduler.state_dict()))
        other.seen = list(self.seen)
        return other


def test_all_of_torchs_schedulers_are_here():
    kinds = {
        kind
        for kind in (getattr(lr_scheduler, name) for name in lr_scheduler.__all__)
        if isinstance(kind, type) and kind is not lr_scheduler.LRScheduler
    }
    names = {name.partition(" ")[0] for name in SCHEDULERS}
    assert {kind.__name__ for kind in kinds} | {"SWALR"} == names


def options_of(info: Any) -> dict[str, Any]:
    """What makes an optimizer of ours one of torch's."""
    return {} if info.optim_cls is RMSprop else {"eps_inside_sqrt": False}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_scheduler
@each_info
def test_a_schedule_runs_as_over_torchs(info, scheduler_of, options):
    course = Course(info.optim_cls, scheduler_of, **options, **options_of(info))
    torchs = Course(torch.optim.RMSprop, scheduler_of, **options)
    for each in (course, torchs):
        each.run(12)
    assert course.seen == torchs.seen
    assert len({tuple(rates) for rates in course.seen}) > 1
    assert_close(course.problem.params, torchs.problem.params, rtol=1e-4, atol=1e-4)


@each_scheduler
@each_info
def test_a_schedule_is_resumed_from_its_state(info, scheduler_of):
    course = Course(info.optim_cls, scheduler_of, momentum=0.9)
    course.run(4)
    resumed = course.resumed(info.optim_cls, momentum=0.9)
    for each in (course, resumed):
        each.run(6)
    assert resumed.seen == course.seen
    assert_close(resumed.problem.params, course.problem.params, rtol=0, atol=0)


# What schedulers ask of an optimizer


def made(info: Any, **options: Any) -> Any:
    return info.optim_cls(params_of((2,)), **options)


@each_info
def test_the_order_of_steps_is_noticed(info):
    for before in ({}, {"initial_lr": 0.01}):
        optimizer = made(info)
        optimizer.param_groups[0].update(before)
        last_epoch = 10 if before else -1
        scheduler = lr_scheduler.StepLR(optimizer, step_size=3, last_epoch=last_epoch)
        with pytest.warns(UserWarning, match="how-to-adjust-learning-rate"):
            scheduler.step()
        right = made(info)
        scheduler = lr_scheduler.StepLR(right, step_size=3)
        for _ in range(3):
            right.step()
            scheduler.step()


@each_info
def test_a_step_that_was_replaced_is_noticed(info):
    optimizer = made(info)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=3)
    step = optimizer.step
    optimizer.step = MethodType(lambda _, *args: step(*args), optimizer)
    optimizer.step()
    with pytest.warns(UserWarning, match="has been overridden"):
        scheduler.step()


@each_info
def test_a_scheduler_is_not_kept_by_the_optimizer(info):
    def run() -> list[weakref.ref[Any]]:
        (param,) = params_of((3,))
        optimizer = info.optim_cls([param])
        scheduler = lr_scheduler.LambdaLR(optimizer, half)
        param.sum().backward()
        optimizer.step()
        scheduler.step()
        return [weakref.ref(scheduler), weakref.ref(optimizer)]

    gc.disable()  # without which nothing in a cycle would go
    try:
        assert [each() for each in run()] == [None, None]
    finally:
        gc.enable()


@each_info
def test_a_scheduler_that_resumes_wants_what_the_first_left(info):
    with pytest.raises(KeyError, match="initial_lr"):
        lr_scheduler.StepLR(made(info), step_size=3, last_epoch=1)


@each_info
def test_an_epoch_by_number_holds_its_learning_rate(info):
    optimizer = made(info, lr=1.0)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    optimizer.step()
    for _ in range(3):
        with pytest.warns(UserWarning, match="epoch parameter"):
            scheduler.step(4)
        assert optimizer.param_groups[0]["lr"] == 0.25


@each_info
def test_a_tensor_is_changed_in_place_and_stays_the_users(info):
    lr = torch.tensor(0.5)
    optimizer = made(info, lr=lr)
    scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25
    assert [float(each) for each in scheduler.base_lrs] == [0.5]


@each_info
def test_a_group_is_added_under_a_scheduler(info):
    optimizer = made(info, lr=0.5)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    optimizer.step()
    scheduler.step(1.0)
    added = params_of((3,))
    optimizer.add_param_group({"params": added, "lr": 0.25})
    scheduler.min_lrs.append(0.1)
    optimizer.step()
    scheduler.step(2.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.05, 0.1])


@each_info
def test_schedulers_that_want_momentum_say_so(info):
    # torch's RMSprop has a group's momentum, if only of 0, which these then change.
    optimizer = made(info)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
    (group,) = optimizer.param_groups
    assert group["momentum"] == 0.95
    optimizer.step()
    scheduler.step()
    assert group["momentum"] < 0.95


# Averages of models


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of torch that normalize a few numbers wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Normed(torch.nn.Module):
    """A layer and a normalization, which has buffers."""

    def __init__(self) -> None:
        super().__init__()
        # Without a bias, whose gradient would be nothing but rounding.
        self.linear = torch.nn.Linear(3, 1, bias=False)
        self.norm = torch.nn.BatchNorm1d(1, momentum=0.3)
        with torch.no_grad():
            for seed, param in enumerate(self.parameters()):
                param.copy_(filled(param, seed))

    def forward(self, input: torch.Tensor) -> Any:
        return self.norm(self.linear(input))

    def train_on(self, optimizer: Any, input: torch.Tensor) -> None:
        optimizer.zero_grad()
        (self(input) - input[:, :1]).square().sum().backward()
        optimizer.step()


AVERAGES: dict[str, dict[str, Any]] = {
    "mean": {},
    "swa": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema, by hand": {"avg_fn": lambda averaged, param, _: 0.9 * averaged + 0.1 * param},
    "with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
}


@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.usefixtures("one_thread")
@each_info
def test_an_average_of_what_is_trained(info, options):
    inputs = [filled(torch.empty(6, 3), seed) for seed in range(5)]
    averages: list[Any] = []
    for make, own in ((info.optim_cls, options_of(info)), (torch.optim.RMSprop, {})):
        model = Normed()
        averaged: Any = AveragedModel(model, **options)
        optimizer = make(model.parameters(), **own)
        scheduler = SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
        visited = []
        for input in inputs:
            model.train_on(optimizer, input)
            averaged.update_parameters(model)
            scheduler.step()
            visited.append(model.linear.weight.detach().clone())
        if not options:
            assert_close(averaged.module.linear.weight, torch.stack(visited).mean(0))
        averages.append(averaged)
    assert_close(*(dict(each.state_dict()) for each in averages), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("one_thread")
@each_info
def test_an_averaged_model_is_saved_loaded_and_normalized_anew(info):
    model = Normed()
    averaged: Any = AveragedModel(model)
    loaded = AveragedModel(model)
    optimizer = info.optim_cls(model.parameters())
    inputs = [filled(torch.empty(6, 3), seed) for seed in range(4)]
    for input in inputs:
        model.train_on(optimizer, input)
        averaged.update_parameters(model)
    loaded.load_state_dict(averaged.state_dict())
    copy = pickle.loads(pickle.dumps(loaded))
    assert_close(dict(copy.state_dict()), dict(averaged.state_dict()))
    assert copy.n_averaged == 4
    update_bn(inputs, averaged)
    with torch.no_grad():
        outputs = torch.cat([averaged.module.linear(input) for input in inputs])
    norm = averaged.module.norm
    assert norm.momentum == 0.3
    assert_close(norm.running_mean, outputs.mean(0))
    # The mean of the batches' own variances, each of six.
    assert_close(norm.running_var, outputs.reshape(4, 6, 1).var(1).mean(0))


@pytest.mark.usefixtures("one_thread")
@each_info
def test_an_averaged_model_can_be_trained_on(info):
    averaged: Any = AveragedModel(Normed())
    optimizer = info.optim_cls(averaged.parameters())
    before = averaged.module.linear.weight.detach().clone()
    averaged.module.train_on(optimizer, filled(torch.empty(6, 3), 0))
    assert not torch.equal(averaged.module.linear.weight, before)
