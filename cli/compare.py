"""``hogstream compare``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import torch

from hogstream.cli import options
from hogstream.cli.console import print_table, print_text, steps
from hogstream.cli.output import (
    check_distinct,
    command_line,
    deliver,
)
from hogstream.cli.pictures import plots
from hogstream.cli.tables import console_table
from hogstream.profiling.measure import compare as job
from hogstream.profiling.measure.peers import DEFAULT_PEERS, PEERS
from hogstream.profiling.measure.shapes import MODELS, Shape
from hogstream.profiling.report import rows, sentences
from hogstream.profiling.results.files import write_result


@click.command()
@options.DEVICE
@click.option(
    "--shapes",
    type=options.shapes,
    metavar="SHAPE,...",
    help=f"What a step updates: {', '.join(MODELS)}, one tensor of N or 2^N elements, or "
    f"TxN, which is T of them.  [default: {job.DEFAULT_SHAPES}; on a GPU {job.ON_GPU_TOO} too]",
)
@click.option(
    "--peers",
    type=options.peers,
    metavar="NAME,...",
    default=",".join(DEFAULT_PEERS),
    help=f"Optimizers to measure: {', '.join(PEERS)}.  [default: all without options]",
)
@click.option(
    "--seconds",
    type=options.number_above_zero,
    metavar="SECONDS",
    default=10.0,
    show_default=True,
    help="Time to measure each shape, in seven rounds at least.",
)
@options.SEED
@options.JSON
@options.plot_option("bandwidths and a roofline")
def compare(
    device: torch.device,
    shapes: tuple[Shape, ...] | None,
    peers: tuple[str, ...],
    seconds: float,
    seed: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Measure hogstream against other optimizers.

    Each trains the same parameters: zero_grad, forward, backward, which makes new gradients, and
    the step, which is timed by itself and with all of its iteration. They take turns, in a new
    random order each round. mlp, transformer and cnn train on generated data; other shapes have a
    cheap forward, and a backward on all of torch's threads. Whatever cannot run here is listed with
    the reason. What memory can do is measured in the same rounds, in a loop, with what fits the
    caches in them.
    """
    check_distinct({"--json": json_file, "--plot": plot})
    try:
        for shape in shapes or ():
            job.check_memory(shape, peers, device)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--shapes'") from None
    settings = job.CompareSettings(
        device=device,
        backend=options.resolve_backend(None, device),
        shapes=shapes or options.shapes(job.default_shapes(device)),
        peers=peers,
        seconds=seconds,
        seed=seed,
    )
    with steps(settings.steps()) as progress:
        result = job.run_compare(settings, command_line(), progress.begin)

    def show() -> None:
        for table in rows.peers_by_shape(result):
            print_table(console_table(table))
        for sentence in sentences.of_compare(result):
            print_text(sentence)

    deliver(
        result,
        show,
        (json_file, partial(write_result, result)),
        (plot, lambda path: plots().write_compare(result, path)),
    )
