"""Compiled code reads what a plan depends on: it must follow no plan that Python would not."""

from __future__ import annotations

import logging
import random
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from hogstream.optim import RMSpropAsync, compiled_modules
from hogstream.optim.state import BUFFERS, Kinds
from hogstream.optim.step_plan import Premises, StepMemory, _ReadPremises, make_plan

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (3,),
    (4, 4),
    (4, 4),
    (2, 3, 4, 4),
    (1, 2, 1, 2, 1, 2, 2),
]
SEEDS = range(25)
TRIES = 40


class Program:
    """An optimizer whose first plan is read by Python and by compiled code, and is changed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.params = [self._new_param() for _ in range(self.chance.randrange(1, 9))]
        split = self.chance.randrange(len(self.params) + 1)
        groups = [
            {"params": params, "momentum": self.chance.choice([0.0, 0.5]), "centered": centered}
            for params, centered in ((self.params[:split], True), (self.params[split:], False))
        ]
        self.optimizer = RMSpropAsync(groups, flat=self.chance.random() < 0.3)
        for param in self.params:
            if self.chance.random() < 0.85:
                param.grad = torch.ones_like(param)
        optimizer = self.optimizer
        self.plan = make_plan(
            optimizer.param_groups,
            optimizer.state,
            [Kinds.of_group(group) for group in optimizer.param_groups],
            optimizer._counts,
            optimizer._flat_buffers,
            optimizer.backend,
        ).plan
        assert isinstance(self.plan.premises, _ReadPremises)
        self.read: Premises = self.plan.premises
        memory = StepMemory(self.plan.launches)
        self.compiled = self.plan.premises.compiled(optimizer.param_groups, optimizer.state, memory)
        assert self.compiled is not self.read

    def _new_param(self) -> Parameter:
        data = torch.ones(self.chance.choice(SHAPES), dtype=self.chance.choice(DTYPES))
        return Parameter(data.T if data.ndim == 2 and self.chance.random() < 0.5 else data)

    def decide(self) -> tuple[bool, bool]:
        """Whether each of the two would follow the plan; if both do, their addresses are one."""
        memories = StepMemory(self.plan.launches), StepMemory(self.plan.launches)
        read, compiled = self.hold(self.read, memories[0]), self.hold(self.compiled, memories[1])
        if read and compiled:
            np.testing.assert_array_equal(memories[0].columns, memories[1].columns)
        return read, compiled

    def hold(self, premises: Premises, memory: StepMemory) -> bool:
        """Has memory hold the gradients that there are now."""
        return premises.hold_gradients(self.optimizer.param_groups, self.optimizer.state, memory)

    @property
    def param(self) -> Parameter:
        return self.chance.choice(self.params)

    @property
    def grad(self) -> torch.Tensor:
        grads = [param.grad for param in self.params if param.grad is not None]
        return self.chance.choice(grads) if grads else torch.ones(1)

    @property
    def of_param(self) -> dict[str, torch.Tensor]:
        of_param: dict[str, torch.Tensor] = self.optimizer.state[self.param]
        return of_param


class Strange(torch.Tensor):
    """A class of somebody else's."""


def like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor).fill_(2)


def negated(tensor: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(tensor.detach())


def free(tensor: torch.Tensor) -> None:
    storage = tensor.untyped_storage()
    if storage.resizable():  # as flat memory is not
        storage.resize_(0)


def swap_param(param: Parameter) -> None:
    torch.utils.swap_tensors(param, Parameter(like(param.detach())))


def set_grad(make: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        param = program.param
        param.grad = make(param.detach())

    return change


def set_data_of_grad(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        grad = program.grad
        grad.data = make(grad)

    return change


def set_data(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        param = program.param
        param.data = make(param.detach())

    return change


def some_buffer(program: Program, of_param: dict[str, torch.Tensor]) -> list[str]:
    """The name of one, if there are any."""
    names = [name for name in BUFFERS if name in of_param]
    return names and [program.chance.choice(names)]


def set_buffer(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        of_param = program.of_param
        for name in some_buffer(program, of_param):
            of_param[name] = make(of_param[name])

    return change


def set_data_of_buffer(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        of_param = program.of_param
        for name in some_buffer(program, of_param):
            of_param[name].data = make(of_param[name])

    return change


def swap_states(program: Program) -> None:
    state, (one, other) = program.optimizer.state, (program.param, program.param)
    state[one], state[other] = state[other], state[one]


def swap_params(program: Program) -> None:
    first, second = program.optimizer.param_groups
    if first["params"] and second["params"]:
        first["params"][0], second["params"][0] = second["params"][0], first["params"][0]


def remove_param(program: Program) -> None:
    group = program.chance.choice(program.optimizer.param_groups)
    if group["params"]:
        group["params"].pop()


def put_params_in_another_list(program: Program) -> None:
    group = program.chance.choice(program.optimizer.param_groups)
    group["params"] = list(group["params"])


def replace_step(program: Program) -> None:
    program.of_param["step"] = torch.zeros(())


def replace_state(program: Program) -> None:
    program.optimizer.state = dict(program.optimizer.state)  # type: ignore[assignment]


def sparse(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(tensor).to_sparse()


def inferred(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones_like(tensor)


CHANGES: dict[str, Callable[[Program], Any]] = {
    "new grad": set_grad(like),
    "no grad": set_grad(lambda param: None),
    "negated grad": set_grad(negated),
    "grad in a parameter": set_grad(lambda param: param),
    "sparse grad": set_grad(sparse),
    "grad of zeros": set_grad(
        lambda param: torch._efficientzerotensor(param.shape).to(param.dtype)
    ),
    "grad from inference": set_grad(inferred),
    "strided grad": set_grad(lambda param: torch.ones(*param.shape, 2, dtype=param.dtype)[..., 0]),
    "expanded grad": set_grad(lambda param: torch.ones((), dtype=param.dtype).expand(param.shape)),
    "grad of another class": set_grad(lambda param: like(param).as_subclass(Strange)),
    "grad's data": set_data_of_grad(like),
    "grad's data of float16": set_data_of_grad(lambda grad: torch.ones(grad.shape).half()),
    "grad's data of other size": set_data_of_grad(lambda grad: torch.ones(2, 5, dtype=grad.dtype)),
    "grad's data transposed": set_data_of_grad(
        lambda grad: grad.detach().mT if grad.ndim > 1 else grad
    ),
    "grad's memory freed": lambda program: free(program.grad),
    "data": set_data(like),
    "data of float16": set_data(lambda param: param.half()),
    "data viewed": set_data(lambda param: param.view(param.shape)),
    "data transposed": set_data(lambda param: param.mT if param.ndim > 1 else param),
    "data cut": set_data(lambda param: param[:2] if param.ndim else param),
    "data negated": set_data(negated),
    "param frozen": lambda program: program.param.requires_grad_(False),
    "param swapped": lambda program: swap_param(program.param),
    "param shared": lambda program: program.param.share_memory_(),
    "buffer replaced": set_buffer(like),
    "buffer viewed": set_buffer(lambda buffer: buffer.view(buffer.shape)),
    "buffer's data": set_data_of_buffer(like),
    "buffer's data of other size": set_data_of_buffer(
        lambda buffer: buffer[:1] if buffer.ndim else buffer
    ),
    "buffer transposed in place": lambda program: [
        buffer.t_()
        for state in program.optimizer.state.values()
        for buffer in (state[name] for name in BUFFERS if name in state)
        if buffer.ndim == 2
    ],
    "step replaced": replace_step,
    "step removed": lambda program: program.of_param.pop("step", None),
    "buffer removed": lambda program: program.of_param.pop(program.chance.choice(BUFFERS), None),
    "state of one replaced": lambda program: program.optimizer.state.update(
        {program.param: dict(program.of_param)}
    ),
    "state of one removed": lambda program: program.optimizer.state.pop(program.param, None),
    "state cleared": lambda program: program.optimizer.state.clear(),
    "state replaced": replace_state,
    "states swapped": swap_states,
    "params swapped": swap_params,
    "param removed": remove_param,
    "params in another list": put_params_in_another_list,
    "grads cleared": lambda program: program.optimizer.zero_grad(set_to_none=True),
    "flat grads back": lambda program: program.optimizer.zero_grad(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_compiled_code_follows_a_plan_as_python_does(change):
    for seed in SEEDS:
        program = Program(seed)
        assert program.decide() == (True, True), seed
        CHANGES[change](program)
        read, compiled = program.decide()
        # Compiled code notes parameters without a gradient too, which may change places.
        assert read == compiled or (read and change == "params swapped"), seed


@pytest.mark.parametrize("seed", SEEDS)
def test_compiled_code_follows_a_plan_as_python_does_after_any_changes(seed):
    program = Program(seed)
    done = []
    for _ in range(TRIES):
        done.append(program.chance.choice(list(CHANGES)))
        try:
            CHANGES[done[-1]](program)
        except (KeyError, RuntimeError):
            continue  # it can't be done any more, or not to such a tensor
        read, compiled = program.decide()
        assert read >= compiled, done


CHANGES_OF_ONE: dict[str, Callable[[Parameter, dict[str, torch.Tensor]], Any]] = {
    "no grad": lambda param, _: setattr(param, "grad", None),
    "grad in the parameter": lambda param, _: setattr(param, "grad", param.detach()),
    "strided grad": lambda param, _: setattr(param, "grad", torch.ones(3, 2)[:, 0]),
    "data": lambda param, _: setattr(param, "data", like(param.detach())),
    "buffer": lambda _, of_param: of_param.update(square_avg=torch.zeros(3)),
}


@pytest.mark.parametrize("change", CHANGES_OF_ONE)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_a_change_is_noticed_at_each_place_of_a_list(count, flat, change):
    for place in range(count):
        params = [Parameter(torch.ones(3)) for _ in range(count)]
        optimizer = RMSpropAsync(params, flat=flat)
        for _ in range(3):
            for param in params:
                param.grad = param.grad if flat else torch.ones(3)
            optimizer.step()
        plan = optimizer._plan
        assert plan is not None
        assert not isinstance(plan.premises, _ReadPremises)
        groups, state = optimizer.param_groups, optimizer.state
        memory = StepMemory(plan.launches)
        assert plan.premises.hold_gradients(groups, state, memory)
        CHANGES_OF_ONE[change](params[place], state[params[place]])
        assert not plan.premises.hold_gradients(groups, state, memory), place


def test_another_object_for_a_gradient_in_flat_memory_is_read():
    param = Parameter(torch.zeros(3))
    optimizer = RMSpropAsync([param], lr=0.5, alpha=0.0, eps=0.0, flat=True)
    for steps in (1, 2, 3, 4):
        assert param.grad is not None
        param.grad = param.grad.fill_(1).view(3)
        optimizer.step()
        assert param.tolist() == [-0.5 * steps] * 3


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda program, memory: program.compiled.let_go(memory), id="let go"),
        pytest.param(lambda program, memory: memory.__dict__.clear(), id="given up"),
    ],
)
def test_a_gradient_that_is_dropped_meanwhile_lives_until_its_step_ends(end):
    program = Program(1)
    param = next(param for param in program.params if param.grad is not None)
    param.grad = like(param)
    assert param.grad is not None
    gradient = weakref.ref(param.grad)
    memory = StepMemory(program.plan.launches)
    assert program.hold(program.compiled, memory)
    param.grad = None
    assert gradient() is not None
    end(program, memory)
    assert gradient() is None


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_a_step_keeps_no_gradient_alive(backend):
    """Be it the first, one that Python reads, or one that compiled code does."""
    param = Parameter(torch.ones(3))
    optimizer = RMSpropAsync([param], backend=backend)
    for _ in range(4):
        param.grad = torch.ones(3)
        gradient = weakref.ref(param.grad)
        optimizer.step()
        param.grad = None
        assert gradient() is None


def test_versions_are_bumped_as_by_python():
    program = Program(3)
    before = [param._version for param in program.params]
    program.compiled.bump_versions()
    reached = [param.grad is not None for param in program.params]
    after = [param._version for param in program.params]
    assert after == [version + each for version, each in zip(before, reached, strict=True)]


def test_a_class_of_somebody_elses_is_read_by_python():
    param = Parameter(torch.ones(3).as_subclass(Strange))
    optimizer = RMSpropAsync([param], lr=0.5, alpha=0.0, eps=0.0)
    for steps in (1, 2, 3, 4):
        param.grad = torch.ones(3)
        optimizer.step()
        assert param.tolist() == [1 - 0.5 * steps] * 3
    assert optimizer._plan is not None
    assert isinstance(optimizer._plan.premises, _ReadPremises)


def test_where_nothing_compiles_python_reads(monkeypatch, caplog):
    compiled_modules.compiled_module.cache_clear()
    monkeypatch.setitem(sys.modules, "hogstream.optim.compiled_premises", None)
    caplog.set_level(logging.DEBUG, compiled_modules.__name__)
    param = Parameter(torch.ones(3))
    optimizer = RMSpropAsync([param], lr=0.5, alpha=0.0, eps=0.0)
    try:
        for _ in range(3):
            param.grad = torch.ones(3)
            optimizer.step()
    finally:
        compiled_modules.compiled_module.cache_clear()
    assert param.tolist() == [-0.5] * 3
    assert optimizer._plan is not None
    assert isinstance(optimizer._plan.premises, _ReadPremises)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
