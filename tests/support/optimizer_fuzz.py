"""Random programs around the optimizer, whose every step is held to plain NumPy, bit for bit."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, LRScheduler

from fuzzing import Chance
from hogstream.optim import RMSpropAsync
from update_testing import COMPUTE, State, assert_same_bits, formula

OPERATIONS = 14

SHAPES: list[tuple[int, ...]] = [
    (), (0,), (1,), (3, 0), (7,), (5, 3), (1, 6), (2, 3, 4, 5), (33,), (64, 9), (2, 1, 5), (300, 7),
    (4, 4, 1, 1),
]  # fmt: skip
SPECIAL = [math.inf, -math.inf, math.nan, -0.0, 65504.0, 1e30]


def draw(seed: int) -> OptimizerCase:
    """The program of a seed."""
    return OptimizerCase(seed)


@dataclass
class Expected:
    """What a parameter's state must be.

    Attributes:
        ms: Flat.
        steps: How many there were.
    """

    ms: Tensor
    steps: int = 0


@dataclass
class OptimizerCase:
    """A program, drawn while it runs; its ``repr`` is what it did until now."""

    seed: int
    made: dict[str, Any] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Makes an optimizer and does to it what programs do."""
        # Interpreted Triton computes in NumPy, and warns of infinities and NaN.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        threads = torch.get_num_threads()
        try:
            self._make()
            for _ in range(OPERATIONS):
                operation = self.chance.choice(_OPERATIONS)
                self.done.append(operation.__name__)
                operation(self)
                self._check_state()
        finally:
            torch.set_num_threads(threads)

    def _make(self) -> None:
        self.chance = chance = Chance(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.made = {
            "threads": chance.choice([1, 2]),
            "flat": chance.some(0.5),
            "backend": chance.choice([None, "numba", "numpy", "triton"]),
            "named": chance.some(0.2),
        }
        torch.set_num_threads(self.made["threads"])
        if self.made["backend"] == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
            self.made["backend"] = None
        self.expected: dict[Parameter, Expected] = {}
        self.shared = False
        groups = [self._new_group(index) for index in range(chance.randrange(1, 4))]
        self._adopt(lambda: self._new_optimizer(groups, self.made["flat"], **self._numbers()))

    # What is drawn

    def _new_optimizer(self, groups: list[Any], flat: bool, **numbers: Any) -> RMSpropAsync:
        return RMSpropAsync(groups, flat=flat, backend=self.made["backend"], **numbers)

    def _new_group(self, index: int) -> dict[str, Any]:
        # torch tells by the first group whether parameters have names.
        least = 1 if index == 0 or self.made["named"] else 0
        params = [self._new_param() for _ in range(self.chance.randrange(least, 5))]
        named = [(f"param {id(param)}", param) for param in params]
        return {
            "params": named if self.made["named"] else params,
            **self.chance.subset(self._numbers(), 0.7),
        }

    def _new_param(self) -> Parameter:
        dtype = self.chance.choice(list(COMPUTE))
        values = self._laid_out(self._values(self.chance.choice(SHAPES), dtype))
        param = Parameter(values, requires_grad=self.chance.some(0.85))
        self.expected[param] = _fresh(param)
        if self.chance.some(0.3):
            param.grad = self._new_grad(param)
        return param

    def _numbers(self) -> dict[str, Any]:
        chance = self.chance
        return {
            "lr": chance.choice([0.0, 1e-3, 0.01, 1.0, 7e-4, 10 ** chance.uniform(-8, 2)]),
            "alpha": chance.choice([0.0, 0.5, 0.9, 0.99, 0.9999999, chance.random()]),
            "eps": chance.choice([1e-8, 1e-3, 1.0, 0.0, 1e-45, 10 ** chance.uniform(-12, 0)]),
            "weight_decay": chance.choice([0, 0, 0.1, 1e-4, 2.0]),
            "eps_inside_sqrt": chance.some(0.6),
            "decoupled_weight_decay": chance.some(0.3),
            "maximize": chance.some(0.3),
        }

    def _values(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        values *= 10.0 ** self.chance.uniform(-6, 3)
        kind = self.chance.choice(["plain"] * 5 + ["zero", "denormal", "special", "signed zero"])
        if kind == "zero":
            values *= 0
        elif kind == "denormal":
            values *= 1e-38
        elif kind == "special" and values.numel():
            values.view(-1)[self.chance.randrange(values.numel())] = self.chance.choice(SPECIAL)
        elif kind == "signed zero":
            values[values < 0] = -0.0
        return values.to(dtype)

    def _laid_out(self, values: Tensor) -> Tensor:
        kind = self.chance.choice(["plain", "channels last", "transposed", "offset", "permuted"])
        if kind == "channels last" and values.dim() == 4:
            return values.to(memory_format=torch.channels_last)
        if kind == "transposed" and values.dim() == 2:
            return values.t().contiguous().t()
        if kind == "offset":
            before = self.chance.randrange(1, 4)
            return torch.cat([values.new_zeros(before), values.flatten()])[before:].view_as(values)
        if kind == "permuted":
            order = self.chance.sample(range(values.dim()), values.dim())
            return (
                values.permute(order).contiguous().permute([*map(order.index, range(len(order)))])
            )
        return values

    def _new_grad(self, param: Tensor) -> Tensor:
        values = self._values(tuple(param.shape), param.dtype)
        kind = self.chance.choice(["laid out"] * 5 + ["expanded", "negated", "strided"])
        if kind == "expanded" and values.dim() and values.numel():
            return values.flatten()[:1].view((1,) * values.dim()).expand(values.shape)
        if kind == "negated" and values.numel():
            negated: Tensor = torch._neg_view(values)
            return negated
        if kind == "strided" and values.dim():
            return torch.stack([values, values], dim=-1)[..., 0]
        return self._laid_out(values)

    # What is expected

    @property
    def params(self) -> list[Parameter]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def _adopt(self, make: Callable[[], RMSpropAsync]) -> None:
        """Goes on with another optimizer, of parameters that are known."""
        self.optimizer = make()

    def _after_step(self, group: dict[str, Any], param: Parameter) -> State:
        expected = self.expected[param]
        before = State(param.detach().flatten().clone(), expected.ms)
        if param.grad is None:
            return before
        expected.steps += 1
        numbers = {name: group[name] for name in self._numbers()}
        numbers["lr"] = float(numbers["lr"])
        return formula(before, param.grad.resolve_neg().flatten(), **numbers)

    def _check_state(self) -> None:
        for param in self.params:
            expected, state = self.expected[param], self.optimizer.state.get(param)
            if state:
                assert state["step"].item() == expected.steps
                assert state["square_avg"].shape == param.shape
                ms = state["square_avg"].flatten()
                assert_same_bits(State(ms, ms), State(expected.ms, expected.ms))
            else:  # what was reset is made anew at a step
                assert expected.steps == 0

    # What programs do

    def step_again(self) -> None:
        """With the gradients that are there."""
        wanted = [
            (param, self._after_step(group, param))
            for group in self.optimizer.param_groups
            for param in group["params"]
        ]
        if self.chance.some(0.2):
            assert self.optimizer.step(lambda: 1.0) == 1.0
        else:
            self.optimizer.step()
        for param, state in wanted:
            self.expected[param].ms = state.ms
            assert_same_bits(State(param.detach().flatten(), state.ms), state)

    def step(self) -> None:
        self.give_gradients()
        self.step_again()

    def give_gradients(self) -> None:
        for param in self.params:
            kind = self.chance.choice(["none", "new", "new", "new", "in place", "in place", "kept"])
            grad = param.grad
            if kind == "none":
                param.grad = None
            elif kind == "in place" and grad is not None and _may_be_written(grad):
                grad.copy_(self._values(tuple(param.shape), param.dtype))
            elif kind != "kept":
                param.grad = self._new_grad(param)

    def zero_grad(self) -> None:
        to_none = self.chance.choice([None, True, False])
        self.done[-1] += f" to none: {to_none}"
        if to_none is None:
            self.optimizer.zero_grad()
        else:
            self.optimizer.zero_grad(set_to_none=to_none)
        for param in self.params:
            assert param.grad is None or not param.grad.count_nonzero()

    def set_numbers(self) -> None:
        group = self.chance.choice(self.optimizer.param_groups)
        group.update(self.chance.subset(self._numbers(), 0.5))
        if self.chance.some(0.2):
            group["lr"] = torch.as_tensor(group["lr"])

    def load(self) -> None:
        state_dict = copy.deepcopy(self.optimizer.state_dict())
        if self.chance.some(0.5):
            file = io.BytesIO()
            torch.save(state_dict, file)
            file.seek(0)
            state_dict = torch.load(file)
        if self.chance.some(0.5):
            self._adopt(self._another)
            self.shared = False
        elif self.chance.some(0.5):
            before = [(expected.ms, expected.steps) for expected in self.expected.values()]
            self.step()  # whose state is forgotten
            for expected, state in zip(self.expected.values(), before, strict=True):
                expected.ms, expected.steps = state
        self.optimizer.load_state_dict(state_dict)

    def _another(self) -> RMSpropAsync:
        groups = [
            {"params": [*zip(group["param_names"], group["params"], strict=True)]}
            if "param_names" in group
            else {"params": group["params"]}
            for group in self.optimizer.param_groups
        ]
        return self._new_optimizer(groups, self.made["flat"] and self.chance.some(0.5))

    def copy_all(self) -> None:
        both = self.params, self.optimizer
        pickled = self.chance.some(0.5)
        copies: Any = pickle.loads(pickle.dumps(both)) if pickled else copy.deepcopy(both)
        params, self.optimizer = copies
        self.shared = False
        for param, copied, kept in zip(both[0], params, self.params, strict=True):
            assert kept is copied  # as the optimizer's were the program's
            values = param.detach().flatten(), copied.detach().flatten()
            assert_same_bits(*(State(each, each) for each in values))
        self.expected = {
            copied: self.expected[param] for param, copied in zip(both[0], params, strict=True)
        }

    def replace_data(self) -> None:
        if self.params:
            param = self.chance.choice(self.params)
            param.data = param.detach().clone()

    def overwrite_params(self) -> None:
        with torch.no_grad():
            for param in self.params:
                if self.chance.some(0.5):
                    param.copy_(self._values(tuple(param.shape), param.dtype))

    def add_group(self) -> None:
        param = self._new_param()
        param.requires_grad_(param.requires_grad or self.shared)
        named = "param_names" in self.optimizer.param_groups[0]
        self.optimizer.add_param_group(
            {
                "params": [(f"param {id(param)}", param) if named else param],
                **self.chance.subset(self._numbers(), 0.7),
            }
        )

    def freeze(self) -> None:
        for param in self.params:
            if self.chance.some(0.3):
                param.requires_grad_(not param.requires_grad)

    def share(self) -> None:
        """With state of all parameters, as none can be made once it is shared."""
        for param in self.params:
            param.requires_grad_(True)
        self.optimizer.share_memory()
        self.shared = True

    def schedule(self) -> None:
        groups = self.optimizer.param_groups
        if any(isinstance(group["lr"], Tensor) for group in groups):
            return
        scheduler = self.chance.choice(_SCHEDULERS)(self.optimizer)
        self.step()
        scheduler.step()
        self.step()
        for group in groups:
            del group["initial_lr"]

    def reset_state(self) -> None:
        """In one of the ways that torch's optimizers take."""
        if self.shared or not self.params:
            return
        way = self.chance.choice(list(_RESETS))
        self.done[-1] += f": {way}"
        chosen = self.chance.choice(self.params)
        _RESETS[way](self.optimizer, chosen)
        for param in [chosen] if way in _OF_ONE else self.params:
            self.expected[param].ms, self.expected[param].steps = _fresh(param).ms, 0

    def replace_layer(self) -> None:
        """One parameter in the place of another, or beside it."""
        groups = [group for group in self.optimizer.param_groups if group["params"]]
        if self.shared or not groups:
            return
        group = self.chance.choice(groups)
        param = self._new_param()
        if self.chance.some(0.5):
            self.done[-1] += ": appended"
            group["params"].append(param)
            if "param_names" in group:
                group["param_names"].append(f"param {id(param)}")
        else:
            index = self.chance.randrange(len(group["params"]))
            self.optimizer.state.pop(group["params"][index], None)
            group["params"][index] = param


def _fresh(param: Tensor) -> Expected:
    return Expected(torch.zeros(param.numel(), dtype=COMPUTE[param.dtype]))


def _may_be_written(grad: Tensor) -> bool:
    strides = zip(grad.stride(), grad.shape, strict=True)
    return not grad.is_neg() and all(stride or size <= 1 for stride, size in strides)


def _replace_state(optimizer: RMSpropAsync, _: Parameter) -> None:
    optimizer.state = defaultdict(dict)


def _set_state(optimizer: RMSpropAsync, _: Parameter) -> None:
    optimizer.__setstate__({"state": defaultdict(dict), "param_groups": optimizer.param_groups})


def _empty_state(optimizer: RMSpropAsync, param: Parameter) -> None:
    optimizer.state[param] = {}


_RESETS: dict[str, Callable[[RMSpropAsync, Parameter], Any]] = {
    "cleared": lambda optimizer, _: optimizer.state.clear(),
    "replaced": _replace_state,
    "__setstate__": _set_state,
    "one emptied": _empty_state,
    "one dropped": lambda optimizer, param: optimizer.state.pop(param, None),
}
_OF_ONE = {"one emptied", "one dropped"}

_SCHEDULERS: list[Callable[[RMSpropAsync], LRScheduler]] = [
    lambda optimizer: ExponentialLR(optimizer, 0.9),
    lambda optimizer: CosineAnnealingLR(optimizer, 5),
    lambda optimizer: LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
]

#: As often as they stand here.
_OPERATIONS: list[Callable[[OptimizerCase], None]] = [
    *[OptimizerCase.step] * 4,
    *[OptimizerCase.load] * 2,
    *[OptimizerCase.copy_all] * 2,
    OptimizerCase.step_again,
    OptimizerCase.give_gradients,
    OptimizerCase.zero_grad,
    OptimizerCase.set_numbers,
    OptimizerCase.replace_data,
    OptimizerCase.overwrite_params,
    OptimizerCase.add_group,
    OptimizerCase.freeze,
    OptimizerCase.share,
    OptimizerCase.schedule,
    OptimizerCase.reset_state,
    OptimizerCase.replace_layer,
]
