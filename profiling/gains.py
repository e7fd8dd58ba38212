"""What lock-free gains over the baselines at each size and worker count, and where it ends."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hogstream.profiling.console import counted, figure, size_name

Result = dict[str, Any]

CONTENDER = "lock-free"
BASELINES = ("locked", "ordered")


@dataclass(frozen=True)
class Gain:
    """Updates/s over those of something else, such as a baseline, measured in the same rounds.

    Attributes:
        ratio: Of the medians over the rounds.
        lowest: Of the rounds, each against the other in the same round.
        highest: Likewise.
    """

    ratio: float
    lowest: float
    highest: float

    @property
    def clear(self) -> bool:
        """Whether one of the two was the faster in every round; else the ratio may be noise."""
        return self.lowest > 1 or self.highest < 1

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x" if self.clear else f"({self.ratio:.2f}x)"


def compare_rounds(mine: list[float], theirs: list[float]) -> Gain | None:
    """The gain of updates/s over others of the same rounds; None if those stood still in one."""
    if min(theirs) == 0:
        return None
    ratios = [one / other for one, other in zip(mine, theirs, strict=True)]
    return Gain(statistics.median(mine) / statistics.median(theirs), min(ratios), max(ratios))


def gains_over(baseline: str, results: list[Result]) -> dict[tuple[int, int], Gain]:
    """The gain for each (elements, workers) at which lock-free and the baseline were measured.

    Args:
        baseline: Name of the policy to compare with.
        results: Those of ``hogstream bench``.
    """
    rounds = {
        (result["policy"], result["elements"], result["workers"]): result[
            "updates_per_second_of_rounds"
        ]
        for result in results
    }
    gains = {}
    for (policy, elements, workers), mine in rounds.items():
        theirs = rounds.get((baseline, elements, workers))
        if policy != CONTENDER or not theirs:
            continue
        gain = compare_rounds(mine, theirs)
        if gain is not None:
            gains[elements, workers] = gain
    return gains


def shares_alone(bench: dict[str, Any]) -> dict[int, float]:
    """For each size, the share of the update-shaped ceiling that one worker alone moves.

    Its updates follow one another down one lane: what is left is all that overlap can win.
    """
    ceiling = bench["ceilings"]["update_shaped_gigabytes_per_second"]
    return {
        result["elements"]: result["gigabytes_per_second"] / ceiling
        for result in bench["results"]
        if (result["policy"], result["workers"]) == (CONTENDER, 1)
    }


def gain_columns(bench: dict[str, Any]) -> tuple[str, ...]:
    """The columns of ``gain_rows``."""
    counts = _worker_counts(bench["results"])
    return ("elements", *(counted(count, "worker") for count in counts), "one alone, of ceiling")


def gain_rows(bench: dict[str, Any], baseline: str) -> list[tuple[str, ...]]:
    """The gain over a baseline: a row a size, a column a worker count."""
    gains, alone = gains_over(baseline, bench["results"]), shares_alone(bench)
    return [
        (
            size_name(elements),
            *(str(gains.get((elements, count), "-")) for count in _worker_counts(bench["results"])),
            share_text(alone.get(elements)),
        )
        for elements in sorted({elements for elements, _ in gains})
    ]


def gain_tables(bench: dict[str, Any]) -> dict[str, list[tuple[str, ...]]]:
    """The rows of the gain over each baseline that was measured, by title."""
    tables = {f"Lock-free over {name}": gain_rows(bench, name) for name in BASELINES}
    return {title: rows for title, rows in tables.items() if rows}


def gain_sentences(bench: dict[str, Any]) -> list[str]:
    """For each baseline, up to which size lock-free gains, and what one update moves beyond."""
    gains = {name: gains_over(name, bench["results"]) for name in BASELINES}
    alone = shares_alone(bench)
    return [_where_it_gains(name, grid, alone) for name, grid in gains.items() if grid]


def _where_it_gains(
    baseline: str, gains: dict[tuple[int, int], Gain], alone: dict[int, float]
) -> str:
    counts = Counter(elements for elements, _ in gains)
    sizes = sorted(size for size in counts if counts[size] == max(counts.values()))  # not in part
    gaining = [elements for elements in sizes if _gains_at(elements, gains)]
    if not gaining:
        return f"Lock-free clearly gains over {baseline}, with most worker counts, at no size."
    last = gaining[-1]
    best, workers = max((key for key in gains if key[0] in gaining), key=lambda k: gains[k].ratio)
    said = (
        f"Lock-free clearly gains over {baseline}, with most worker counts, up to "
        f"{size_name(last)} elements; the most, {gains[best, workers].ratio:.2f}x, with "
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


def _gains_at(elements: int, gains: dict[tuple[int, int], Gain]) -> bool:
    """Whether lock-free is faster in every round with more than half of the worker counts."""
    here = [gain.lowest > 1 for (size, _), gain in gains.items() if size == elements]
    return 2 * sum(here) > len(here)


def share_text(share: float | None) -> str:
    """A share as per cent, or a dash."""
    return figure(None if share is None else 100 * share, 0, " %")


def _worker_counts(results: list[Result]) -> list[int]:
    return sorted({result["workers"] for result in results})
