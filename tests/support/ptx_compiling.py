"""Our Triton kernels as PTX, in each form that a launch may ask for.

Tests have Triton interpret, so a process of its own compiles: this file, run as a program, takes a
JSON list of devices and forms, and prints a line for each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product, starmap
from pathlib import Path
from typing import Any, NamedTuple

from ptx_machine import Program, parse

#: Devices that kernels are compiled for, by compute capability.
TARGETS = (80, 90, 100)
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Form(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        kernel: Its name.
        dtype: Of parameters.
        eps_inside_sqrt: As in ``Hyperparameters``; the kernels of verdicts have this and what
            follows at False.
        coupled: As in ``Switches``.
        centered: Likewise.
        momentum: Likewise.
        lr_in_momentum: Likewise; never without momentum.
        lr_on_device: Whether lr is read from memory.
        checked: Whether there is a verdict.
        counted: Whether races are counted.
        stochastic: As in ``Switches``.
        compensated: Likewise.
        scaled: Whether gradients are multiplied by a factor in memory.
        grad_dtype: Of gradients; if "", that of parameters.
        rowwise: Of the kernel of rows, as it has this and what follows.
        lazy: Likewise.
        columns: Likewise; 0 for kernels that have no tiles of rows.
        unit: Likewise.
        locked: Likewise.
    """

    kernel: str
    dtype: str
    eps_inside_sqrt: bool = False
    coupled: bool = False
    centered: bool = False
    momentum: bool = False
    lr_in_momentum: bool = False
    lr_on_device: bool = False
    checked: bool = False
    counted: bool = False
    stochastic: bool = False
    compensated: bool = False
    scaled: bool = False
    grad_dtype: str = ""
    rowwise: bool = False
    lazy: bool = False
    columns: int = 0
    unit: int = 0
    locked: bool = False

    @property
    def of_rows(self) -> bool:
        """Whether it is a kernel of rows."""
        return self.kernel.startswith("row_")

    @property
    def updates(self) -> bool:
        """Whether it is a kernel of the update."""
        return "rmsprop" in self.kernel

    @property
    def is_multi_tensor(self) -> bool:
        """Whether it takes a table."""
        return self.kernel.startswith("multi_tensor")

    @property
    def name(self) -> str:
        """In words."""
        switches = [name for name, value in self._asdict().items() if value is True]
        dtypes = f"{self.dtype} {self.grad_dtype and f'by {self.grad_dtype}'}".rstrip()
        tile = [f"columns={self.columns} unit={self.unit}"] if self.columns else []
        return " ".join([self.kernel.removesuffix("_kernel"), dtypes, *switches, *tile])


_SWITCHES = (False, True)
_HALVES = ("float16", "bfloat16")
_UPDATES = ("rmsprop_kernel", "multi_tensor_rmsprop_kernel")
_VERDICTS = ("finite_kernel", "multi_tensor_finite_kernel")

#: All forms of kernels that round to nearest and take gradients of the dtype of parameters, without
#: a factor in memory.
FORMS = tuple(
    form
    for form in (
        *starmap(partial(Form, "rmsprop_kernel"), product(DTYPES, *[_SWITCHES] * 8)),
        *starmap(partial(Form, "multi_tensor_rmsprop_kernel"), product(DTYPES, *[_SWITCHES] * 7)),
        *starmap(Form, product(_VERDICTS, DTYPES)),
    )
    if form.momentum or not form.lr_in_momentum
)

#: Forms of kernels that round otherwise, or take other gradients. What they share with ``FORMS`` is
#: shown there, so not every switch is combined with every other.
MIXED_FORMS = (
    # Each rounding with all that the formula takes.
    *(
        form._replace(stochastic=not compensated, compensated=compensated)
        for form in FORMS
        if form.dtype in _HALVES and form.updates and not any(form[7:])
        for compensated in _SWITCHES
    ),
    # Each pair of dtypes, with a factor and without; among them those of 16 bits that round so.
    *(
        Form(
            *(kernel, dtype, True, True, full, full),
            stochastic=stochastic,
            compensated=compensated,
            scaled=scaled,
            grad_dtype=grad_dtype if grad_dtype != dtype else "",
        )
        for kernel, dtype, grad_dtype in product(_UPDATES, DTYPES, DTYPES)
        for full, scaled in product(_SWITCHES, _SWITCHES)
        for stochastic, compensated in ((False, False), (True, False), (False, True))
        if dtype in _HALVES or not (stochastic or compensated)
        if scaled or grad_dtype != dtype
    ),
    # What else is in memory.
    *(
        Form(kernel, dtype, lr_on_device=on_device, checked=True, scaled=True)
        for kernel, dtype, on_device in product(_UPDATES, DTYPES, _SWITCHES)
    ),
    # Verdicts on gradients of another dtype, which are looked at in blocks of the parameter's.
    *(
        Form(kernel, dtype, grad_dtype=grad_dtype)
        for kernel, dtype, grad_dtype in product(_VERDICTS, DTYPES, DTYPES)
        if grad_dtype != dtype
    ),
)

# As ``COLUMNS`` and ``UNIT`` of tiles of rows go together, by the bytes of the least element.
_COLUMNS = [1 << log for log in range(8)]
_TILES = {
    size: [*product(_COLUMNS, [1]), *((each, 16 // size) for each in _COLUMNS if each * size >= 16)]
    for size in (2, 4, 8)
}
# Whether there is one mean square for a row, whether state decays, and whether races are counted.
_OF_ROWS = list(product(_SWITCHES, repeat=3))


def _for_rows(form: Form, seed: int) -> Form:
    """The kernel of rows in a form, in one of the tiles that it may have."""
    dtypes = (form.dtype, form.grad_dtype or form.dtype)
    tiles = _TILES[min({"float64": 8, "float32": 4}.get(each, 2) for each in dtypes)]
    tiles = [tile for tile in tiles if tile[0] <= 32 or not form.rowwise]
    columns, unit = tiles[seed % len(tiles)]
    return form._replace(kernel="row_rmsprop_kernel", columns=columns, unit=unit)


def _row_forms() -> Iterator[Form]:
    """Each switch of the update with each other, then some of them with what is mixed."""
    plain = [form for form in FORMS if form.kernel == _UPDATES[0] and not any(form[7:])]
    mixed = [form for form in MIXED_FORMS if form.kernel == _UPDATES[0]]
    chosen = [
        *product(plain, _OF_ROWS[::2]),
        *((form, _OF_ROWS[(index + by) % 8]) for index, form in enumerate(mixed) for by in (0, 3)),
    ]
    for index, (form, (rowwise, lazy, counted)) in enumerate(chosen):
        if not (rowwise and form.centered) and not (lazy and form.momentum):
            switched = form._replace(rowwise=rowwise, lazy=lazy, counted=counted)
            yield _for_rows(switched, 5 * index)


def _locked_forms() -> Iterator[Form]:
    """Each dtype with all that an update of lanes may have, or with little, and in each tile."""
    for dtype, full, columns, counted in product(DTYPES, _SWITCHES, (32, 128), _SWITCHES):
        least = {"float64": 8, "float32": 4}.get(dtype, 2)
        yield Form(
            *("row_rmsprop_kernel", dtype, not full, full, full, full),
            checked=True,
            counted=counted,
            columns=columns,
            unit=16 // least if full == counted else 1,
            locked=True,
        )


#: The kernel of rows, of which not every switch is combined with every other, nor with every tile.
ROW_FORMS = tuple(dict.fromkeys([*_row_forms(), *_locked_forms()]))

#: What lanes ask of rows besides: whether they are in their table, and copies.
ACCESS_FORMS = (
    Form("row_range_kernel", "int64"),
    *(
        Form("row_copy_kernel", dtype, columns=columns, unit=unit, locked=locked)
        for dtype, locked in product(DTYPES, _SWITCHES)
        for columns, unit in _TILES[{"float64": 8, "float32": 4}.get(dtype, 2)]
        if columns >= 32 or not locked
    ),
)


class Compiled(NamedTuple):
    """A kernel that is ready to be launched on the machine.

    Attributes:
        form: What it was compiled for.
        target: For which device.
        block: How many elements a block of threads takes; of rows, how many positions.
        program: It.
        shared: How many bytes of shared memory a block of threads has.
    """

    form: Form
    target: int
    block: int
    program: Program
    shared: int


def compile_forms(
    wanted: Iterable[tuple[int, Form]],
    folder: Path | None = None,
    edit: Callable[[str], str] = str,
) -> dict[tuple[int, Form], Compiled]:
    """Compiles forms, in a process of its own.

    Args:
        wanted: For which device, of ``TARGETS``, and which form.
        folder: Where ``hogstream`` is imported from, if it is a copy.
        edit: Makes of their PTX what is run.

    Raises:
        RuntimeError: If one does not compile.
        ptx_machine.PtxError: If the machine does not know what comes out.
    """
    wanted = list(wanted)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [folder, Path(__file__).parent, environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(str(each) for each in paths if each)
    environment |= {"PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(wanted),
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"kernels do not compile: {done.stderr[-1000:]}")
    compiled = {}
    for (target, form), line in zip(wanted, done.stdout.splitlines(), strict=True):
        code = json.loads(line)
        (kernel,) = parse(edit(code["ptx"])).kernels.values()
        compiled[target, form] = Compiled(
            form, target, code["block"], Program(kernel), code["shared"]
        )
    return compiled


def _compile(target: int, form: Form) -> dict[str, Any]:
    """One kernel, compiled as it is for a launch."""
    import torch

    from hogstream.kernels.backends import triton_kernels, triton_row_access, triton_row_kernels
    from hogstream.kernels.backends.triton_compile import compile_for, cuda_target
    from hogstream.kernels.backends.triton_launch import BLOCK, EXPONENTS, STORAGE
    from hogstream.kernels.backends.triton_rows import tile_rows

    dtype = getattr(torch, form.dtype)
    grad_dtype = getattr(torch, form.grad_dtype or form.dtype)
    bits, exponent = EXPONENTS.get(grad_dtype, (None, 0))
    block = 1 if form.locked or dtype not in BLOCK else BLOCK[dtype]
    if form.columns and not form.locked:
        block = tile_rows(dtype, form.columns, form.unit)
    constants = {
        **{name.upper(): value for name, value in form._asdict().items()},
        "STORAGE": STORAGE.get(dtype),
        "GRAD_STORAGE": STORAGE.get(grad_dtype),
        "BITS": bits,
        "EXPONENT": exponent,
        "ROWS" if form.columns else "BLOCK": block,
    }
    modules = triton_kernels, triton_row_kernels, triton_row_access
    kernel = next(getattr(each, form.kernel) for each in modules if hasattr(each, form.kernel))
    compiled = compile_for(kernel, constants, cuda_target(target))
    return {"ptx": compiled.asm["ptx"], "shared": compiled.metadata.shared, "block": block}


def _compile_one(task: tuple[int, Form]) -> dict[str, Any]:
    return _compile(*task)


def main() -> None:
    """Compiles what standard input names, in as many processes as there are cores."""
    import hogstream.kernels.backends.triton_launch  # noqa: F401 - before processes are forked
    from hogstream.kernels.backends.triton_cache import ensure_folder

    ensure_folder()
    tasks = [(target, Form(*form)) for target, form in json.load(sys.stdin)]
    processes = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for line in pool.imap(_compile_one, tasks):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
