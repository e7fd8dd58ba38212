"""Options of commands that are made from the scheduler's settings."""

from __future__ import annotations

from typing import Any

import click
import torch

from hogstream.cli.scheduler_options import make_settings, scheduling_options
from hogstream.scheduler import SchedulerSettings
from hogstream.scheduler.settings import OPTIONS


def test_commands_have_an_option_for_each_setting_that_has_a_help() -> None:
    taken: dict[str, Any] = {}

    @click.command()
    @scheduling_options(depth="3")
    def command(scheduling: dict[str, Any]) -> None:
        taken.update(scheduling)

    assert {option.name for option in command.params} == {each.name for each in OPTIONS}
    command.main([], standalone_mode=False)
    assert taken == {}  # what is not given is as the command has it
    arguments = ["--batch", "5", "--state", "per-worker", "--telemetry", "--deadline", "2"]
    command.main(arguments, standalone_mode=False)
    base, device = SchedulerSettings(workers=9, depth=3, read="snapshot"), torch.device("cpu")
    made = make_settings(base, taken, ["locked", "ordered"], [2, 1], 1, device, "numba")
    assert made == SchedulerSettings(
        workers=1,
        backend="numba",
        depth=5,  # as many as a batch
        batch=5,
        read="snapshot",
        state="per-worker",
        telemetry=True,
        deadline=2.0,
    )
