"""What must hold of every kernel of ours, as PTX: each function looks at one, or raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch

from hogstream.kernels.backends.numpy_kernels import update_ as update_by_numpy_
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from ptx_compiling import Compiled, Form
from ptx_machine import Launch, execute
from ptx_updates import GRAD_FACTOR, KEY, Device, Watch
from update_testing import (
    COMPUTE,
    FULL,
    State,
    assert_same_bits,
    extreme,
    normal,
    special_operands,
    worn_state,
)


def options_of(form: Form) -> dict[str, Any]:
    """What an update has that is launched in a form, but for how parameters are rounded."""
    return {
        "eps_inside_sqrt": form.eps_inside_sqrt,
        "weight_decay": 0.1 if form.coupled else 0.0,
        "centered": form.centered,
        "momentum": 0.9 if form.momentum else 0.0,
        "lr_in_momentum": form.lr_in_momentum,
    }


def all_options_of(form: Form) -> list[dict[str, Any]]:
    """Several updates that are launched in a form."""
    options = options_of(form)
    options |= {"stochastic_rounding": form.stochastic, "kahan_sum": form.compensated}
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
        operands: Before the update, with all that there may be.
        offsets: By how many elements each of them lies off its alignment.
    """

    operands: Operands
    offsets: tuple[int, ...]


def check_form(compiled: Compiled) -> int:
    """Runs all checks of a kernel, and returns how many elements were compared."""
    if compiled.form.updates:
        return sum(check_bits(compiled, each) for each in all_options_of(compiled.form))
    return check_verdicts(compiled)


def check_bits(compiled: Compiled, options: dict[str, Any]) -> int:
    """Compares updates with the NumPy backend's, and returns how many elements it compared."""
    form, cases = (
        compiled.form,
        _cases(compiled.form.dtype, compiled.form.grad_dtype, compiled.block),
    )
    h = Hyperparameters(**options)
    cases = [case._replace(operands=_needed(case.operands, form)) for case in cases]
    for group in [cases] if form.is_multi_tensor else [[case] for case in cases]:
        expected = [_each(torch.clone, case.operands) for case in group]
        scaled = h.with_grad_factor(GRAD_FACTOR) if form.scaled else h
        update_by_numpy_(LaunchTable(expected), scaled, KEY % 2**64)
        for updated, wanted in zip(_updated(compiled, group, h), expected, strict=True):
            assert_same_bits(updated, wanted)
    return sum(case.operands.grad.numel() for case in cases)


def _each(function: Callable[[torch.Tensor], torch.Tensor], operands: Operands) -> Operands:
    """What a function makes of each tensor that there is."""
    tensors: list[Any] = [each if each is None else function(each) for each in operands]
    return Operands(*tensors)


def _needed(operands: Operands, form: Form) -> Operands:
    """Without what a form has none of."""
    return operands._replace(
        grad_avg=operands.grad_avg if form.centered else None,
        momentum_buffer=operands.momentum_buffer if form.momentum else None,
        kahan_comp=operands.kahan_comp if form.compensated else None,
    )


def state_of(operands: Operands) -> State:
    """What an update of operands changes."""
    return State(operands.param, operands.ms, operands.grad_avg, operands.momentum_buffer)


def _updated(
    compiled: Compiled, group: list[Case], hyperparameters: Hyperparameters
) -> list[Operands]:
    """Tensors after one update, of which what watches it has been checked."""
    device = Device()
    operands = [_on_device(device, case) for case in group]
    blocks = -(-group[0].operands.grad.numel() // compiled.block)
    watch = Watch.of(compiled.form, device, hyperparameters.lr, blocks)
    launch = device.update(compiled, LaunchTable(operands), hyperparameters, watch)
    if watch.verdict is not None:
        check_left_out(device, launch, watch, [each for of in operands for each in of])
    counts = None if watch.counts is None else watch.counts.clone()
    execute(launch, device.memory)
    if watch.counts is not None and counts is not None:
        counted = watch.counts - counts
        assert torch.equal(counted, torch.tensor([[1], [1], [0]]).expand_as(counted)), counted
    return operands


def check_verdicts(compiled: Compiled) -> int:
    """Looks for one element that is not finite, anywhere; returns how many places were tried."""
    dtype = getattr(torch, compiled.form.grad_dtype or compiled.form.dtype)
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
                _on_device(device, Case(Operands(each, each, each), (0, offset, 0, 0, 0, 0)))
                for each in others
            ]
            table = LaunchTable(operands)
            execute(device.check_finite(compiled, table, found), device.memory)
            assert found.item() == (place is not None), (size, offset, place, value)
            tried += 1
    return tried


def _on_device(device: Device, case: Case) -> Operands:
    put = zip(Operands._fields, case.operands, case.offsets, strict=True)
    tensors: list[Any] = [
        each if each is None else device.put(name, each, offset) for name, each, offset in put
    ]
    return Operands(*tensors)


def check_left_out(
    device: Device, launch: Launch, watch: Watch, tensors: list[torch.Tensor | None]
) -> None:
    """Checks that an update is left out as a whole where the verdict says so."""
    assert watch.verdict is not None
    kept = unchanged([*tensors, watch.counts])
    for verdict in (watch.verdict, watch.verdict.view(torch.float32)):  # as torch has it
        verdict.fill_(1)
        execute(launch, device.memory)
        verdict.fill_(0)
        kept()


def unchanged(tensors: Iterable[torch.Tensor | None]) -> Callable[[], None]:
    """What checks that tensors are still as they are now."""
    before = [(each, each.clone()) for each in tensors if each is not None]

    def check() -> None:
        for tensor, kept in before:
            assert torch.equal(tensor.view(torch.uint8), kept.view(torch.uint8)), (
                "an update that a verdict forbids"
            )

    return check


@cache
def _cases(dtype_name: str, grad_dtype_name: str, block: int) -> list[Case]:
    dtype = getattr(torch, dtype_name)
    operands = _values(dtype, getattr(torch, grad_dtype_name) if grad_dtype_name else dtype)
    size = operands.grad.numel()
    layouts = [
        (size, (0, 0, 0, 0, 0, 0)),
        (size, (1, 0, 0, 0, 0, 0)),
        (2 * block + 1, (0, 1, 0, 0, 0, 0)),
        (2 * block + 5, (0, 0, 1, 0, 0, 0)),
        (2 * block, (1, 2, 3, 4, 5, 6)),
        (2 * block + 3, (0, 0, 0, 1, 0, 0)),
        (2 * block + 7, (0, 0, 0, 0, 1, 0)),
        (2 * block + 9, (0, 0, 0, 0, 0, 1)),
        (1, (0, 0, 0, 0, 0, 0)),
        (block - 1, (0, 0, 0, 0, 0, 0)),
        (block, (0, 0, 0, 0, 0, 0)),
        (block + 1, (0, 0, 0, 0, 0, 0)),
    ]
    return [
        Case(_each(lambda each: each[:count], operands), offsets)  # noqa: B023 - at once
        for count, offsets in layouts
    ]


def _values(dtype: torch.dtype, grad_dtype: torch.dtype) -> Operands:
    """Operands of ordinary values, then of extremes, then of special ones."""
    size, compute = 1500, COMPUTE[dtype]
    param, *state = worn_state(size, dtype, 0, **FULL)
    left = (0.3 * torch.finfo(dtype).eps * normal(size, torch.float64, 7)).to(dtype)
    worn: Any = [param, normal(size, grad_dtype, 6), *state, left]
    far = [extreme(size, compute, seed) for seed in (3, 4, 5)]
    far = [extreme(size, dtype, 1), extreme(size, grad_dtype, 2), *far, extreme(size, dtype, 8)]
    far[2] = far[2].abs()  # the mean square
    (param, *state), grad = special_operands(dtype, grad_dtype, **FULL)
    # Of the parameter the combinations with what is left of it are all there too.
    left = param.reshape(17, 17, 17).permute(1, 2, 0).flatten()
    special: Any = [param, grad, *state, left]
    return Operands(*map(torch.cat, zip(worn, far, special, strict=True)))
