"""Steps that Numba compiles, for tests of ``NativeWorker``; spawned processes can import them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hogstream.scheduler import NativeWorker, SharedParameters
from hogstream.scheduler.context import Worker


def factorise(parameters: Any, samples: Any, state: Any) -> Any:
    """A rating as the product of a user's and an item's factors."""
    users, items = parameters
    of_user, of_item, ratings = samples
    user, item = of_user[state.sample], of_item[state.sample]
    error = (users[user] * items[item]).sum() - ratings[state.sample]
    state.rows[0][0], state.rows[1][0] = user, item
    state.grads[0][0] = error * items[item]
    state.grads[1][0] = error * users[user]
    return error * error


def tick(parameters: Any, samples: Any, state: Any) -> Any:
    """A gradient of 1 for the row of a sample: with ``COUNTING`` it becomes less by 1."""
    state.rows[0][0] = samples[0][state.sample]
    state.grads[0][0] = 1.0
    return 1.0


def several(parameters: Any, samples: Any, state: Any) -> Any:
    """The rows of a sample, of which some are alike or none, with gradients that differ."""
    rows, grads = samples
    state.rows[0][:] = rows[state.sample]
    state.grads[0][:] = grads[state.sample]
    return 0.0


def fail_at_3(parameters: Any, samples: Any, state: Any) -> Any:
    """Raises at the sample of that number."""
    if state.sample == 3:
        raise LookupError("sample 3")
    state.rows[0][0] = state.sample
    state.grads[0][0] = 1.0
    return 1.0


def far_at_3(parameters: Any, samples: Any, state: Any) -> Any:
    """A row that is not in the table."""
    state.rows[0][0] = 99 if state.sample == 3 else state.sample
    state.grads[0][0] = 1.0
    return 1.0


def infinite_at_3(parameters: Any, samples: Any, state: Any) -> Any:
    """A gradient that is not finite."""
    state.rows[0][0] = state.sample
    state.grads[0][0] = np.inf if state.sample == 3 else 1.0
    return np.inf if state.sample == 3 else 1.0


def no_loss(parameters: Any, samples: Any, state: Any) -> Any:
    """A number that is none to minimise."""
    return 1j


def in_turn(generator: np.random.Generator) -> Any:
    """The order of ten samples as they stand."""
    return np.arange(10)


def table_of(rows: int, width: int = 3, dtype: torch.dtype = torch.float32) -> SharedParameters:
    """A table of zeros, and something else that no step touches."""
    return SharedParameters(
        {"before": torch.zeros(5, dtype=dtype), "table": torch.zeros(rows, width, dtype=dtype)}
    )


def ticking(shared: SharedParameters, samples: int = 1000, **options: Any) -> NativeWorker:
    """A worker that ticks each of so many rows once an epoch."""
    return NativeWorker(shared, tick, (np.arange(samples),), {"table": 1}, **options)


def tick_in_process(shared: SharedParameters, process: int) -> Worker:
    """Makes such a worker in a process."""
    return ticking(shared, chunk=50, seed=process)
