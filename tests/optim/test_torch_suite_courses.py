"""Random courses of an optimizer of ours beside torch's: what happens to one happens to the other.

Each seed draws parameters, options and what is done between steps: groups added, options changed,
parameters frozen, states exchanged, optimizers copied.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.testing import assert_close

from hogstream.optim import RMSprop, export_state, import_state
from torch_suite import SHAPES, each_info, filled, params_in

#: What a group may ask for. ``eps`` is well above what is left of a variance where it is centered.
OPTIONS: dict[str, list[Any]] = {
    "lr": [0.1, 0.01, torch.tensor(0.02, dtype=torch.float64)],
    "alpha": [0.9, 0.5],
    "eps": [0.05, 1e-3],
    "weight_decay": [0.1],
    "momentum": [0.9, 0.5],
    "centered": [True],
    "maximize": [True],
}
#: What may be changed between steps: for the rest torch makes state at the first step alone.
CHANGEABLE = ("lr", "alpha", "eps", "weight_decay", "maximize")


class Course:
    """Two optimizers that are treated alike."""

    def __init__(self, info: Any, seed: int) -> None:
        self.random = Random(seed)
        self.dtype = self.random.choice([torch.float64, torch.float64, torch.complex128])
        self.made = 0
        groups = [self.group() for _ in range(self.random.randint(1, 3))]
        own = {} if info.optim_cls is RMSprop else {"eps_inside_sqrt": False}
        if not self.dtype.is_complex:
            own["flat"] = self.random.random() < 0.3
        self.makes = partial(info.optim_cls, **own), partial(torch.optim.RMSprop, foreach=False)
        self.ours: Any = self.makes[0](groups)
        self.theirs: Any = self.makes[1](deepcopy(groups))

    def group(self) -> dict[str, Any]:
        """A new group of parameters, with some of the options."""
        shapes = self.random.choices(SHAPES, k=self.random.randint(1, 3))
        self.made += 1
        params = [Parameter(self.filled(torch.empty(shape, dtype=self.dtype))) for shape in shapes]
        drawn = {
            name: deepcopy(self.random.choice(values))
            for name, values in OPTIONS.items()
            if self.random.random() < 0.4
        }
        return {"params": params, **drawn}

    def filled(self, tensor: torch.Tensor) -> torch.Tensor:
        return filled(tensor.detach(), self.random.randrange(2**30))

    @property
    def both(self) -> tuple[Any, Any]:
        return self.ours, self.theirs

    @property
    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(params_in(self.ours), params_in(self.theirs), strict=True))

    def add(self) -> None:
        group = self.group()
        for optimizer, each in zip(self.both, (group, deepcopy(group)), strict=True):
            optimizer.add_param_group(each)

    def change(self) -> None:
        place = self.random.randrange(len(self.ours.param_groups))
        name = self.random.choice(CHANGEABLE)
        value = self.random.choice(OPTIONS[name])
        for optimizer in self.both:
            optimizer.param_groups[place][name] = deepcopy(value)

    def freeze(self) -> None:
        """Freezes a parameter, or thaws it."""
        for param in self.random.choice(self.pairs):
            param.requires_grad_(not param.requires_grad)
            param.grad = None

    def take_torchs_state(self) -> None:
        """A new optimizer of ours goes on from torch's state."""
        self.ours = self.makes[0](without_options(self.ours))
        saved = import_state(deepcopy(self.theirs.state_dict()), made_by="torch")
        self.ours.load_state_dict(saved)

    def give_torch_our_state(self) -> None:
        """A new optimizer of torch's goes on from the state of ours."""
        self.theirs = self.makes[1](without_options(self.theirs))
        self.theirs.load_state_dict(export_state(self.ours, to="torch"))

    def copy(self) -> None:
        copied: Callable[[Any], Any] = self.random.choice(
            [deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))]
        )
        self.ours, self.theirs = map(copied, self.both)

    def zero(self) -> None:
        for optimizer in self.both:
            optimizer.zero_grad(set_to_none=False)

    def step(self) -> None:
        """A step along new gradients of most parameters, some of them where the old ones are."""
        for ours, theirs in self.pairs:
            if not ours.requires_grad or self.random.random() < 0.2:
                ours.grad = theirs.grad = None
                continue
            theirs.grad = self.filled(theirs)
            if ours.grad is not None and self.random.random() < 0.5:
                ours.grad.copy_(theirs.grad)
            else:
                ours.grad = theirs.grad.clone()
        for optimizer in self.both:
            optimizer.step()

    def check(self) -> None:
        for ours, theirs in self.pairs:
            assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            state = self.theirs.state[theirs]  # which torch makes at the first step
            got = {name: self.ours.state[ours][name] for name in state}
            assert_close(got, state, rtol=1e-9, atol=1e-9, check_dtype=False)


def without_options(optimizer: Any) -> list[dict[str, Any]]:
    return [{"params": group["params"]} for group in optimizer.param_groups]


@pytest.mark.parametrize("seed", range(40))
@each_info
def test_a_course_is_as_torchs(info, seed):
    course = Course(info, seed)
    course.step()
    between = [
        *(Course.add, Course.change, Course.freeze, Course.take_torchs_state),
        *(Course.give_torch_our_state, Course.copy, Course.zero),
    ]
    for _ in range(12):
        if course.random.random() < 0.7:
            course.random.choice(between)(course)
        course.step()
        course.check()
