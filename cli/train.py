"""``hogstream train``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from hogstream.cli import options
from hogstream.cli.console import print_table, print_text, steps
from hogstream.cli.output import (
    check_distinct,
    command_line,
    deliver,
    traced,
)
from hogstream.cli.pictures import plots
from hogstream.cli.scheduler_options import (
    check_outputs_over,
    make_settings,
    policies_over,
    scheduling_options,
)
from hogstream.cli.tables import console_table
from hogstream.profiling.measure import digits as job
from hogstream.profiling.report import rows, sentences
from hogstream.profiling.results import last
from hogstream.profiling.results.files import write_result
from hogstream.scheduler.policies import ALLOWED


@click.command("digits")
@options.DEVICE
@options.BACKEND
@click.option(
    "--workers",
    type=click.IntRange(1, options.MAX_WORKERS),
    default=4,
    show_default=True,
    help="How many workers.",
)
@click.option(
    "--policy",
    "policies",
    type=options.policy_or_all,
    metavar="POLICY",
    default="lock-free",
    show_default=True,
    help=f"What an update waits for: {ALLOWED}; all runs each in turn, but for bounded.",
)
@options.PROCESSES
@scheduling_options(depth=1)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="How often each image is seen, over all workers.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How many times each policy trains, in turn.",
)
@options.SEED
@options.JSON
@options.TRACE
@options.plot_option("loss against time")
def train_digits(
    device: torch.device,
    backend: str | None,
    workers: int,
    policies: tuple[str, ...],
    processes: int,
    scheduling: dict[str, Any],
    epochs: int,
    rounds: int,
    seed: int,
    json_file: Path | None,
    trace: Path | None,
    plot: Path | None,
) -> None:
    """Train an MLP on scikit-learn's handwritten digits (1,797 images of 8 by 8)."""
    check_distinct({"--json": json_file, "--trace": trace, "--plot": plot})
    check_outputs_over(processes, {"--plot": plot})
    policies = policies or policies_over(processes)
    resolved = options.resolve_backend(backend, device)
    settings = job.TrainSettings(
        device=device,
        backend=resolved,
        processes=processes,
        epochs=epochs,
        rounds=rounds,
        seed=seed,
        scheduling=make_settings(scheduling, policies, (workers,), processes, device, resolved),
    )
    digits = job.load_digits(settings)
    with traced(trace) as timeline, steps(len(policies) * rounds * epochs) as progress:
        result = job.run_training(
            settings, policies, digits, command_line(), progress.begin, timeline
        )
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
        (plot, lambda path: plots().write_losses(result, path)),
    )
