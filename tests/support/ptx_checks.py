"""What must hold of every kernel of ours, as PTX: each function looks at one, or raises."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from ptx_compiling import Compiled, Form
from ptx_machine import Launch, execute
from ptx_updates import Device, Watch
from update_testing import (
    COMPUTE,
    FULL,
    State,
    assert_same_bits,
    extreme,
    normal,
    special_operands,
    update_,
    worn_state,
)

#: Of the operands of an update.
NAMES = Operands._fields[:5]


def options_of(form: Form) -> dict[str, Any]:
    """What an update has that is launched in a form."""
    return {
        "eps_inside_sqrt": form.eps_inside_sqrt,
        "weight_decay": 0.1 if form.coupled else 0.0,
        "centered": form.centered,
        "momentum": 0.9 if form.momentum else 0.0,
        "lr_in_momentum": form.lr_in_momentum,
    }


def _hyperparameters(form: Form) -> list[dict[str, Any]]:
    options = options_of(form)
    if form.coupled:
        return [options, options | {"weight_decay": 0.3, "maximize": True, "alpha": 0.5}]
    # An update by this is half of the last bit of what lies between 1 and 2: it makes ties.
    half = torch.finfo(getattr(torch, form.dtype)).eps / 2
    decoupled = {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True, "lr": 0.02}
    return [
        options,
        options | decoupled,
        options | {"lr": half, "alpha": 0.0, "eps": 0.0},
    ]


class Case(NamedTuple):
    """One tensor that is updated, and how.

    Attributes:
        state: Before the update, with all that there may be.
        grad: Its gradient.
        offsets: By how many elements each lies off its alignment: parameter, gradient, state.
    """

    state: State
    grad: torch.Tensor
    offsets: tuple[int, ...]


def check_form(compiled: Compiled) -> int:
    """Runs all checks of a kernel, and returns how many elements were compared."""
    if compiled.form.updates:
        return sum(check_bits(compiled, each) for each in _hyperparameters(compiled.form))
    return check_verdicts(compiled)


def check_bits(compiled: Compiled, options: dict[str, Any]) -> int:
    """Compares updates with the NumPy backend's, and returns how many elements it compared."""
    cases = [
        case._replace(state=case.state.needed(options))
        for case in _cases(compiled.form.dtype, compiled.block)
    ]
    for group in [cases] if compiled.form.is_multi_tensor else [[case] for case in cases]:
        for case, updated in zip(group, _updated(compiled, group, options), strict=True):
            expected = case.state.map(torch.clone)
            update_(expected, case.grad, backend="numpy", **options)
            assert_same_bits(state_of(updated), expected)
    return sum(case.grad.numel() for case in cases)


def state_of(operands: Operands) -> State:
    """What an update of operands changes."""
    return State(operands.param, operands.ms, operands.grad_avg, operands.momentum_buffer)


def _updated(compiled: Compiled, group: list[Case], numbers: dict[str, Any]) -> list[Operands]:
    """Tensors after one update, of which what watches it has been checked."""
    device, hyperparameters = Device(), Hyperparameters(**numbers)
    operands = [_on_device(device, case) for case in group]
    blocks = -(-group[0].grad.numel() // compiled.block)
    watch = Watch.of(compiled.form, device, hyperparameters.lr, blocks)
    launch = device.update(compiled, LaunchTable(operands), hyperparameters, watch)
    if watch.verdict is not None:
        _check_left_out(device, launch, watch, operands)
    counts = None if watch.counts is None else watch.counts.clone()
    execute(launch, device.memory)
    if watch.counts is not None and counts is not None:
        counted = watch.counts - counts
        assert torch.equal(counted, torch.tensor([[1], [1], [0]]).expand_as(counted)), counted
    return operands


def check_verdicts(compiled: Compiled) -> int:
    """Looks for one element that is not finite, anywhere; returns how many places were tried."""
    dtype = getattr(torch, compiled.form.dtype)
    block, tried = compiled.block, 0
    for size, offset in product((1, block - 1, block, 2 * block + 17), (0, 1)):
        places = {0, size // 2, size - 1, min(block, size) - 1}
        for place, value in product([None, *places], (torch.inf, -torch.inf, torch.nan)):
            grad = extreme(size, dtype, seed=size)
            grad[0] = torch.finfo(dtype).max
            if place is not None:
                grad[place] = value
            device = Device()
            found = device.put("verdict", torch.zeros(1, dtype=torch.int32))
            others = (
                [grad] if not compiled.form.is_multi_tensor else [torch.ones(3).to(dtype), grad]
            )
            operands = [
                _on_device(device, Case(State(each, each), each, (0, offset, 0, 0, 0)))
                for each in others
            ]
            table = LaunchTable(operands)
            execute(device.check_finite(compiled, table, found), device.memory)
            assert found.item() == (place is not None), (size, offset, place, value)
            tried += 1
    return tried


def _on_device(device: Device, case: Case) -> Operands:
    param, *state = case.state
    put = zip(NAMES, (param, case.grad, *state), case.offsets, strict=True)
    tensors: list[Any] = [
        each if each is None else device.put(name, each, offset) for name, each, offset in put
    ]
    return Operands(*tensors)


def _check_left_out(device: Device, launch: Launch, watch: Watch, operands: list[Operands]) -> None:
    """Checks that an update is left out as a whole where the verdict says so."""
    assert watch.verdict is not None
    tensors = [tensor for each in operands for tensor in each if tensor is not None]
    if watch.counts is not None:
        tensors.append(watch.counts)
    before = [tensor.clone() for tensor in tensors]
    watch.verdict.fill_(1)
    execute(launch, device.memory)
    watch.verdict.fill_(0)
    for tensor, kept in zip(tensors, before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), kept.view(torch.uint8)), (
            "an update that a verdict forbids"
        )


@cache
def _cases(dtype_name: str, block: int) -> list[Case]:
    dtype = getattr(torch, dtype_name)
    state, grad = _values(dtype)
    size = len(grad)
    layouts = [
        (size, (0, 0, 0, 0, 0)),
        (size, (1, 0, 0, 0, 0)),
        (2 * block + 1, (0, 1, 0, 0, 0)),
        (2 * block + 5, (0, 0, 1, 0, 0)),
        (2 * block, (1, 2, 3, 4, 5)),
        (2 * block + 3, (0, 0, 0, 1, 0)),
        (2 * block + 7, (0, 0, 0, 0, 1)),
        (1, (0, 0, 0, 0, 0)),
        (block - 1, (0, 0, 0, 0, 0)),
        (block, (0, 0, 0, 0, 0)),
        (block + 1, (0, 0, 0, 0, 0)),
    ]
    return [
        Case(state.map(lambda each: each[:count]), grad[:count], offsets)  # noqa: B023 - at once
        for count, offsets in layouts
    ]


def _values(dtype: torch.dtype) -> tuple[State, torch.Tensor]:
    """State and gradients: ordinary ones, then extremes, then special values."""
    size, compute = 1500, COMPUTE[dtype]
    far = State(extreme(size, dtype, 1), *(extreme(size, compute, seed) for seed in (3, 4, 5)))
    far = far._replace(ms=far.ms.abs())
    special, grads = special_operands(dtype, **FULL)
    states = worn_state(size, dtype, 0, **FULL), far, special
    grad = torch.cat([normal(size, dtype, 6), extreme(size, dtype, 2), grads])
    tensors: Any = zip(*states, strict=True)
    return State.of(map(torch.cat, tensors)), grad
