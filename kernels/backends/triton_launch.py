"""Launches Triton's kernels on tables of updates, and keeps what was compiled.

This module needs Triton; ``select`` imports it when it is first asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from hogstream.kernels.backends.triton_cache import ensure_folder
from hogstream.kernels.backends.triton_compile import compile_options, compiling
from hogstream.kernels.backends.triton_kernels import (
    finite_kernel,
    multi_tensor_finite_kernel,
    multi_tensor_rmsprop_kernel,
    rmsprop_kernel,
)
from hogstream.kernels.hyperparameters import Hyperparameters, Switches
from hogstream.kernels.launch_table import ELEMENTS, GRAD, LaunchTable
from hogstream.kernels.race_counters import RaceCounters

#: How a parameter's dtype is stored, as Triton knows it; bfloat16 goes by its bits.
STORAGE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.int16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

#: By dtype, an integer of its size, and the bits of an element's exponent: they are all set if the
#: element is infinite or NaN, and only then.
EXPONENTS = {
    torch.float16: (tl.int16, 0x7C00),
    torch.bfloat16: (tl.int16, 0x7F80),
    torch.float32: (tl.int32, 0x7F80_0000),
    torch.float64: (tl.int64, 0x7FF0_0000_0000_0000),
}

#: Elements that one program updates, by dtype of the parameters: two 128-bit accesses a thread to
#: ``ms``, one in float64, whose root and division take more registers.
BLOCK = {torch.float16: 1024, torch.bfloat16: 1024, torch.float32: 1024, torch.float64: 256}
#: The same of the interpreter, which runs programs one by one, at a cost for each.
INTERPRETED_BLOCK = 1 << 16

_NUMBERS, _BITS = struct.Struct("<8d"), struct.Struct("<8q")
_NOTHING = nullcontext()

# What a compiled kernel depends on, and the kernel. No argument is specialised on: this key is all.
_compiled: dict[tuple[Any, ...], Any] = {}


def race_block(dtype: torch.dtype, device: torch.device) -> int:
    """How many elements one program updates; race counters count as many together.

    Args:
        dtype: Of the parameters.
        device: Where they are.
    """
    return BLOCK[dtype] if device.type == "cuda" else INTERPRETED_BLOCK


def update_(
    table: LaunchTable,
    hyperparameters: Hyperparameters,
    lr_on_device: torch.Tensor | None = None,
    counters: RaceCounters | None = None,
    verdict: torch.Tensor | None = None,
    key: int = 0,
    grad_factor: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Updates the parameters and ``ms`` of a table in place, in one launch on the current stream.

    A table of one update costs no copy to the device: its addresses are arguments.

    Args:
        table: Of tensors on one CUDA device, or on the CPU if Triton interprets.
        hyperparameters: The numbers and switches of the update.
        lr_on_device: In place of the number, where the kernel reads it: float64, shape (), on the
            device of the table.
        counters: To count the only update of the table with: for its elements, in blocks of
            ``race_block``, on its device.
        verdict: To be found first, by ``check_finite_``; if a gradient is not finite, the kernel
            leaves parameters, ``ms`` and counters alone.
        key: Of the step, from ``key_of_step``, for stochastic rounding.
        grad_factor: What gradients are multiplied by, where the kernel reads it: float64, of one
            element, on the device of the table.
        found_inf: As torch's ``GradScaler`` has it, in place of a verdict: float32, of one element,
            on the device of the table; if it is not 0, nothing is changed.

    Raises:
        TypeError: If ``verdict`` is of another dtype.
        ValueError: If counters do not fit the table, or ``verdict`` is of another shape or device.
    """
    block = race_block(table.dtype, table.device)
    if counters is not None:
        _check_counters(counters, table, block)
    if verdict is not None:
        check_finite_(table, verdict)
    if table.elements == 0:
        return
    constants = {
        "STORAGE": STORAGE[table.dtype],
        "GRAD_STORAGE": STORAGE[table.grad_dtype],
        **switch_constants(hyperparameters.switches.of_dtype(table.dtype)),
        "SCALED": grad_factor is not None,
        "LR_ON_DEVICE": lr_on_device is not None,
        "CHECKED": verdict is not None or found_inf is not None,
        "BLOCK": block,
    }
    factors = factor_words(hyperparameters)
    if lr_on_device is not None:
        factors[0] = lr_on_device.data_ptr()
    with _programs(table, block) as (programs, where):
        arguments = [*where, *factors, signed(key), address(grad_factor)]
        arguments.append(address(found_inf if verdict is None else verdict))
        if table.updates == 1:
            arguments.append(address(None if counters is None else counters.counts))
            constants["COUNTED"] = counters is not None
            launch(rmsprop_kernel, programs, arguments, constants, table.device)
        else:
            launch(multi_tensor_rmsprop_kernel, programs, arguments, constants, table.device)


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor is; 0 if there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def signed(word: int) -> int:
    """64 bits as a signed integer, as kernels take them."""
    return word - (word >> 63 << 64)


def switch_constants(switches: Switches) -> dict[str, bool]:
    """What the kernels of the update are compiled for, by the names of their constants."""
    return {name.upper(): switch for name, switch in switches._asdict().items()}


def check_finite_(table: LaunchTable, verdict: torch.Tensor) -> None:
    """Finds whether the gradients of a table are finite, in one launch on the current stream.

    Args:
        table: Of tensors on one CUDA device, or on the CPU if Triton interprets.
        verdict: Becomes 1 if an element is infinite or NaN, else 0: int32, shape (1,), on the
            device of the table. Streams that run side by side need one each.

    Raises:
        TypeError: If ``verdict`` is of another dtype.
        ValueError: If ``verdict`` is of another shape or device.
    """
    check_verdict(verdict, table.device)
    verdict.zero_()
    if table.elements == 0:
        return
    block = race_block(table.dtype, table.device)
    bits, exponent = EXPONENTS[table.grad_dtype]
    constants = {"BITS": bits, "EXPONENT": exponent, "BLOCK": block}
    with _programs(table, block) as (programs, where):
        if table.updates == 1:
            arguments = [where[GRAD], where[ELEMENTS], verdict.data_ptr()]
            launch(finite_kernel, programs, arguments, constants, table.device)
        else:
            arguments = [*where, verdict.data_ptr()]
            launch(multi_tensor_finite_kernel, programs, arguments, constants, table.device)


def check_verdict(verdict: torch.Tensor, device: torch.device) -> None:
    """Checks what a kernel is to put its verdict in.

    Raises:
        TypeError: If it is of another dtype.
        ValueError: If it is of another shape or device.
    """
    if verdict.dtype != torch.int32:
        raise TypeError(f"verdict must be int32, got {verdict.dtype}")
    if verdict.shape != (1,) or verdict.device != device:
        raise ValueError(
            f"verdict must be of shape (1,) and on {device}, "
            f"got {tuple(verdict.shape)} on {verdict.device}"
        )


def _check_counters(counters: RaceCounters, table: LaunchTable, block: int) -> None:
    if table.updates != 1:
        raise ValueError(f"counters must be for a table of one update, got {table.updates}")
    fit = (table.elements, block, table.device)
    given = (counters.elements, counters.block, counters.counts.device)
    if given != fit:
        raise ValueError(
            "counters must be for {} elements in blocks of {} on {}, ".format(*fit)
            + "got {} in blocks of {} on {}".format(*given)
        )


@contextmanager
def _programs(table: LaunchTable, block: int) -> Iterator[tuple[int, list[int]]]:
    """How many programs to launch in this context, and what a kernel takes first.

    That is the addresses and length of a table's only update, or where the table is.
    """
    with current(table.device):
        if table.updates == 1:
            yield triton.cdiv(table.elements, block), table.columns[:, 0].tolist()
            return
        with table.on_device(block) as on:
            programs = on.blocks.shape[1]
            where = [on.columns.data_ptr(), table.updates, on.blocks.data_ptr(), programs]
            yield programs, where


def current(device: torch.device) -> AbstractContextManager[object]:
    """A context in which a device is the current one; most often it is so already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def launch(
    kernel: Any,
    programs: int,
    arguments: list[int],
    constants: dict[str, Any],
    device: torch.device,
) -> None:
    """Launches a compiled kernel that was kept, or else compiles it and keeps it."""
    key = (kernel, device, *constants.values())
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*arguments, *constants.values())
        return
    with compiling:
        ensure_folder()
        compiled = kernel[programs,](*arguments, **constants, **compile_options(constants))
    if compiled is not None:  # the interpreter has nothing to keep
        _compiled[key] = compiled


def factor_words(hyperparameters: Hyperparameters) -> list[int]:
    """What the kernels of the update take for factors, in their order: the bits of float64.

    As such a number reaches a kernel whole.
    """
    h, factors = hyperparameters, hyperparameters.factors
    return [
        *_BITS.unpack(
            _NUMBERS.pack(
                factors.lr,
                factors.alpha,
                factors.beta,
                factors.eps,
                factors.weight_decay,
                h.weight_decay if h.decoupled_weight_decay else 0.0,
                factors.sign,
                factors.momentum,
            )
        )
    ]
