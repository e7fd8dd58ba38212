"""The update in Triton: fused kernels over one tensor or a table of them, compiled or interpreted.

``triton_launch`` launches them. Addresses and factors reach a kernel as int64, the latter as the
bits of a float64: Triton takes a Python float as float32. No argument is specialised on, so neither
alignment, which kernels look at, nor lengths, nor hyperparameters recompile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hogstream.kernels.backends.triton_pieces import (
    FACTORS,
    as_factors,
    as_stored,
    formula,
    is_nonzero,
    round_factors,
    widened,
)
from hogstream.kernels.launch_table import (
    ELEMENTS,
    GRAD,
    GRAD_AVG,
    KAHAN_COMP,
    MOMENTUM_BUFFER,
    MS,
    PARAM,
)
from hogstream.kernels.race_counters import LANDED, OVERWRITTEN, SURVIVED
from hogstream.kernels.rounding import PLACES

_LANDED, _SURVIVED, _OVERWRITTEN = map(tl.constexpr, (LANDED, SURVIVED, OVERWRITTEN))
_PARAM, _GRAD, _MS, _GRAD_AVG, _MOMENTUM_BUFFER, _KAHAN_COMP, _ELEMENTS = map(
    tl.constexpr, (PARAM, GRAD, MS, GRAD_AVG, MOMENTUM_BUFFER, KAHAN_COMP, ELEMENTS)
)
_PLACES = tl.constexpr(PLACES)
_rmsprop = formula.rmsprop


@triton.jit(
    do_not_specialize=[
        *("param", "grad", "ms", "grad_avg", "buffer", "comp", "elements"),
        *(*FACTORS, "key", "grad_factor", "verdict", "counts"),
    ],
)
def rmsprop_kernel(
    param: tl.int64,  # address of the parameter: STORAGE, (elements,)
    grad: tl.int64,  # address of its gradient: GRAD_STORAGE, (elements,)
    ms: tl.int64,  # address of its mean square: float64 if STORAGE is, else float32, (elements,)
    grad_avg: tl.int64,  # address of its mean, if CENTERED: as ms
    buffer: tl.int64,  # address of its momentum buffer, if MOMENTUM: as ms
    comp: tl.int64,  # address of what rounding has left of it, if COMPENSATED: STORAGE, (elements,)
    elements: tl.int64,  # how many there are
    lr: tl.int64,  # bits of a float64, or the address of one if LR_ON_DEVICE
    alpha: tl.int64,  # bits of a float64, as all factors
    beta: tl.int64,  # 1 - alpha
    eps: tl.int64,  # what keeps the denominator from zero
    weight_decay: tl.int64,  # what COUPLED adds to the gradient, times the parameter
    decoupled_decay: tl.int64,  # weight decay if it is decoupled, else 0
    sign: tl.int64,  # -1 to maximize, else 1
    momentum: tl.int64,  # what stays of the momentum buffer
    key: tl.int64,  # of the step, if STOCHASTIC
    grad_factor: tl.int64,  # address of what gradients are multiplied by, if SCALED: float64, (1,)
    verdict: tl.int64,  # address of what ``finite_kernel`` set, if CHECKED: 32 bits, (1,)
    counts: tl.int64,  # address of ``RaceCounters.counts``, if COUNTED: int64, (3, programs)
    STORAGE: tl.constexpr,  # how the parameter is stored: int16 is bfloat16
    GRAD_STORAGE: tl.constexpr,  # how its gradient is
    EPS_INSIDE_SQRT: tl.constexpr,  # bool: this and six that follow as in ``Switches``
    COUPLED: tl.constexpr,
    CENTERED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    LR_IN_MOMENTUM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COMPENSATED: tl.constexpr,
    SCALED: tl.constexpr,  # bool: whether there is a factor of gradients in memory
    LR_ON_DEVICE: tl.constexpr,  # bool: whether ``lr`` is an address
    CHECKED: tl.constexpr,  # bool: whether to do nothing if the verdict is not 0
    BLOCK: tl.constexpr,  # elements that one program updates: a power of 2
    COUNTED: tl.constexpr,  # bool: whether to count races
):
    """Updates one block of one tensor.

    A program that counts reads the witness of its block, then the block, and writes the block, then
    the witness. Semantics of a device's memory as a whole, and barriers among the threads of the
    program, keep that order for whoever looks from another program.
    """
    factors = as_factors(
        lr, alpha, beta, eps, weight_decay, decoupled_decay, sign, momentum, grad_factor,
        LR_ON_DEVICE, SCALED,
    )  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    if CHECKED:  # noqa: SIM102 - known when the kernel is compiled, and the verdict is not
        if is_nonzero(verdict):
            return
    if COUNTED:
        blocks = tl.num_programs(0).to(tl.int64)
        of_block = counts.to(tl.int64).to(tl.pointer_type(tl.int64)) + block
        # Adding nothing is a read that other memory is read after, in every version of Triton.
        version = tl.atomic_add(of_block + _LANDED * blocks, 0, sem="acquire")
        witness = tl.atomic_add(of_block + _SURVIVED * blocks, 0, sem="acquire")
        tl.debug_barrier()
    _update_block(
        param.to(tl.int64), grad.to(tl.int64), ms.to(tl.int64), grad_avg.to(tl.int64),
        buffer.to(tl.int64), comp.to(tl.int64), elements.to(tl.int64), block, block * BLOCK,
        key.to(tl.int64), factors, STORAGE, GRAD_STORAGE, EPS_INSIDE_SQRT, COUPLED, CENTERED,
        MOMENTUM, LR_IN_MOMENTUM, STOCHASTIC, COMPENSATED, BLOCK,
    )  # fmt: skip
    if COUNTED:
        tl.debug_barrier()
        tl.atomic_xchg(of_block + _SURVIVED * blocks, witness + 1, sem="release")
        overlapping = tl.atomic_add(of_block + _LANDED * blocks, 1, sem="acq_rel") - version
        if overlapping != 0:
            tl.atomic_add(of_block + _OVERWRITTEN * blocks, overlapping, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        *("columns", "updates", "blocks", "programs"),
        *(*FACTORS, "key", "grad_factor", "verdict"),
    ],
)
def multi_tensor_rmsprop_kernel(
    columns: tl.int64,  # address of ``DeviceTable.columns``: int64, (7, updates)
    updates: tl.int64,  # how many there are
    blocks: tl.int64,  # address of ``DeviceTable.blocks``: int32, (2, programs)
    programs: tl.int64,  # how many there are
    lr: tl.int64,  # bits of a float64, or the address of one if LR_ON_DEVICE
    alpha: tl.int64,  # bits of a float64, as all factors
    beta: tl.int64,  # 1 - alpha
    eps: tl.int64,  # what keeps the denominator from zero
    weight_decay: tl.int64,  # what COUPLED adds to the gradient, times the parameter
    decoupled_decay: tl.int64,  # weight decay if it is decoupled, else 0
    sign: tl.int64,  # -1 to maximize, else 1
    momentum: tl.int64,  # what stays of the momentum buffer
    key: tl.int64,  # of the step, if STOCHASTIC
    grad_factor: tl.int64,  # address of what gradients are multiplied by, if SCALED: float64, (1,)
    verdict: tl.int64,  # address of what the finite kernel set, if CHECKED: 32 bits, (1,)
    STORAGE: tl.constexpr,  # how parameters are stored: int16 is bfloat16
    GRAD_STORAGE: tl.constexpr,  # how gradients are
    EPS_INSIDE_SQRT: tl.constexpr,  # bool: this and six that follow as in ``Switches``
    COUPLED: tl.constexpr,
    CENTERED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    LR_IN_MOMENTUM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COMPENSATED: tl.constexpr,
    SCALED: tl.constexpr,  # bool: whether there is a factor of gradients in memory
    LR_ON_DEVICE: tl.constexpr,  # bool: whether ``lr`` is an address
    CHECKED: tl.constexpr,  # bool: whether to do nothing if the verdict is not 0
    BLOCK: tl.constexpr,  # elements that one program updates: a power of 2
):
    """Updates one block of one tensor of a table."""
    factors = as_factors(
        lr, alpha, beta, eps, weight_decay, decoupled_decay, sign, momentum, grad_factor,
        LR_ON_DEVICE, SCALED,
    )  # fmt: skip
    update, index, block = _block_of_table(columns, updates, blocks, programs)
    param, grad, ms, grad_avg, buffer, comp, elements = update
    if CHECKED:  # noqa: SIM102 - known when the kernel is compiled, and the verdict is not
        if is_nonzero(verdict):
            return
    _update_block(
        param, grad, ms, grad_avg, buffer, comp, elements, block, index * _PLACES + block * BLOCK,
        key.to(tl.int64), factors, STORAGE, GRAD_STORAGE, EPS_INSIDE_SQRT, COUPLED, CENTERED,
        MOMENTUM, LR_IN_MOMENTUM, STOCHASTIC, COMPENSATED, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["grad", "elements", "verdict"])
def finite_kernel(
    grad: tl.int64,  # address of a gradient, whose elements are as large as BITS: (elements,)
    elements: tl.int64,  # how many there are
    verdict: tl.int64,  # address of what becomes 1 if one is infinite or NaN: int32, (1,)
    BITS: tl.constexpr,  # dtype: an integer of the size of an element
    EXPONENT: tl.constexpr,  # int: its bits that are the exponent
    BLOCK: tl.constexpr,  # elements that one program looks at: a power of 2
):
    """Sets the verdict if one block of one gradient is not finite."""
    block = tl.program_id(0).to(tl.int64)
    _check_block(grad.to(tl.int64), elements.to(tl.int64), block, verdict, BITS, EXPONENT, BLOCK)


@triton.jit(do_not_specialize=["columns", "updates", "blocks", "programs", "verdict"])
def multi_tensor_finite_kernel(
    columns: tl.int64,  # address of ``DeviceTable.columns``: int64, (7, updates)
    updates: tl.int64,  # how many there are
    blocks: tl.int64,  # address of ``DeviceTable.blocks``: int32, (2, programs)
    programs: tl.int64,  # how many there are
    verdict: tl.int64,  # address of what becomes 1 if an element is infinite or NaN: int32, (1,)
    BITS: tl.constexpr,  # dtype: an integer of the size of an element
    EXPONENT: tl.constexpr,  # int: its bits that are the exponent
    BLOCK: tl.constexpr,  # elements that one program looks at: a power of 2
):
    """Sets the verdict if one block of one gradient of a table is not finite."""
    update, _, block = _block_of_table(columns, updates, blocks, programs)
    _, grad, _, _, _, _, elements = update
    _check_block(grad, elements, block, verdict, BITS, EXPONENT, BLOCK)


@triton.jit
def _block_of_table(
    columns,  # these as in ``multi_tensor_rmsprop_kernel``
    updates,
    blocks,
    programs,
):
    """The update, its index, and the block that this program works on, as in ``DeviceTable``."""
    program = tl.program_id(0).to(tl.int64)
    block_ptr = blocks.to(tl.int64).to(tl.pointer_type(tl.int32)) + program
    index = tl.load(block_ptr)
    column = columns.to(tl.int64).to(tl.pointer_type(tl.int64)) + index
    block = tl.load(block_ptr + programs).to(tl.int64)
    update = (
        tl.load(column + _PARAM * updates),
        tl.load(column + _GRAD * updates),
        tl.load(column + _MS * updates),
        tl.load(column + _GRAD_AVG * updates),
        tl.load(column + _MOMENTUM_BUFFER * updates),
        tl.load(column + _KAHAN_COMP * updates),
        tl.load(column + _ELEMENTS * updates),
    )
    return update, index.to(tl.int64), block


@triton.jit
def _update_block(
    param,  # addresses, as in ``rmsprop_kernel``
    grad,
    ms,
    grad_avg,
    buffer,
    comp,
    elements,  # how many the tensor has
    block,  # which one to update: an int64
    place,  # of the block's first element, for stochastic rounding: an int64
    key,  # of the step: an int64
    factors,  # in float64
    STORAGE: tl.constexpr,  # these as in ``rmsprop_kernel``
    GRAD_STORAGE: tl.constexpr,
    EPS_INSIDE_SQRT: tl.constexpr,
    COUPLED: tl.constexpr,
    CENTERED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    LR_IN_MOMENTUM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COMPENSATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates elements [block * BLOCK, (block + 1) * BLOCK) of a tensor, or what it has of them."""
    compute: tl.constexpr = tl.float64 if tl.float64 == STORAGE else tl.float32
    start = block * BLOCK
    param_ptr = param.to(tl.pointer_type(STORAGE)) + start
    grad_ptr = grad.to(tl.pointer_type(GRAD_STORAGE)) + start
    ms_ptr = ms.to(tl.pointer_type(compute)) + start
    avg_ptr = grad_avg.to(tl.pointer_type(compute)) + start
    buffer_ptr = buffer.to(tl.pointer_type(compute)) + start
    comp_ptr = comp.to(tl.pointer_type(STORAGE)) + start
    # Those that there are not are 0.
    if ((param | grad | ms | grad_avg | buffer | comp) % 16 == 0) & (start + BLOCK <= elements):
        # Full and aligned: without a mask, and with this hint, accesses are of 128 bits.
        param_ptr = tl.multiple_of(param_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        ms_ptr = tl.multiple_of(ms_ptr, 16)
        avg_ptr = tl.multiple_of(avg_ptr, 16)
        buffer_ptr = tl.multiple_of(buffer_ptr, 16)
        comp_ptr = tl.multiple_of(comp_ptr, 16)
        _update_chunk(
            param_ptr, grad_ptr, ms_ptr, avg_ptr, buffer_ptr, comp_ptr, None, 0, place, key,
            factors, EPS_INSIDE_SQRT, COUPLED, CENTERED, MOMENTUM, LR_IN_MOMENTUM, STOCHASTIC,
            COMPENSATED, BLOCK,
        )  # fmt: skip
    else:
        # Each element has an address and a mask of its own: a few at a time, to save registers.
        CHUNK: tl.constexpr = BLOCK // (2 if tl.float64 == STORAGE else 4)
        for first in range(0, BLOCK, CHUNK):
            _update_chunk(
                param_ptr, grad_ptr, ms_ptr, avg_ptr, buffer_ptr, comp_ptr, elements - start,
                first, place, key, factors, EPS_INSIDE_SQRT, COUPLED, CENTERED, MOMENTUM,
                LR_IN_MOMENTUM, STOCHASTIC, COMPENSATED, CHUNK,
            )  # fmt: skip


@triton.jit
def _update_chunk(
    param_ptr,  # where the block starts: pointer to elements as they are stored
    grad_ptr,  # the same
    ms_ptr,  # the same, of the compute type
    avg_ptr,  # the same, if the update is centered
    buffer_ptr,  # the same, if it has momentum
    comp_ptr,  # the same, of elements as they are stored, if it is compensated
    elements,  # how many there are from there on, or None if there are enough
    first,  # of the chunk's elements, counted from there
    place,  # of the element there
    key,  # of the step
    factors,  # in float64
    EPS_INSIDE_SQRT: tl.constexpr,  # these as in ``Switches``
    COUPLED: tl.constexpr,
    CENTERED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    LR_IN_MOMENTUM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COMPENSATED: tl.constexpr,
    CHUNK: tl.constexpr,  # how many elements to update: a power of 2
):
    """Updates CHUNK elements from ``first``, or those below ``elements`` if that is not None."""
    offsets = first + tl.arange(0, CHUNK)
    mask = None if elements is None else offsets < elements
    p = tl.load(param_ptr + offsets, mask)
    g = tl.load(grad_ptr + offsets, mask)
    ms = tl.load(ms_ptr + offsets, mask)
    ga = tl.load(avg_ptr + offsets, mask) if CENTERED else 0.0  # which no code reads
    buf = tl.load(buffer_ptr + offsets, mask) if MOMENTUM else 0.0
    storage: tl.constexpr = p.dtype
    compute: tl.constexpr = ms.dtype
    rounded = round_factors(factors, compute)  # before p and g are widened: it saves registers
    p, g = widened(p, compute), widened(g, compute)
    if COMPENSATED:
        p = p + widened(tl.load(comp_ptr + offsets, mask), compute)
    p, ms, ga, buf = _rmsprop(
        p, g, ms, ga, buf, rounded, EPS_INSIDE_SQRT, COUPLED, CENTERED, MOMENTUM, LR_IN_MOMENTUM
    )
    stored = as_stored(
        p, comp_ptr + offsets, mask, place + offsets, key, storage, STOCHASTIC, COMPENSATED
    )
    tl.store(ms_ptr + offsets, ms, mask)
    if CENTERED:
        tl.store(avg_ptr + offsets, ga, mask)
    if MOMENTUM:
        tl.store(buffer_ptr + offsets, buf, mask)
    tl.store(param_ptr + offsets, stored, mask)


@triton.jit
def _check_block(
    grad,  # address, as in ``finite_kernel``
    elements,  # how many it has
    block,  # which one to look at: an int64
    verdict,  # address, as in ``finite_kernel``
    BITS: tl.constexpr,  # these as in ``finite_kernel``
    EXPONENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sets the verdict if an element of [block * BLOCK, (block + 1) * BLOCK) is not finite."""
    start = block * BLOCK
    grad_ptr = grad.to(tl.pointer_type(BITS)) + start
    offsets = tl.arange(0, BLOCK)
    if (grad % 16 == 0) & (start + BLOCK <= elements):  # for accesses of 128 bits
        bits = tl.load(tl.multiple_of(grad_ptr, 16) + offsets)
    else:
        bits = tl.load(grad_ptr + offsets, offsets < elements - start, 0)
    verdict_ptr = verdict.to(tl.int64).to(tl.pointer_type(tl.int32)) + tl.zeros_like(offsets)
    tl.store(verdict_ptr, 1, (bits & EXPONENT) == EXPONENT)
