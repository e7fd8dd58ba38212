"""One worker's update on its way from submission to landing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.scheduler.policies import Passage


class Checked(NamedTuple):
    """A gradient that has been checked, and what it updates; holds no tensor.

    Attributes:
        table: The flat parameters, the gradient and its worker's ``ms``, as kernels take them.
        address: Of the gradient.
        ms_address: Of the ``ms``.
    """

    table: LaunchTable
    address: int
    ms_address: int


@dataclass(slots=True, eq=False)
class Update:
    """Work for a lane: an update, or a snapshot of the parameters.

    Attributes:
        worker: Index of the worker that submitted it.
        tensor: The gradient, referenced until the update has landed; or where the snapshot goes.
        checked: The gradient as lanes take it. None: this is a snapshot, and nothing changes.
        hyperparameters: The numbers and switches of the update.
        read_version: Version of the parameters that the gradient was made from.
        submitted_ns: When the worker submitted it, by ``time.perf_counter_ns``.
        after: The update that this one waits for on the device, if any.
        on_device: The lane's own mark of its landing.
        started_ns: When the lane began with it.
        landed_ns: When it landed, or failed; 0 before.
        staleness: Versions that went by between the read and the landing. Of a snapshot, the
            version that it holds at least.
        nonfinite: It was left out, because the gradient holds an infinity or NaN.
        error: Why it failed, if it did.
        passage: Its way through the policy's gate, if there is one.
    """

    worker: int
    tensor: torch.Tensor
    checked: Checked | None
    hyperparameters: Hyperparameters
    read_version: int
    submitted_ns: int
    after: Update | None = None
    on_device: Any = None
    started_ns: int = 0
    landed_ns: int = 0
    staleness: int = 0
    nonfinite: bool = False
    error: BaseException | None = None
    passage: Passage | None = None
