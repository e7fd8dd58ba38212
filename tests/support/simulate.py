"""Simulates seeds, one after the other, until one fails: ``make simulate``."""

from __future__ import annotations

import argparse
import sys
import time

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
    seeds = parser.parse_args().seeds
    started = time.monotonic()
    for seed in seeds:
        try:
            simulate(seed)
        except AssertionError as error:
            print(error, flush=True)
            sys.exit(1)
    print(f"{len(seeds)} seeds in {time.monotonic() - started:.0f} s, none failed")


if __name__ == "__main__":
    main()
