"""Updates of rows by themselves, in tables of several sizes, against what memory can do.

This module needs Numba.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, product
from typing import NamedTuple

import numpy as np
import torch

from hogstream.kernels.backends.numba_rows import update_, update_in_pieces_
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.rows import RowUpdate, check_row_operands
from hogstream.profiling.ceilings.numba_passes import update_shaped_rows
from hogstream.profiling.environment import cache_bytes
from hogstream.profiling.results.records import PositiveSpread, Ratio
from hogstream.profiling.results.rows_schema import RowKernel
from hogstream.profiling.turns import Rate, sample_in_turn
from hogstream.scheduler.memory import allocate_zeros

#: How many rows an update touches; all of a table that has fewer.
UPDATED_ROWS = 4096
#: Bytes an element of float32: three are read, two of them written.
BYTES_PER_ELEMENT = 20
# How many rows ahead a pass without arithmetic prefetches, of which the fastest counts.
_AHEAD = (0, 8)

Call = Callable[[RowUpdate], None]


class _Place(NamedTuple):
    """What is measured in turn, and in which table.

    Attributes:
        rows: How many the table has.
        threads: How many it may run on.
        same_rows: Whether each update is of the same rows.
        ahead: How far a pass without arithmetic prefetches; None for the update.
    """

    rows: int
    threads: int
    same_rows: bool
    ahead: int | None = None


def measure_row_kernels(rows: Sequence[int], width: int, seed: int, rounds: int) -> list[RowKernel]:
    """Times an update of 4096 rows of each table, on one thread and on all, in turn.

    Args:
        rows: How many each table has. There are all at once: 8 bytes an element.
        width: Their columns.
        seed: Of rows and gradients.
        rounds: How many samples are taken of each.
    """
    threads = sorted({1, torch.get_num_threads()})
    rates: dict[_Place, Rate] = {}
    for each in rows:
        updates = _make_updates(each, width, seed)
        for count, same_rows in product(threads, (True, False)):
            # All who take turns go on from where the one before has come to.
            following = cycle(updates[:1] if same_rows else updates)
            for ahead in (None, *_AHEAD):
                call = _call(count == 1, ahead)
                place = _Place(each, count, same_rows, ahead)
                rates[place] = Rate(partial(_seconds_of, call, following), _updated(each))
    samples = sample_in_turn(rates, rounds)
    return [_kernel(place, width, min(rows), samples) for place in samples if place.ahead is None]


def _make_updates(rows: int, width: int, seed: int) -> list[RowUpdate]:
    """Of rows that no other has, until all, or so many that caches are full twice over."""
    generator = np.random.default_rng(seed)
    updated = _updated(rows)
    fill = -(-2 * cache_bytes(torch.device("cpu"))[1] // (8 * updated * width))
    count = min(rows // updated, fill)
    touched = torch.from_numpy(generator.permutation(rows)[: count * updated])
    shape, cpu = (rows, width), torch.device("cpu")
    # Where a scheduler puts them.
    param, ms = (
        allocate_zeros(each, shape, torch.float32, cpu).fill_(1) for each in ("param", "ms")
    )
    # Above 0, as passes add them to ``ms`` too.
    grads = torch.from_numpy(generator.random((updated, width), np.float32))
    return [
        RowUpdate.of(check_row_operands(param, part, grads, ms)) for part in touched.split(updated)
    ]


def _updated(rows: int) -> int:
    """How many rows of a table an update touches."""
    return min(rows, UPDATED_ROWS)


def _call(alone: bool, ahead: int | None) -> Call:
    if ahead is not None:
        return partial(update_shaped_rows, ahead=ahead, alone=alone)
    update = update_ if alone else update_in_pieces_
    return partial(update, hyperparameters=Hyperparameters())


def _seconds_of(call: Call, updates: Iterator[RowUpdate], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call(next(updates))
    return time.perf_counter() - start


def _kernel(
    place: _Place, width: int, smallest: int, samples: Mapping[_Place, list[float]]
) -> RowKernel:
    """What an update came to.

    Args:
        place: Which one.
        width: Columns of tables.
        smallest: Rows of the smallest table.
        samples: Rows/s of all.
    """
    speeds = samples[place]
    ceiling = max((samples[place._replace(ahead=ahead)] for ahead in _AHEAD), key=np.median)
    updated, gigabytes = _updated(place.rows), 1e-9 * BYTES_PER_ELEMENT * width
    over = None if place.rows == smallest else samples[place._replace(rows=smallest)]
    share = Ratio.of(speeds, ceiling)
    assert share is not None  # as no rate is 0
    return RowKernel(
        rows=place.rows,
        updated_rows=updated,
        threads=place.threads,
        same_rows=place.same_rows,
        milliseconds=PositiveSpread.of([1e3 * updated / speed for speed in speeds]),
        over_smallest=None if over is None else Ratio.of(over, speeds),
        gigabytes_per_second=PositiveSpread.of([gigabytes * speed for speed in speeds]),
        ceiling_gigabytes_per_second=PositiveSpread.of([gigabytes * speed for speed in ceiling]),
        share_of_ceiling=share,
    )
