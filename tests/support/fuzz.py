"""Runs the fuzzes from a seed on, one fuzz after the other: ``make fuzz``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from itertools import count

from fuzzing import Case, fuzz_again, try_seed

FUZZES = ["optimizer", "scheduler", "process"]

_TOLD_EVERY_SECONDS = 30
_MOST_WRONG = 10  # by then it is plain that something is


def fuzz_for(fuzz: str, first: int, runs: int | None, seconds: float) -> int:
    """Tries seeds, as many or for as long, and tells of it; how many were wrong."""
    draw: Callable[[int], Case] = import_module(f"{fuzz}_fuzz").draw
    wrong = 0
    told = time.monotonic()
    end = told + seconds if runs is None else float("inf")
    for seed in count(first):
        now = time.monotonic()
        if now > end or seed - first == runs or wrong == _MOST_WRONG:
            print(f"{fuzz}: {seed - first} seeds from {first} on, {wrong} wrong", flush=True)
            return wrong
        if now > told + _TOLD_EVERY_SECONDS:
            print(f"{fuzz}: at seed {seed}, {wrong} wrong", flush=True)
            told = now
        try:
            try_seed(draw, seed, fuzz_again(fuzz, seed))
        except AssertionError as error:
            print(f"{fuzz}, {error}", flush=True)
            wrong += 1
    raise AssertionError("seeds do not end")


def main() -> None:
    """Exits with 1 if any seed was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fuzzes", nargs="*", help=f"of {', '.join(FUZZES)}; all by default")
    parser.add_argument("--seconds", type=float, default=60, help="in all")
    parser.add_argument("--seed", type=int, default=1, help="the first of each fuzz")
    parser.add_argument("--runs", type=int, help="how many seeds of each, in place of a time")
    options = parser.parse_args()
    # Triton reads it when kernels are imported.
    os.environ["TRITON_INTERPRET"] = "1"
    fuzzes = options.fuzzes or FUZZES
    each = options.seconds / len(fuzzes)
    sys.exit(sum(fuzz_for(fuzz, options.seed, options.runs, each) for fuzz in fuzzes) > 0)


if __name__ == "__main__":
    main()
