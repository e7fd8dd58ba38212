"""What training of word vectors came to, as a table and in words."""

from __future__ import annotations

from hogstream.profiling.report.rows import Table, machine_text, range_text, spread_texts
from hogstream.profiling.results.embedding_schema import Embedding
from hogstream.profiling.results.gains import CONTENDER
from hogstream.profiling.wording import counted, number_text


def table(result: Embedding) -> Table:
    """How fast each was, and how good it became."""
    columns = (
        *("trained by", "workers", "words per s", "95 % interval", "speedup"),
        *("loss held out", "staleness"),
    )
    rows = [
        (
            run.name,
            str(run.workers),
            *spread_texts(run.words_per_second, 0),
            number_text(None if run.speedup is None else run.speedup.median, 2, "x"),
            number_text(run.loss.median, 4),
            number_text(run.staleness, 2),
        )
        for run in result.results
    ]
    return Table("Words embedded", columns, rows, 1, 1)


def said(result: Embedding) -> list[str]:
    """What lock-free gains, and how all was compared."""
    settings = result.settings
    sentences = []
    for run in result.results:
        if run.name == CONTENDER and run.gains:
            gains = ", ".join(
                f"{gain.median:.2f} of {name} (95 %: {range_text(gain.estimate, 2)})"
                for name, gain in run.gains.items()
            )
            sentences.append(
                f"Lock-free with {counted(run.workers, 'worker')}, in multiples of the words per s "
                f"with as many: {gains}."
            )
    sentences.append(
        f"Measured on {machine_text(result)}: {settings.data}, {settings.words:,} words, "
        f"{settings.vocabulary:,} different ones; {counted(settings.epochs, 'epoch')}, "
        f"{counted(settings.rounds, 'round')}, tables of {settings.width} columns, a window of "
        f"{settings.window}, {counted(settings.negative, 'word')} of noise for each pair. The loss "
        f"is that of {settings.held_out:,} pairs that are held out, the same for all."
    )
    return [*sentences, *result.warnings]
