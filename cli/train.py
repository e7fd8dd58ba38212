"""``hogstream train``."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from hogstream.cli import options
from hogstream.cli.console import print_table, print_text, steps
from hogstream.cli.named import named
from hogstream.cli.output import (
    check_distinct,
    command_line,
    deliver,
    traced,
)
from hogstream.cli.pictures import plots
from hogstream.cli.scheduler_options import make_settings, policies_over, scheduling_options
from hogstream.cli.tables import console_table
from hogstream.profiling.report import rows, sentences
from hogstream.profiling.results import last
from hogstream.profiling.results.files import write_result
from hogstream.scheduler.policies import ALLOWED
from hogstream.workloads import Workload, check_workload
from hogstream.workloads import rounds as job
from hogstream.workloads.registry import WORKLOADS
from hogstream.workloads.training import Limit

_ARGUMENT = "'WORKLOAD'"


@click.command("train")
@click.argument("name", metavar="WORKLOAD")
@options.DEVICE
@options.BACKEND
@click.option(
    "--workers",
    type=click.IntRange(1, options.MAX_WORKERS),
    show_default="the workload's",
    help="How many workers.",
)
@click.option(
    "--policy",
    "policies",
    type=options.policy_or_all,
    metavar="POLICY",
    default="all",
    show_default=True,
    help=f"What an update waits for: {ALLOWED}; all runs each in turn, but for bounded "
    "and row-locked.",
)
@click.option(
    "--beside/--no-beside",
    default=True,
    show_default=True,
    help="Whether one worker alone, and processes by hand with torch.optim.RMSprop under a lock, "
    "train too.",
)
@click.option(
    "--processes",
    type=click.IntRange(1, options.MAX_WORKERS),
    show_default="the workload's",
    help="Spread workers over so many: --workers is of each. For lock-free, locked and awaited.",
)
@scheduling_options(depth="the workload's")
@click.option(
    "--updates",
    type=click.IntRange(min=1),
    show_default="any number",
    help="Give a training up after so many.",
)
@click.option(
    "--seconds",
    type=options.number_above_zero,
    show_default="the workload's",
    help="Give a training up after so many.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How many times each trains, in turn.",
)
@options.SEED
@options.JSON
@options.TRACE
@options.plot_option("loss and metric against time")
def train(
    name: str,
    device: torch.device,
    backend: str | None,
    workers: int | None,
    policies: tuple[str, ...],
    beside: bool,
    processes: int | None,
    scheduling: dict[str, Any],
    updates: int | None,
    seconds: float | None,
    rounds: int,
    seed: int,
    json_file: Path | None,
    trace: Path | None,
    plot: Path | None,
) -> None:
    """Train a model to a target: lock-free, with locks, with one worker alone, and by hand.

    WORKLOAD is digits, an MLP on scikit-learn's handwritten digits; cartpole or pong, played by
    A3C; or my_module:my_workload, a hogstream.workloads.Workload of yours. What no option says is
    as the workload has it.
    """
    check_distinct({"--json": json_file, "--trace": trace, "--plot": plot})
    workload = _workload(name)
    processes = processes or workload.processes
    policies = policies or policies_over(processes)
    resolved = options.resolve_backend(backend, device)
    settings = job.TrainSettings(
        device=device,
        backend=resolved,
        policies=policies,
        beside=beside,
        processes=processes,
        limit=Limit(updates, seconds or workload.seconds),
        rounds=rounds,
        seed=seed,
        scheduling=make_settings(
            workload.settings,
            scheduling,
            policies,
            (workers or workload.settings.workers,),
            processes,
            device,
            resolved,
        ),
    )
    contenders = settings.contenders(workload)
    if any(each.in_processes for each in contenders):
        _check_portable(workload)
    with traced(trace) as timeline, steps(len(contenders) * rounds) as progress:
        result = job.train(workload, settings, command_line(), progress.begin, timeline)
    last.keep(result)

    def show() -> None:
        print_table(console_table(rows.training(result)))
        for sentence in sentences.of_train(result):
            print_text(sentence)

    deliver(
        result,
        show,
        (json_file, partial(write_result, result)),
        (trace, None if timeline is None else timeline.write),
        (plot, lambda path: plots().write_training(result, path)),
    )


def _workload(name: str) -> Workload:
    """What ``digits``, or ``MODULE:NAME``, is.

    Raises:
        click.BadParameter: If there is none, or it is something else.
    """
    if name not in WORKLOADS and ":" not in name:
        raise click.BadParameter(
            f"must be {', '.join(WORKLOADS)}, or MODULE:NAME such as my_module:my_workload, "
            f"got {name!r}",
            param_hint=_ARGUMENT,
        )
    found = named("WORKLOAD", WORKLOADS.get(name, name))
    try:
        return check_workload(found)
    except (TypeError, ValueError) as error:
        raise click.BadParameter(f"{name}: {error}", param_hint=_ARGUMENT) from error


def _check_portable(workload: Workload) -> None:
    """Checks that other processes can have it.

    Raises:
        click.BadParameter: If not.
    """
    try:
        pickle.dumps(workload)
    except Exception as error:
        raise click.BadParameter(
            f"{workload.name} must be something that can be pickled for other processes, with "
            f"functions of a module for lambdas, but is not: {error}",
            param_hint=_ARGUMENT,
        ) from error
