"""What tests of updates of rows by a scheduler share: tables, rows of them, what they come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hogstream.kernels import sparse_rmsprop_
from hogstream.scheduler import SharedParameters, StreamScheduler
from hogstream.scheduler.update_state import UpdateState, kinds_of
from scheduler_testing import POLICIES

ROW_POLICIES = [*POLICIES, "row-locked"]

#: Under these no two updates are in the same row at once.
SERIAL = ["locked", "ordered", "awaited", "row-locked"]

#: Kinds of lanes, as a scheduler is asked for them.
LANES: dict[str, dict[str, Any]] = {
    "compiled": {"backend": "numba"},
    "inline": {"backend": "numba", "own_process": True},
    "python": {"backend": "numpy"},
}

#: Of widths that no vector has, one with three axes and one with one; the last is no table.
SHAPES = {"items": (40, 5), "empty": (4, 0), "cubes": (6, 3, 11), "biases": (30,), "scalar": ()}
TABLES = [name for name, shape in SHAPES.items() if shape]

#: Rows of tables by name, and their gradients.
Rows = dict[str, tuple[torch.Tensor, torch.Tensor]]

#: Hyperparameters of updates, by what is special about them.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    "centered": {"centered": True, "eps": 0.01, "eps_inside_sqrt": False},
    "both": {
        "centered": True,
        "momentum": 0.5,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
    },
}

#: How updates go to lanes that take several at once.
WAYS: dict[str, dict[str, Any]] = {
    "deep": {"depth": 4},
    "batches": {"depth": 4, "batch": 3},
    "batches of lanes": {"depth": 2, "batch": 2, "batch_of": "lanes"},
    "watched": {"telemetry": True, "on_nonfinite": "skip", "staleness_aware": True},
    "snapshots": {"read": "snapshot"},
    "state of each": {"state": "per-worker"},
}


def make_shared(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> SharedParameters:
    """Tables of ordinary numbers."""
    generator = torch.Generator().manual_seed(7)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return SharedParameters({name: each.to(device, dtype) for name, each in made.items()})


def make_rows(seed: int, dtype: torch.dtype = torch.float32) -> Rows:
    """Rows of all tables in any order, some of them several times; of one kind as int32."""
    generator = torch.Generator().manual_seed(seed)
    made: Rows = {}
    for name in TABLES:
        rows = torch.randint(SHAPES[name][0], (9,), generator=generator)
        grads = torch.randn(9, math.prod(SHAPES[name][1:]), generator=generator)
        made[name] = rows.to(torch.int32) if name == "cubes" else rows, grads.to(dtype)
    return made


def ones(
    rows: Sequence[int], width: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose gradients are 1."""
    made = torch.tensor(rows, dtype=torch.int64), torch.ones(len(rows), width)
    return made[0].to(device), made[1].to(device)


def on_device(rows: Rows, device: torch.device) -> Rows:
    """The same rows of tables there."""
    return {name: (each.to(device), grads.to(device)) for name, (each, grads) in rows.items()}


def update_in_turn(
    shared: SharedParameters, state: UpdateState, updates: Sequence[Rows], **options: Any
) -> None:
    """Updates rows by the kernel alone, one update after the other."""
    for update in updates:
        for name, (rows, grads) in update.items():
            view = shared.views[name]
            shape = len(view), grads.shape[1]
            of_table: dict[str, Any] = {
                kind: shared.views_of(each)[name].view(shape)
                for kind, each in state.named().items()
            }
            sparse_rmsprop_(view.view(shape), rows, grads, backend="numpy", **of_table, **options)


_OPTIONS = (
    *("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "lr_in_momentum"),
    *("eps_inside_sqrt", "decoupled_weight_decay", "maximize"),
)


def expected_of(
    scheduler: StreamScheduler, updates: list[Rows], dtype: torch.dtype = torch.float32
) -> SharedParameters:
    """What those updates come to by the kernel alone."""
    shared, numbers = make_shared(dtype), scheduler.hyperparameters
    kinds = kinds_of(numbers.switches)
    if scheduler.settings.state == "per-worker":
        state = shared.make_worker_state(1, kinds).map(lambda each: each[0])
    else:
        state = shared.make_state(kinds)
    options = {name: value for name, value in vars(numbers).items() if name in _OPTIONS}
    update_in_turn(shared, state, updates, **options)
    return shared


def assert_same(mine: SharedParameters, other: SharedParameters) -> None:
    """All bits of the parameters, and of the state, of one worker or of all."""
    assert torch.equal(mine.flat.cpu(), other.flat)
    states = (
        each.state if each.worker_state is None else each.worker_state for each in (mine, other)
    )
    one, two = (state.map(torch.flatten).named() for state in states)
    assert one.keys() == two.keys()
    for kind, tensor in one.items():
        assert torch.equal(tensor.cpu(), two[kind]), kind
