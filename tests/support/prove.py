"""Executes the PTX of our kernels, and says what was shown: ``make prove``."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby, product

import torch

import kernel_mutations
from kernel_mutations import MUTATIONS, PTX_MUTATIONS
from ptx_compiling import (
    ACCESS_FORMS,
    DTYPES,
    FORMS,
    MIXED_FORMS,
    ROW_FORMS,
    TARGETS,
    Compiled,
    Form,
    compile_forms,
)
from ptx_far import check_far_offsets
from ptx_machine import PtxError
from ptx_races import UPDATES, check_race
from ptx_row_access import check_any

_DEVICES = [f"sm_{target}" for target in TARGETS]
_UNITS = {"float64": 2, "float32": 4}  # else 8
# Rows far in a table: with all that there may be, and with accesses of 128 bits.
_FAR_ROWS = [
    form
    for dtype in DTYPES
    for form in (
        Form("row_rmsprop_kernel", dtype, centered=True, lazy=True, columns=32, unit=1),
        Form("row_rmsprop_kernel", dtype, momentum=True, rowwise=True, columns=32, unit=1),
        Form("row_rmsprop_kernel", dtype, columns=128, unit=_UNITS.get(dtype, 8)),
    )
]


class Proof:
    """What is shown, and how much of it failed.

    Attributes:
        failures: What failed, in words.
    """

    def __init__(self, seeds: int) -> None:
        """Makes one that runs so many races for each dtype and device."""
        self.failures: list[str] = []
        self._seeds = seeds

    def bits(self) -> None:
        """Each form of each kernel, on each device, gives NumPy's bits."""
        _table(
            "Forms of kernels, and elements whose bits are NumPy's, or verdicts that are right",
            *("kernel", "dtype", "forms", *_DEVICES),
        )
        every = sorted([*FORMS, *MIXED_FORMS, *ROW_FORMS, *ACCESS_FORMS])
        compiled = _compile(every)
        for (kernel, dtype), group in groupby(every, lambda form: form[:2]):
            forms = list(group)
            cells = (
                self._counted([compiled[target, form] for form in forms], check_any)
                for target in TARGETS
            )
            _row(kernel.removesuffix("_kernel"), dtype, str(len(forms)), *cells)

    def far(self) -> None:
        """Offsets beyond 2^32 elements are right, aligned or not."""
        _table(
            "Tensors of more than 2^32 elements, and how many near 2^31, 2^32 and the end",
            *("kernel", *_DEVICES),
        )
        forms = [form for form in FORMS if not any(form[2:])] + _FAR_ROWS
        compiled = _compile(forms)
        for form in forms:
            cells = (self._counted([compiled[target, form]], _far) for target in TARGETS)
            _row(form.name, *cells)

    def races(self) -> None:
        """What race counters say of updates that race is the truth."""
        _table(
            f"Races of {UPDATES} updates, and updates that elements lost: counted as promised",
            *("kernel", "dtype", "races", *_DEVICES),
        )
        counting = [form for form in (*FORMS, *ROW_FORMS) if form.counted and not form.scaled]
        compiled = _compile(counting)
        for kernel, dtype in product(dict.fromkeys(form.kernel for form in counting), DTYPES):
            forms = [form for form in counting if form[:2] == (kernel, dtype)]
            cells = (self._lost([compiled[target, form] for form in forms]) for target in TARGETS)
            _row(kernel.removesuffix("_kernel"), dtype, str(self._seeds), *cells)

    def faults(self) -> None:
        """Faults that are made on purpose are found."""
        _table(
            "Faults in kernels, made on purpose, and what finds them",
            *("fault", "found by", "what it says"),
        )
        for name in [*MUTATIONS, *PTX_MUTATIONS]:
            caught = kernel_mutations.run(name)
            if caught.by is None:
                self.failures.append(f"nothing finds: {name}")
            _row(name, caught.by or "NOTHING", _brief(caught.told))

    def _counted(self, kernels: list[Compiled], check: Callable[[Compiled], int]) -> str:
        """The sum of what a check returns of each kernel."""
        return self._sum(
            {f"{each.form.name}, sm_{each.target}": partial(check, each) for each in kernels}
        )

    def _lost(self, kernels: list[Compiled]) -> str:
        """How many updates races lost, of one kernel after the other."""
        chosen = [(seed, kernels[seed % len(kernels)]) for seed in range(self._seeds)]
        return self._sum(
            {
                f"race {seed} of {each.form.name}, sm_{each.target}": partial(
                    check_race, each, seed
                )
                for seed, each in chosen
            }
        )

    def _sum(self, work: dict[str, Callable[[], int]]) -> str:
        """Does all work, in as many processes as there are cores."""
        fork, inherited = multiprocessing.get_context("fork"), list(work.values())
        with fork.Pool(initializer=_inherit, initargs=(inherited,)) as pool:
            results = pool.map(_do, range(len(work)), chunksize=1)
        failed = {name: each for name, each in zip(work, results, strict=True) if type(each) is str}
        self.failures += [f"{name}: {problem}" for name, problem in failed.items()]
        if failed:
            return f"{len(failed)} FAILED"
        return f"{sum(each for each in results if type(each) is int):,}"


# What processes of a pool have to do, which they inherit: programs that are ready to run cannot be
# sent to them.
_work: list[Callable[[], int]] = []


def _inherit(work: list[Callable[[], int]]) -> None:
    torch.set_num_threads(1)
    _work[:] = work


def _do(index: int) -> int | str:
    """What a piece of work returns, or how it fails."""
    try:
        return _work[index]()
    except (AssertionError, PtxError) as error:
        return str(error)


def _compile(forms: Iterable[Form]) -> dict[tuple[int, Form], Compiled]:
    return compile_forms(product(TARGETS, forms))


def _far(compiled: Compiled) -> int:
    aligned = check_far_offsets(compiled)
    if compiled.form.unit > 1:  # as its tables are
        return aligned
    return aligned + check_far_offsets(compiled, aligned=False)


def _table(title: str, *columns: str) -> None:
    print(f"\n{title}\n")
    _row(*columns)
    _row(*["---"] * len(columns))


def _row(*cells: str) -> None:
    print("|", " | ".join(cells), "|", flush=True)


def _brief(text: str) -> str:
    """A line of a message."""
    return " ".join(text.split())[:150].replace("|", "/")


def _parts(proof: Proof) -> Iterator[tuple[str, Callable[[], None]]]:
    for part in (proof.bits, proof.far, proof.races, proof.faults):
        yield part.__name__, part


def main() -> None:
    """Exits with 1 if anything failed, and says what."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [name for name, _ in _parts(Proof(0))]
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(names)}; else all")
    parser.add_argument("--races", type=int, default=32, help="for each dtype and device")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(names):
        parser.error(f"parts must be some of {', '.join(names)}, got {', '.join(unknown)}")
    proof, started = Proof(options.races), time.monotonic()
    for name, part in _parts(proof):
        if not options.parts or name in options.parts:
            part()
    seconds = time.monotonic() - started
    print(f"\n{len(proof.failures)} failures in {seconds:.0f} s")
    for failure in proof.failures:
        print(f"- {_brief(failure)}")
    sys.exit(bool(proof.failures))


if __name__ == "__main__":
    main()
