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
    @scheduling_options(depth=3)
    def command(scheduling: dict[str, Any]) -> None:
        taken.update(scheduling)

    assert {option.name for option in command.params} == {each.name for each in OPTIONS}
    command.main([], standalone_mode=False)
    assert SchedulerSettings(workers=1, **taken) == SchedulerSettings(workers=1, depth=3)
    arguments = ["--batch", "5", "--state", "per-worker", "--telemetry", "--deadline", "2"]
    command.main(arguments, standalone_mode=False)
    made = make_settings(taken, ["locked", "ordered"], [2, 1], 1, torch.device("cpu"), "numba")
    assert made == SchedulerSettings(
        workers=1,
        backend="numba",
        depth=5,  # as many as a batch
        batch=5,
        state="per-worker",
        telemetry=True,
        deadline=2.0,
    )
