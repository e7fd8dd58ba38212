"""Simulates seeds, one after the other, until one fails: ``make simulate``."""

from __future__ import annotations

import argparse
import sys
import time

import fuzzing
import mutations
from simulation import simulate


def seeds_of(text: str) -> range:
    """The seeds ``A:B``, B not among them, or so many from 0 on.

    Raises:
        ValueError: If the text says neither.
    """
    first, colon, end = text.partition(":")
    return range(int(first), int(end)) if colon else range(int(first))


def main() -> None:
    """Exits with 1 if a seed fails, and prints how to run it again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=seeds_of, default=range(300), help="A:B, or how many")
    parser.add_argument("--limit", type=int, default=60, help="seconds that one may take")
    parser.add_argument("--mutation", help="a fault that seeds must find, or all: one by one")
    options = parser.parse_args()
    if options.mutation is not None:
        mutations.main([] if options.mutation == "all" else [options.mutation])
    fuzzing.LIMIT_SECONDS = options.limit
    started = time.monotonic()
    for seed in options.seeds:
        try:
            simulate(seed)
        except AssertionError as error:
            print(error, flush=True)
            sys.exit(1)
    seconds = time.monotonic() - started
    print(f"{len(options.seeds)} seeds in {seconds:.0f} s, none failed")


if __name__ == "__main__":
    main()
