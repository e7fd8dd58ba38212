"""What cross-validation of ratings came to, as a table and in words."""

from __future__ import annotations

from hogstream.profiling.report.rows import Table, machine_text, range_text, spread_texts
from hogstream.profiling.results.gains import ALONE, CONTENDER
from hogstream.profiling.results.movielens_schema import MovieLens, MovieLensRun
from hogstream.profiling.results.records import Ratio
from hogstream.profiling.wording import counted, number_text

_MODELS = {"mf": "biased matrix factorisation", "fm": "a factorisation machine"}


def table(result: MovieLens) -> Table:
    """How good each became, and how soon."""
    columns = (
        *("trained by", "RMSE", "95 % interval", "seconds"),
        *(f"s to {result.settings.target:g}", "95 % interval", "staleness"),
    )
    rows = [
        (
            run.name,
            number_text(run.rmse.median, 4),
            range_text(run.rmse.estimate, 3),
            number_text(run.seconds.median, 3),
            *(spread_texts(run.seconds_to_target, 3) if all(run.reached) else _not_reached(run)),
            number_text(run.staleness, 2),
        )
        for run in result.results
    ]
    return Table("Ratings factorised", columns, rows, 1)


def _not_reached(run: MovieLensRun) -> tuple[str, str]:
    return "-", f"in {sum(run.reached)} of {len(run.reached)}"


def _all_epochs(result: MovieLens, run: MovieLensRun) -> list[str]:
    """How much longer one worker alone takes for all of them."""
    alone = next((each for each in result.results if each.name == ALONE), None)
    longer = alone and Ratio.of(alone.seconds.samples, run.seconds.samples)
    if not longer:
        return []
    return [
        f"For all {counted(run.epochs, 'epoch')} one alone takes {longer.median:.2f} times as long "
        f"(95 %: {range_text(longer.estimate, 2)})."
    ]


def said(result: MovieLens) -> list[str]:
    """What lock-free gains, and how all was compared."""
    settings = result.settings
    sentences = []
    for run in result.results:
        if run.name == CONTENDER and run.gains:
            gains = ", ".join(
                f"{gain.median:.2f} times as fast as {name} (95 %: {range_text(gain.estimate, 2)})"
                for name, gain in run.gains.items()
            )
            sentences.append(f"Lock-free has reached {settings.target:g} {gains}.")
            sentences += _all_epochs(result, run)
    sentences.append(
        f"Measured on {machine_text(result)}: {settings.data}, {settings.ratings:,} ratings of "
        f"{settings.items:,} items by {settings.users:,} users, in "
        f"{counted(settings.folds, 'fold')}, {counted(settings.repeats, 'time')} each; "
        f"{_MODELS[settings.model]} of {settings.width} columns, {settings.epochs} epochs by "
        f"{counted(settings.workers, 'worker')}. Tables are copied while workers go on, and "
        f"evaluated later."
    )
    return [*sentences, *result.warnings]
