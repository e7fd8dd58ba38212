"""What goes down a lane: a worker's update, or a snapshot of parameters for it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.row_table import RowTable
from hogstream.scheduler.policies import Passage


class Checked:
    """A gradient that has been checked, and what it updates; of rows, it holds their tensors.

    Attributes:
        table: The flat parameters, the gradient and its worker's state, as kernels take them:
            whole, or the parts of them that are updated; or rows of some of them.
        address: Of ``table.columns``.
        memory: The bytes of the table: equal for updates of the same memory.
    """

    __slots__ = "address", "memory", "table"

    def __init__(self, table: LaunchTable | RowTable) -> None:
        """Takes the table of checked operands."""
        self.table = table
        columns: Any = table.columns
        self.address = ctypes.addressof(ctypes.c_int64.from_buffer(columns))  # the fastest way
        self.memory = columns.tobytes()


@dataclass(slots=True, eq=False)
class _OnLane:
    """What updates and snapshots have in common.

    Attributes:
        worker: Index of the worker that submitted it; its lane has the same.
        submitted_ns: When the worker submitted it, by ``time.perf_counter_ns``.
        passage: Its way through the policy's gate, if there is one.
        started_ns: When the lane began with it.
        landed_ns: When it landed, or failed; 0 before.
        error: Why it failed, if it did.
    """

    worker: int
    submitted_ns: int
    passage: Passage | None
    started_ns: int = field(default=0, init=False)
    landed_ns: int = field(default=0, init=False)
    error: BaseException | None = field(default=None, init=False)


@dataclass(slots=True, eq=False)
class Update(_OnLane):
    """One worker's update on its way from submission to delivery.

    Attributes:
        grad: What keeps the gradient alive until the update has landed.
        checked: The gradient as lanes take it.
        hyperparameters: The numbers and switches of the update.
        read_version: Version of the parameters that the gradient was made from.
        loss: What goes with it to ``on_loss``, if anything.
        staleness: Versions that went by between the read and the landing.
        nonfinite: It was left out, because the gradient holds an infinity or NaN.
    """

    grad: object
    checked: Checked
    hyperparameters: Hyperparameters
    read_version: int
    loss: float | None = None
    staleness: int = field(default=0, init=False)
    nonfinite: bool = field(default=False, init=False)


@dataclass(slots=True, eq=False)
class Snapshot(_OnLane):
    """A copy of the parameters for one worker; its lane makes it in the order of its updates.

    Attributes:
        target: Where it goes, shape (elements,), or (k, D) of some rows; referenced until it has
            landed.
        rows: Those that are copied, if not all is, with the copies in the place of gradients.
        version: Of the parameters, that it holds at least; once it has landed.
    """

    target: torch.Tensor
    rows: RowTable | None = None
    version: int = field(default=0, init=False)


Work = Update | Snapshot
