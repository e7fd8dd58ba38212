"""``hogstream embedding``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from hogstream.cli import options
from hogstream.cli.console import print_table, print_text, steps
from hogstream.cli.output import command_line, deliver
from hogstream.cli.tables import console_table
from hogstream.profiling.report import embedding as report
from hogstream.profiling.results.files import write_result
from hogstream.workloads.embedding import Corpus, read_corpus
from hogstream.workloads.embedding import measure as job
from hogstream.workloads.embedding.skip_gram import WIDTH


@click.command("embedding")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--workers",
    type=options.worker_counts,
    metavar="N,N,...",
    default="1,2",
    show_default=True,
    help="Numbers of workers, of each policy and of gensim.",
)
@options.COMPILED_POLICY
@click.option("--epochs", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--width",
    type=click.IntRange(1),
    default=WIDTH,
    show_default=True,
    help="Elements of a vector. Multiples of 16 fill cache lines.",
)
@click.option(
    "--window",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="How many words on either side a word predicts, at most.",
)
@click.option(
    "--negative",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Words of noise for each pair.",
)
@click.option(
    "--min-count",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Leave out words that occur less often.",
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@options.SEED
@options.JSON
def embedding(
    file: Path | None,
    workers: tuple[int, ...],
    policies: tuple[str, ...],
    epochs: int,
    width: int,
    window: int,
    negative: int,
    min_count: int,
    rounds: int,
    seed: int,
    json_file: Path | None,
) -> None:
    """Train vectors of words by skip-gram with negative sampling: each policy, and gensim.

    FILE is any text in UTF-8: a sentence or a paragraph a line, words with white space between.
    Gensim's word2vec trains beside the policies if it is installed.
    """
    if file is None:
        raise click.UsageError(
            "FILE is missing: any text will do, with a sentence or a paragraph a line"
        )
    task = job.Task(
        corpus=_corpus(file, min_count),
        data=file.name,
        width=width,
        window=window,
        negative=negative,
        min_count=min_count,
        epochs=epochs,
        rounds=rounds,
        seed=seed,
        workers=workers,
        policies=policies,
    )
    with steps(len(task.contenders) * rounds) as progress:
        try:
            result = job.measure(task, command_line(), progress.begin)
        except ValueError as error:
            raise click.ClickException(f"{file}: {error}") from error

    def show() -> None:
        print_table(console_table(report.table(result)))
        for sentence in report.said(result):
            print_text(sentence)

    deliver(result, show, (json_file, partial(write_result, result)))


def _corpus(file: Path, min_count: int) -> Corpus:
    """What the file holds.

    Raises:
        click.ClickException: If it cannot be read or has too few words.
    """
    try:
        return read_corpus(file, min_count)
    except OSError as error:
        raise click.ClickException(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error
