"""Faults in the kernels, made on purpose: the machine that executes PTX must find each of them.

Each changes the source of a kernel, or how it is compiled, in a copy of the package that a process
of its own compiles. Nothing of the machine changes.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from mutations import Mutation, changed, copy_with
from ptx_compiling import Compiled, Form, compile_forms
from ptx_far import check_far_offsets
from ptx_machine import PtxError
from ptx_races import check_locks, check_race
from ptx_row_access import check_any

#: Which device they are compiled for.
TARGET = 90
#: How many races a fault may take.
SEEDS = 200

_VERDICT = Form("finite_kernel", "float16")
_TABLE = Form("multi_tensor_rmsprop_kernel", "float32", eps_inside_sqrt=True)
_PLAIN = Form("rmsprop_kernel", "float32", eps_inside_sqrt=True, coupled=True)
_FULL = Form("rmsprop_kernel", "float32", centered=True, momentum=True)
_LR_IN = Form("multi_tensor_rmsprop_kernel", "float32", momentum=True, lr_in_momentum=True)
_BFLOAT16 = Form("rmsprop_kernel", "bfloat16")
_CHECKED = Form("rmsprop_kernel", "float16", checked=True)
_ON_DEVICE = Form("rmsprop_kernel", "float64", lr_on_device=True)
_COUNTED = Form("rmsprop_kernel", "float32", counted=True)
_STOCHASTIC = Form("multi_tensor_rmsprop_kernel", "bfloat16", stochastic=True)
_COMPENSATED = Form(
    "rmsprop_kernel", "float16", compensated=True, scaled=True, grad_dtype="float32"
)
_LAZY_ROWS = Form("row_rmsprop_kernel", "float32", centered=True, lazy=True, columns=32, unit=4)
_ROWWISE = Form("row_rmsprop_kernel", "float32", momentum=True, rowwise=True, columns=32, unit=1)
_COUNTED_ROWS = Form("row_rmsprop_kernel", "bfloat16", counted=True, columns=8, unit=8)
_LOCKED_ROWS = Form("row_rmsprop_kernel", "float32", columns=32, unit=4, locked=True)
_ROWS = (_LAZY_ROWS, _ROWWISE, _COUNTED_ROWS)
_ACCESS = (
    Form("row_range_kernel", "int64"),
    Form("row_copy_kernel", "bfloat16", columns=32, unit=1),
    Form("row_copy_kernel", "float32", columns=32, unit=4, locked=True),
)
_DENSE = (
    *(_PLAIN, _FULL, _LR_IN, _BFLOAT16, _CHECKED, _ON_DEVICE, _TABLE, _STOCHASTIC, _COMPENSATED),
    *(_VERDICT, _COUNTED),
)
# What is looked at, by the module that has a fault; else all.
_FORMS = {
    "triton_kernels": _DENSE,
    "triton_row_kernels": _ROWS,
    "triton_row_access": _ACCESS,
    "triton_locks": (_LOCKED_ROWS, _ACCESS[2]),
}


def _kernel(old: str, new: str = "") -> Mutation:
    return changed("triton_kernels", old, new)


def _piece(old: str, new: str = "") -> Mutation:
    return changed("triton_pieces", old, new)


def _rows(old: str, new: str = "") -> Mutation:
    return changed("triton_row_kernels", old, new)


def _locks(old: str, new: str = "") -> Mutation:
    return changed("triton_locks", old, new)


def _access(old: str, new: str = "") -> Mutation:
    return changed("triton_row_access", old, new)


def _formula(old: str, new: str) -> Mutation:
    return changed("../formula", old, new)


_ADDRESSES = "(param | grad | ms | grad_avg | buffer | comp)"


def _moved(text: str, behind: str) -> Mutation:
    """A text that comes to stand behind another."""
    return Mutation("triton_kernels", ((text, ""), (behind, behind + text)))


_VERSION = '        version = tl.atomic_add(of_block + _LANDED * blocks, 0, sem="acquire")\n'
_WITNESS = '        witness = tl.atomic_add(of_block + _SURVIVED * blocks, 0, sem="acquire")\n'
_WRITTEN = '        tl.atomic_xchg(of_block + _SURVIVED * blocks, witness + 1, sem="release")\n'
_LANDED = (
    '        overlapping = tl.atomic_add(of_block + _LANDED * blocks, 1, sem="acq_rel") - version\n'
)
_AFTER = "    if COUNTED:\n        tl.debug_barrier()\n"

MUTATIONS = {
    # Arithmetic
    "operations may be fused": changed(
        "triton_compile", '"enable_fp_fusion": False', '"enable_fp_fusion": True'
    ),
    "a division is approximate": _piece("tl.div_rn(x, y)", "(x / y)"),
    "a root is approximate": _piece("tl.sqrt_rn(x)", "tl.sqrt(x)"),
    "a product in another order": _formula("(beta * g) * g", "beta * (g * g)"),
    "epsilon on the other side of the root": _formula(
        "sqrt(v + eps) if EPS_INSIDE_SQRT else sqrt(v) + eps",
        "sqrt(v) + eps if EPS_INSIDE_SQRT else sqrt(v + eps)",
    ),
    "no clamp": _formula("clamp(ms - ga * ga)", "ms - ga * ga"),
    "a clamp that makes 0 of NaN": _piece("tl.where(x < 0, 0.0, x)", "tl.where(x > 0, x, 0.0)"),
    "the mean before this gradient": _formula(
        "        ga = alpha * ga + beta * g\n        v = clamp(ms - ga * ga)",
        "        v = clamp(ms - ga * ga)\n        ga = alpha * ga + beta * g",
    ),
    "the mean of squares without the gradient's mean": _formula("ms - ga * ga", "ms - ga"),
    "lr twice": _formula(
        "step = g if MOMENTUM and not LR_IN_MOMENTUM else lr * g", "step = lr * g"
    ),
    "lr never": _formula("step = buf if LR_IN_MOMENTUM else lr * buf", "step = buf"),
    "lr on the other side of momentum": _formula(
        "MOMENTUM and not LR_IN_MOMENTUM else lr * g", "LR_IN_MOMENTUM else lr * g"
    ),
    "momentum of the step": _formula("momentum * buf + step", "momentum * (buf + step)"),
    "the step without its momentum": _formula(
        "step = buf if LR_IN_MOMENTUM else lr * buf", "step = step if LR_IN_MOMENTUM else lr * step"
    ),
    "the buffer of the update before": _kernel(
        "tl.store(buffer_ptr + offsets, buf, mask)",
        "tl.store(buffer_ptr + offsets, tl.load(buffer_ptr + offsets, mask), mask)",
    ),
    "the mean in place of the buffer": _kernel(
        "buf = tl.load(buffer_ptr + offsets, mask)", "buf = tl.load(avg_ptr + offsets, mask)"
    ),
    "the factor of decay in float32": _piece(
        "shrink = 1.0 - lr * _as_float64(decoupled_decay)",
        "shrink = (1.0 - lr.to(tl.float32) * _as_float64(decoupled_decay).to(tl.float32))"
        ".to(tl.float64)",
    ),
    "bfloat16 is cut off": _piece("(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "bits >> 16"),
    "bfloat16 rounds halves up": _piece("0x7FFF + ((bits >> 16) & 1)", "0x8000"),
    "bfloat16 has no NaN": _piece("tl.where(x != x, 0x7FC0, rounded)", "rounded"),
    # Rounding, and gradients of another kind
    "the place in a table is of no account": _kernel(
        "index * _PLACES + block * BLOCK", "block * BLOCK"
    ),
    "the place of a block is of no account": _kernel(
        "index * _PLACES + block * BLOCK", "index * _PLACES"
    ),
    "half of the key is of no account": _piece(
        "key.to(tl.uint32), (key >> 32).to(tl.uint32))", "key.to(tl.uint32), 0)"
    ),
    "one random bit too few": changed("../rounding", "(random >> 16)", "(random >> 17)"),
    "what is left is subtracted": _kernel(
        "p = p + widened(tl.load(comp_ptr", "p = p - widened(tl.load(comp_ptr"
    ),
    "what is left of infinity is NaN": _piece("tl.where(left - left == 0, left, 0.0)", "left"),
    "stores of what is left without a mask": _piece(
        "tl.store(comp_ptr, _narrowed(left, storage), mask)",
        "tl.store(comp_ptr, _narrowed(left, storage))",
    ),
    "what is left passes for aligned": _kernel(_ADDRESSES, _ADDRESSES.replace(" | comp", "")),
    "a factor in place of the sign": _piece("of_grad *= tl.load(", "of_grad = tl.load("),
    "gradients are read as parameters": _kernel(
        "grad.to(tl.pointer_type(GRAD_STORAGE)) + start\n    ms_ptr",
        "grad.to(tl.pointer_type(STORAGE)) + start\n    ms_ptr",
    ),
    # Addresses
    "loads of parameters without a mask": _kernel(
        "p = tl.load(param_ptr + offsets, mask)", "p = tl.load(param_ptr + offsets)"
    ),
    "loads of gradients without a mask": _kernel(
        "g = tl.load(grad_ptr + offsets, mask)", "g = tl.load(grad_ptr + offsets)"
    ),
    "stores of parameters without a mask": _kernel(
        "tl.store(param_ptr + offsets, stored, mask)", "tl.store(param_ptr + offsets, stored)"
    ),
    "stores of mean squares without a mask": _kernel(
        "tl.store(ms_ptr + offsets, ms, mask)", "tl.store(ms_ptr + offsets, ms)"
    ),
    "a mask with one element too many": _kernel("offsets < elements\n", "offsets <= elements\n"),
    "a mask with one element too few": _kernel("offsets < elements\n", "offsets < elements - 1\n"),
    "the last block passes for full": _kernel(
        f"({_ADDRESSES} % 16 == 0) & (start + BLOCK <= elements)",
        f"({_ADDRESSES} % 16 == 0) & (start <= elements)",
    ),
    "gradients pass for aligned": _kernel(_ADDRESSES, _ADDRESSES.replace(" | grad |", " |")),
    "means of gradients pass for aligned": _kernel(
        _ADDRESSES, _ADDRESSES.replace(" | grad_avg", "")
    ),
    "momentum buffers pass for aligned": _kernel(_ADDRESSES, _ADDRESSES.replace(" | buffer", "")),
    "loads of means of gradients without a mask": _kernel(
        "tl.load(avg_ptr + offsets, mask)", "tl.load(avg_ptr + offsets)"
    ),
    "stores of momentum buffers without a mask": _kernel(
        "tl.store(buffer_ptr + offsets, buf, mask)", "tl.store(buffer_ptr + offsets, buf)"
    ),
    "chunks overlap": _kernel("in range(0, BLOCK, CHUNK)", "in range(0, BLOCK, CHUNK // 2)"),
    "offsets in 32 bits": _kernel(
        "    start = block * BLOCK\n    param_ptr",
        "    start = block.to(tl.int32) * BLOCK\n    param_ptr",
    ),
    "offsets of verdicts in 32 bits": _kernel(
        "    start = block * BLOCK\n    grad_ptr",
        "    start = block.to(tl.int32) * BLOCK\n    grad_ptr",
    ),
    "a table read in the wrong row": _kernel(
        "tl.load(column + _MS * updates)", "tl.load(column + _GRAD * updates)"
    ),
    "momentum buffers read in the wrong row": _kernel(
        "tl.load(column + _MOMENTUM_BUFFER * updates)", "tl.load(column + _GRAD_AVG * updates)"
    ),
    "blocks of a table in the wrong order": _kernel(
        "tl.load(block_ptr + programs)", "tl.load(block_ptr)"
    ),
    # Verdicts
    "a verdict that nobody heeds": _kernel(
        "    block = tl.program_id(0).to(tl.int64)\n    if CHECKED:",
        "    block = tl.program_id(0).to(tl.int64)\n    if CHECKED and COUNTED:",
    ),
    "NaN passes for finite": _kernel("(bits & EXPONENT) == EXPONENT", "bits == EXPONENT"),
    "the last element is not looked at": _kernel(
        "offsets < elements - start, 0", "offsets < elements - start - 1, 0"
    ),
    # Race counters
    "the witness is read late": _moved(_WITNESS, _AFTER),
    "what landed is read late": _moved(_VERSION, _AFTER),
    "the witness is written early": _moved(_WRITTEN, _WITNESS),
    "the landing is counted before the witness is written": _moved(_WRITTEN, _LANDED),
    "the witness is added to": _kernel(
        "tl.atomic_xchg(of_block + _SURVIVED * blocks, witness + 1",
        "tl.atomic_add(of_block + _SURVIVED * blocks, 1",
    ),
    "the landing is stored": _kernel(
        _LANDED,
        "        tl.store(of_block + _LANDED * blocks, version + 1)\n"
        "        overlapping = tl.load(of_block + _LANDED * blocks) - version - 1\n",
    ),
    "overlaps are stored": _kernel(
        'tl.atomic_add(of_block + _OVERWRITTEN * blocks, overlapping, sem="relaxed")',
        "tl.store(\n                of_block + _OVERWRITTEN * blocks,\n"
        "                tl.load(of_block + _OVERWRITTEN * blocks) + overlapping,\n            )",
    ),
    "blocks share their counts": _kernel(
        "tl.pointer_type(tl.int64)) + block\n", "tl.pointer_type(tl.int64))\n"
    ),
    # Rows
    "every position is a head": _rows("inside & (row != before)", "inside & (row >= 0)"),
    "a row's first gradient again in place of the others": _rows(
        "tl.load(order_ptr + step,", "tl.load(order_ptr,"
    ),
    "gradients are taken from where rows are": _rows(
        "order.to(tl.int64).to(tl.pointer_type(tl.int64)) + position", "rows_ptr + position"
    ),
    "neighbouring lanes are added first": _rows(
        "            pairs = tl.reshape(sums, [ROWS, 2, COLUMNS >> halving + 1])\n"
        "            sums = tl.sum(pairs, 1)\n",
        "            pairs = tl.reshape(sums, [ROWS, COLUMNS >> halving + 1, 2])\n"
        "            sums = tl.sum(pairs, 2)\n",
    ),
    "a row that is not in the table is no reason to stop": _rows(
        "    if _are_outside(rows_ptr, positions, table_rows, tile, verdict):\n        return\n",
        "    _are_outside(rows_ptr, positions, table_rows, tile, verdict)\n",
    ),
    "rows beyond the table pass": _rows(" | (last >= table_rows)"),
    "nobody says that all rows are in the table": _rows(
        "outside.to(tl.int32), tile == 0)", "1, outside & (tile == 0))"
    ),
    "this update passed itself by": _rows("number - 1 - tl.load", "number - tl.load"),
    "state of the future grows": _rows(
        "tl.maximum(number - 1 - tl.load(last_ptr, head, 0), 0)",
        "number - 1 - tl.load(last_ptr, head, 0)",
    ),
    "the last update is written before all have read it": Mutation(
        "triton_row_kernels",
        (
            ("    if LAZY:\n        tl.store(last_ptr, number, head)\n", ""),
            (
                "        one = tl.full(",
                "        tl.store(last_ptr, number, head)\n        one = tl.full(",
            ),
        ),
    ),
    "no barrier before state of rows is written": _rows(
        "if ROWWISE or LAZY or COUNTED:", "if COUNTED:"
    ),
    "offsets of rows in 32 bits": _rows(
        "    offsets = row[:, None] * width +",
        "    offsets = (row[:, None] * width).to(tl.int32) +",
    ),
    "offsets of gradients of rows in 32 bits": _rows(
        "tl.load(grads_ptr + place * width + column, (count > 0)",
        "tl.load(grads_ptr + (place * width).to(tl.int32) + column, (count > 0)",
    ),
    "rows share their counts": _rows(
        "of_row = counts.to(tl.int64).to(tl.pointer_type(tl.int64)) + row",
        "of_row = counts.to(tl.int64).to(tl.pointer_type(tl.int64)) + 0 * row",
    ),
    "the witness of a row is added to": _rows(
        "tl.atomic_xchg(of_row + _SURVIVED * table_rows, witness + 1,",
        "tl.atomic_add(of_row + _SURVIVED * table_rows, 1,",
    ),
    "the reading of a row's witness acquires nothing": _rows(
        'tl.atomic_add(of_row + _SURVIVED * table_rows, 0, head, sem="acquire")',
        'tl.atomic_add(of_row + _SURVIVED * table_rows, 0, head, sem="relaxed")',
    ),
    "the writing of a row's witness releases nothing": _rows(
        'witness + 1, head, sem="release")', 'witness + 1, head, sem="relaxed")'
    ),
    # Locks of rows
    "a row's lock is taken by all who ask": _locks(
        'while tl.atomic_cas(lock_ptr, 0, 1, sem="acquire") != 0:',
        'while tl.atomic_cas(lock_ptr, 0, 1, sem="acquire") > 1:',
    ),
    "a lock that is taken acquires nothing": _locks('sem="acquire"', 'sem="relaxed"'),
    "a lock that is let go of releases nothing": _locks('sem="release"', 'sem="relaxed"'),
    "rows have the locks of others": _locks(
        "((first_lock.to(tl.int64) + row) & (stripes.to(tl.int64) - 1))", "row % 2 * 0 + row"
    ),
    "the lock is let go of before the row is written": _locks(
        "        pass\n    tl.debug_barrier()\n",
        "        pass\n    tl.debug_barrier()\n    tl.atomic_xchg(lock_ptr, 0)\n",
    ),
    # Rows that are looked at, and copied
    "rows that are looked at may be less than 0": _access("(first < 0) | (last", "(last"),
    "rows that are looked at may be beyond the table": _access(
        "(first < 0) | (last >= table_rows)", "first < 0"
    ),
    "rows that are copied may be less than 0": _access("(row < 0) | (row >=", "(row >="),
    "nobody says that a row is not there": _access(
        "tl.max(outside.to(tl.int32), 0) != 0", "tl.max(outside.to(tl.int32), 0) > 1"
    ),
    "rows are copied to where they come from": _access(
        "copies_ptr + position[:, None]", "copies_ptr + row[:, None]"
    ),
    "the columns of the next row are copied too": _access(
        "inside[:, None] & (column < width)[None, :]", "inside[:, None]"
    ),
    # Order in memory
    "the reading of the witness acquires nothing": _kernel(
        _WITNESS, _WITNESS.replace("acquire", "relaxed")
    ),
    "the reading of what landed acquires nothing": _kernel(
        _VERSION, _VERSION.replace("acquire", "relaxed")
    ),
    "the writing of the witness releases nothing": _kernel(
        _WRITTEN, _WRITTEN.replace("release", "relaxed")
    ),
}


def _without_barriers(after: str, before: str) -> Callable[[str], str]:
    """Drops the barriers between two patterns from PTX that counts; other PTX stays as it is."""
    between = re.compile(f"({after})(.*?)({before})", re.DOTALL)

    def edit(ptx: str) -> str:
        if ".exch." not in ptx:
            return ptx
        dropped = between.sub(
            lambda found: found[1] + re.sub(r"bar\.sync\s+0;", "", found[2]) + found[3], ptx
        )
        if dropped == ptx:
            raise ValueError(f"there is no barrier between {after!r} and {before!r}")
        return dropped

    return edit


#: These change PTX itself: Triton puts barriers of its own beside those of the source.
PTX_MUTATIONS = {
    "no barrier before the block is read": _without_barriers(
        r"\.acquire\..*\.acquire\.", r"@%p\d+ bra"
    ),
    "no barrier after the block is written": _without_barriers(
        r"bra\.uni.*st\.global", r"\.release\.exch"
    ),
}


class Caught(NamedTuple):
    """How a fault was found.

    Attributes:
        by: Which check found it; None if none did.
        told: What it said.
    """

    by: str | None
    told: str


def run(name: str) -> Caught:
    """Compiles kernels with a fault, and checks them until a check finds it.

    Raises:
        KeyError: If there is no such fault.
        ValueError: If it is none of the sources as they are.
    """
    try:
        compiled = _compiled_with(name)
    except PtxError as error:
        return Caught("refusal", str(error))
    for by, check in _checks(compiled):
        try:
            check()
        except (AssertionError, PtxError) as error:
            return Caught(by, str(error))
    return Caught(None, "")


def _compiled_with(name: str) -> dict[Form, Compiled]:
    module = MUTATIONS[name].module if name in MUTATIONS else "triton_kernels"
    wanted = [(TARGET, form) for form in _FORMS.get(module, _DENSE + _ROWS)]
    if name in PTX_MUTATIONS:
        compiled = compile_forms(wanted, edit=PTX_MUTATIONS[name])
    else:
        with tempfile.TemporaryDirectory(prefix="hogstream-mutation-") as folder:
            copy_kernels_with(MUTATIONS[name], Path(folder))
            compiled = compile_forms(wanted, Path(folder))
    return {form: each for (_, form), each in compiled.items()}


def copy_kernels_with(mutation: Mutation, folder: Path) -> None:
    """Copies the kernels into a folder that ``hogstream`` can be imported from, with a fault.

    Raises:
        ValueError: If it is none of the sources as they are.
    """
    copy_with(mutation, folder / "hogstream", "kernels/backends", ("kernels",))


def _checks(compiled: dict[Form, Compiled]) -> Iterator[tuple[str, Callable[[], object]]]:
    """All checks, each with its name."""
    if _LOCKED_ROWS in compiled:
        for seed in range(SEEDS // 10):
            yield f"locks in race {seed}", partial(check_locks, compiled[_LOCKED_ROWS], seed)
    for form, each in compiled.items():
        what = "bits" if form.updates else "verdicts"
        yield f"{what} of {form.name}", partial(check_any, each)
    for form in (_PLAIN, _FULL, _TABLE, _VERDICT, _LAZY_ROWS):
        if form in compiled:
            yield f"far offsets of {form.name}", partial(check_far_offsets, compiled[form])
    counting = [each for each in (_COUNTED, _COUNTED_ROWS) if each in compiled]
    for seed, form in product(range(SEEDS), counting):
        yield f"race {seed} of {form.name}", partial(check_race, compiled[form], seed)
