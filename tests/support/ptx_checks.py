"""What must hold of every kernel of ours, as PTX: each function looks at one, or raises."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from hogstream.kernels import rmsprop_
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from ptx_compiling import Compiled, Form
from ptx_machine import Launch, execute
from ptx_updates import Device, Watch
from update_testing import COMPUTE, State, assert_same_bits, extreme, special


def _hyperparameters(form: Form) -> list[dict[str, Any]]:
    if form.coupled:
        return [{"weight_decay": 0.1}, {"weight_decay": 0.3, "maximize": True, "alpha": 0.5}]
    # An update by this is half of the last bit of what lies between 1 and 2: it makes ties.
    half = torch.finfo(getattr(torch, form.dtype)).eps / 2
    return [
        {},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True, "lr": 0.02},
        {"lr": half, "alpha": 0.0, "eps": 0.0},
    ]


class Case(NamedTuple):
    """One tensor that is updated, and how.

    Attributes:
        param: Before the update.
        grad: Its gradient.
        ms: Its mean square before the update.
        offsets: By how many elements each lies off its alignment.
    """

    param: torch.Tensor
    grad: torch.Tensor
    ms: torch.Tensor
    offsets: tuple[int, int, int]


def check_form(compiled: Compiled) -> int:
    """Runs all checks of a kernel, and returns how many elements were compared."""
    if compiled.form.updates:
        return sum(check_bits(compiled, each) for each in _hyperparameters(compiled.form))
    return check_verdicts(compiled)


def check_bits(compiled: Compiled, switches: dict[str, Any]) -> int:
    """Compares updates with the NumPy backend's, and returns how many elements it compared."""
    numbers = {"eps_inside_sqrt": compiled.form.eps_inside_sqrt, **switches}
    cases = _cases(compiled.form.dtype, compiled.block)
    for group in [cases] if compiled.form.is_multi_tensor else [[case] for case in cases]:
        for case, (param, _, ms) in zip(group, _updated(compiled, group, numbers), strict=True):
            expected = State(case.param.clone(), case.ms.clone())
            rmsprop_(expected.param, case.grad, expected.ms, backend="numpy", **numbers)
            assert_same_bits(State(param, ms), expected)
    return sum(case.param.numel() for case in cases)


def _updated(compiled: Compiled, group: list[Case], numbers: dict[str, Any]) -> list[Operands]:
    """Tensors after one update, of which what watches it has been checked."""
    device, hyperparameters = Device(), Hyperparameters(**numbers)
    operands = [_on_device(device, case) for case in group]
    blocks = -(-group[0].param.numel() // compiled.block)
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
                _on_device(device, Case(each, each, each, (0, offset, 0))) for each in others
            ]
            table = LaunchTable(operands)
            execute(device.check_finite(compiled, table, found), device.memory)
            assert found.item() == (place is not None), (size, offset, place, value)
            tried += 1
    return tried


def _on_device(device: Device, case: Case) -> Operands:
    tensors = (case.param, case.grad, case.ms)
    return Operands(
        *(
            device.put(name, tensor, offset)
            for name, tensor, offset in zip(Operands._fields, tensors, case.offsets, strict=True)
        )
    )


def _check_left_out(device: Device, launch: Launch, watch: Watch, operands: list[Operands]) -> None:
    """Checks that an update is left out as a whole where the verdict says so."""
    assert watch.verdict is not None
    tensors = [tensor for each in operands for tensor in each]
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
    params, grads, squares = map(torch.cat, zip(*_values(dtype), strict=True))
    size = len(params)
    layouts = [
        (size, (0, 0, 0)),
        (size, (1, 0, 0)),
        (2 * block + 1, (0, 1, 0)),
        (2 * block + 5, (0, 0, 1)),
        (2 * block, (1, 2, 3)),
        (1, (0, 0, 0)),
        (block - 1, (0, 0, 0)),
        (block, (0, 0, 0)),
        (block + 1, (0, 0, 0)),
    ]
    return [
        Case(params[:count], grads[:count], squares[:count], offsets) for count, offsets in layouts
    ]


def _values(dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Parameters, gradients and mean squares: ordinary ones, then all combinations of extremes."""
    compute = COMPUTE[dtype]
    size = 1500
    random = np.random.default_rng(0)
    normal = torch.from_numpy(random.standard_normal((2, size))).to(dtype)
    yield normal[0], normal[1], torch.from_numpy(random.standard_exponential(size)).to(compute)
    yield extreme(size, dtype, 1), extreme(size, dtype, 2), extreme(size, compute, 3).abs()
    small, large = special(dtype), special(compute)
    grid = torch.meshgrid(
        torch.arange(len(small)), torch.arange(len(small)), torch.arange(len(large)), indexing="ij"
    )
    of_param, of_grad, of_ms = (each.reshape(-1) for each in grid)
    yield small[of_param], small[of_grad], large[of_ms]
