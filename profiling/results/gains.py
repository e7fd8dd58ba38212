"""What lock-free gains over the baselines at each size and worker count, and where it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from hogstream.profiling.results.confidence import Interval
from hogstream.profiling.results.schema import Bench, BenchRun, Ratio, Spread
from hogstream.profiling.wording import counted, number_text, size_name

CONTENDER = "lock-free"
BASELINES = ("locked", "ordered")


def gains_of(policy: str, speeds: Mapping[str, Spread]) -> dict[str, Ratio]:
    """A policy's updates/s over those of each other policy, in the same rounds.

    Args:
        policy: Its name.
        speeds: Of each policy by name, its own among them.

    Returns:
        By policy; one that stood still in a round is left out.
    """
    gains = {
        other: Ratio.of(speeds[policy].samples, speed.samples)
        for other, speed in speeds.items()
        if other != policy
    }
    return {other: gain for other, gain in gains.items() if gain is not None}


def gains_over(baseline: str, runs: Iterable[BenchRun]) -> dict[tuple[int, int], Interval]:
    """The gain for each (elements, workers) at which lock-free and the baseline were measured.

    Args:
        baseline: Name of the policy to compare with.
        runs: Those of ``hogstream bench``.
    """
    return {
        (run.elements, run.workers): run.gains[baseline].estimate
        for run in runs
        if run.policy == CONTENDER and baseline in run.gains
    }


def shares_alone(bench: Bench) -> dict[int, float]:
    """For each size, the share of the update-shaped ceiling that one worker alone moves.

    Its updates follow one another down one lane: what is left is all that overlap can win. The
    ceiling is that of the level of memory that holds the parameters and ``ms``; a size for which
    that was not measured is left out.
    """
    return {
        run.elements: run.share_of_ceilings.bandwidth
        for run in bench.results
        if (run.policy, run.workers) == (CONTENDER, 1)
        and run.share_of_ceilings.bandwidth is not None
    }


def gain_columns(bench: Bench) -> tuple[str, ...]:
    """The columns of ``gain_rows``."""
    counts = _worker_counts(bench.results)
    return ("elements", *(counted(count, "worker") for count in counts), "one alone, of ceiling")


def gain_rows(bench: Bench, baseline: str) -> list[tuple[str, ...]]:
    """The gain over a baseline: a row a size, a column a worker count."""
    gains, alone = gains_over(baseline, bench.results), shares_alone(bench)
    return [
        (
            size_name(elements),
            *(gain_text(gains.get((elements, count))) for count in _worker_counts(bench.results)),
            share_text(alone.get(elements)),
        )
        for elements in sorted({elements for elements, _ in gains})
    ]


def gain_tables(bench: Bench) -> dict[str, list[tuple[str, ...]]]:
    """The rows of the gain over each baseline that was measured, by title."""
    tables = {f"Lock-free over {name}": gain_rows(bench, name) for name in BASELINES}
    return {title: rows for title, rows in tables.items() if rows}


def gain_sentences(bench: Bench) -> list[str]:
    """For each baseline, up to which size lock-free gains, and what one update moves beyond."""
    gains = {name: gains_over(name, bench.results) for name in BASELINES}
    alone = shares_alone(bench)
    return [_where_it_gains(name, grid, alone) for name, grid in gains.items() if grid]


def _where_it_gains(
    baseline: str, gains: dict[tuple[int, int], Interval], alone: dict[int, float]
) -> str:
    counts = Counter(elements for elements, _ in gains)
    sizes = sorted(size for size in counts if counts[size] == max(counts.values()))  # not in part
    gaining = [elements for elements in sizes if _gains_at(elements, gains)]
    if not gaining:
        return f"Lock-free clearly gains over {baseline}, with most worker counts, at no size."
    last = gaining[-1]
    best, workers = max((key for key in gains if key[0] in gaining), key=lambda k: gains[k].median)
    said = (
        f"Lock-free clearly gains over {baseline}, with most worker counts, up to "
        f"{size_name(last)} elements; the most, {gains[best, workers].median:.2f}x, with "
        f"{counted(workers, 'worker')} at {size_name(best)}. "
    )
    if last == sizes[-1]:
        end, said = last, said + "That is the largest size"
    else:
        end = sizes[sizes.index(last) + 1]
        said += f"From {size_name(end)} on it does not"
    if end in alone:
        share = share_text(alone[end])
        said += f": at {size_name(end)} one update alone moves {share} of the update-shaped ceiling"
    return said + "."


def _gains_at(elements: int, gains: dict[tuple[int, int], Interval]) -> bool:
    """Whether lock-free is faster beyond noise with more than half of the worker counts."""
    here = [gain.low > 1 for (size, _), gain in gains.items() if size == elements]
    return 2 * sum(here) > len(here)


def gain_text(gain: Interval | None) -> str:
    """A gain, in parentheses if it may be noise, or a dash."""
    if gain is None:
        return "-"
    return f"{gain.median:.2f}x" if gain.excludes(1) else f"({gain.median:.2f}x)"


def share_text(share: float | None) -> str:
    """A share as per cent, never 0 if there is some, or a dash."""
    if share and share < 0.005:
        return "<1 %"
    return number_text(None if share is None else 100 * share, 0, " %")


def _worker_counts(runs: Iterable[BenchRun]) -> list[int]:
    return sorted({run.workers for run in runs})
