"""``hogstream movielens``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from hogstream.cli import options
from hogstream.cli.console import print_table, print_text, steps
from hogstream.cli.output import command_line, deliver
from hogstream.cli.tables import console_table
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.profiling.report import factorizing
from hogstream.profiling.results.files import write_result
from hogstream.scheduler import SchedulerSettings
from hogstream.workloads.movielens import LICENCE, Ratings, download_ml_100k, read_ratings
from hogstream.workloads.movielens import cross_validation as job
from hogstream.workloads.movielens.factorization import WIDTH

#: What RMSE Surprise publishes of its ``SVD`` on MovieLens-100K (https://surpriselib.com).
_TARGET = 0.934
_HYPERPARAMETERS = Hyperparameters(lr=0.005, alpha=0.999, eps=0.01, weight_decay=0.1)


@click.command("movielens")
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    show_default="MovieLens-100K, which is downloaded",
    help="Ratings: a file, or the folder, of any MovieLens data set, or RecBole's .inter.",
)
@click.option(
    "--workers", type=click.IntRange(1, options.MAX_WORKERS), default=2, show_default=True
)
@options.COMPILED_POLICY
@click.option(
    "--beside/--no-beside",
    default=True,
    show_default=True,
    help="Whether one worker alone, of mf processes with torch's sparse embeddings, and Surprise's "
    "SVD if it is installed, train too.",
)
@click.option(
    "--model",
    type=click.Choice(tuple(job.MODELS)),
    default="mf",
    show_default=True,
    help="Biased matrix factorisation, or a factorisation machine.",
)
@click.option(
    "--width",
    type=click.IntRange(2),
    default=WIDTH,
    show_default=True,
    help="Columns of a table: a bias and factors.",
)
@click.option("--epochs", type=click.IntRange(1), default=20, show_default=True)
@click.option(
    "--target",
    type=options.number_above_zero,
    metavar="RMSE",
    default=_TARGET,
    show_default=True,
    help="What is to be reached: by default what Surprise publishes of its SVD.",
)
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="How often each fold is trained, with other first values.",
)
@click.option(
    "--lr",
    type=options.number_from_zero,
    metavar="LR",
    default=_HYPERPARAMETERS.lr,
    show_default=True,
    help="Learning rate.",
)
@click.option(
    "--weight-decay",
    type=options.number_from_zero,
    metavar="DECAY",
    default=_HYPERPARAMETERS.weight_decay,
    show_default=True,
    help="Regularisation (L2).",
)
@options.SEED
@options.JSON
def movielens(
    data: Path | None,
    workers: int,
    policies: tuple[str, ...],
    beside: bool,
    model: str,
    width: int,
    epochs: int,
    target: float,
    folds: int,
    repeats: int,
    lr: float,
    weight_decay: float,
    seed: int,
    json_file: Path | None,
) -> None:
    """Factorise MovieLens' ratings by cross-validation: lock-free, with locks, alone, and Surprise.

    Without --data, MovieLens-100K is downloaded once, as part of the wheel of recbole 1.2.1.
    """
    path, ratings = _ratings(data)
    task = job.Task(
        ratings=ratings,
        data=path.name,
        model=model,
        width=width,
        epochs=epochs,
        target=target,
        folds=folds,
        repeats=repeats,
        seed=seed,
        scheduling=SchedulerSettings(
            workers=workers,
            hyperparameters=Hyperparameters(
                lr=lr,
                alpha=_HYPERPARAMETERS.alpha,
                eps=_HYPERPARAMETERS.eps,
                weight_decay=weight_decay,
            ),
        ),
        policies=policies,
        beside=beside,
    )
    with steps(len(task.contenders) * folds * repeats) as progress:
        result = job.cross_validate(task, command_line(), progress.begin)

    def show() -> None:
        print_table(console_table(factorizing.table(result)))
        for sentence in factorizing.said(result):
            print_text(sentence)

    deliver(result, show, (json_file, partial(write_result, result)))


def _ratings(data: Path | None) -> tuple[Path, Ratings]:
    """The file, and what it holds.

    Raises:
        click.ClickException: If it cannot be downloaded or read.
    """
    try:
        if data is None:
            data = download_ml_100k()
            click.echo(LICENCE, err=True)
        return data, read_ratings(data)
    except (RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
