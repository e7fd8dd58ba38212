"""Our Triton kernels as PTX, in each form that a launch may ask for.

Tests have Triton interpret, so a process of its own compiles: this file, run as a program, takes a
JSON list of forms, and prints a line for each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ptx_machine import Program, parse

#: Devices that kernels are compiled for, by compute capability.
TARGETS = (80, 90, 100)
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Form(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        kernel: Its name in ``triton_kernels``.
        dtype: Of parameters and gradients.
        eps_inside_sqrt: As in ``Hyperparameters``; the kernels of verdicts have this and what
            follows at False.
        coupled: Likewise.
        lr_on_device: Whether lr is read from memory.
        checked: Whether there is a verdict.
        counted: Whether races are counted.
    """

    kernel: str
    dtype: str
    eps_inside_sqrt: bool = False
    coupled: bool = False
    lr_on_device: bool = False
    checked: bool = False
    counted: bool = False

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
        return " ".join([self.kernel.removesuffix("_kernel"), self.dtype, *switches])


_SWITCHES = (False, True)

#: All forms that there are.
FORMS = (
    *(Form("rmsprop_kernel", *form) for form in product(DTYPES, *[_SWITCHES] * 5)),
    *(Form("multi_tensor_rmsprop_kernel", *form) for form in product(DTYPES, *[_SWITCHES] * 4)),
    *(
        Form(name, dtype)
        for name in ("finite_kernel", "multi_tensor_finite_kernel")
        for dtype in DTYPES
    ),
)


class Compiled(NamedTuple):
    """A kernel that is ready to be launched on the machine.

    Attributes:
        form: What it was compiled for.
        target: For which device.
        block: How many elements a block of threads takes.
        program: It.
        shared: How many bytes of shared memory a block of threads has.
    """

    form: Form
    target: int
    block: int
    program: Program
    shared: int


def compile_forms(
    forms: Iterable[Form],
    target: int,
    folder: Path | None = None,
    edit: Callable[[str], str] = str,
) -> dict[Form, Compiled]:
    """Compiles forms for a device, in a process of its own.

    Args:
        forms: Which.
        target: One of ``TARGETS``.
        folder: Where ``hogstream`` is imported from, if it is a copy.
        edit: Makes of their PTX what is run.

    Raises:
        RuntimeError: If one does not compile.
        ptx_machine.PtxError: If the machine does not know what comes out.
    """
    wanted = list(forms)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    paths = (
        [str(Path(__file__).parent)]
        if folder is None
        else [str(folder), str(Path(__file__).parent)]
    )
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, __file__, str(target)],
        input=json.dumps(wanted), env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"cannot compile for sm_{target}: {done.stderr[-1000:]}")
    lines = map(json.loads, done.stdout.splitlines())
    compiled = {}
    for form, line in zip(wanted, lines, strict=True):
        (kernel,) = parse(edit(line["ptx"])).kernels.values()
        program = Program(kernel)
        compiled[form] = Compiled(form, target, line["block"], program, line["shared"])
    return compiled


def _compile(target: int, form: Form) -> dict[str, Any]:
    """One kernel, compiled as it is for a launch."""
    import torch

    from hogstream.kernels.backends import triton_kernels
    from hogstream.kernels.backends.triton_compile import compile_for, cuda_target
    from hogstream.kernels.backends.triton_launch import BLOCK, EXPONENTS, STORAGE

    dtype = getattr(torch, form.dtype)
    bits, exponent = EXPONENTS[dtype]
    constants = {
        **{name.upper(): value for name, value in form._asdict().items()},
        "STORAGE": STORAGE[dtype],
        "BITS": bits,
        "EXPONENT": exponent,
        "BLOCK": BLOCK[dtype],
    }
    compiled = compile_for(getattr(triton_kernels, form.kernel), constants, cuda_target(target))
    return {"ptx": compiled.asm["ptx"], "shared": compiled.metadata.shared, "block": BLOCK[dtype]}


def _compile_one(task: tuple[int, Form]) -> dict[str, Any]:
    return _compile(*task)


def main() -> None:
    """Compiles what standard input names, in as many processes as there are cores."""
    import hogstream.kernels.backends.triton_launch  # noqa: F401 - before processes are forked
    from hogstream.kernels.backends.triton_cache import ensure_folder

    ensure_folder()
    tasks = [(int(sys.argv[1]), Form(*form)) for form in json.load(sys.stdin)]
    processes = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for line in pool.imap(_compile_one, tasks):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
