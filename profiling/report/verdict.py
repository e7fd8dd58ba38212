"""What a run of ``hogstream bench`` comes to: the fastest policies, their gain and their cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from hogstream.profiling.report.figures import range_text
from hogstream.profiling.report.summary import lost_text, shares_text
from hogstream.profiling.results.confidence import Interval, ratio_interval
from hogstream.profiling.results.gains import BASELINES, CONTENDER, gain_sentences, share_text
from hogstream.profiling.wording import counted, number_text, size_name

Result = dict[str, Any]

SIZE_COLUMNS = (
    "elements",
    "fastest policy",
    "workers",
    "updates per s",
    "over locked",
    "95 % interval",
    "over ordered",
    "95 % interval",
    "staleness mean",
    "staleness max",
    "lost",
)


@dataclass(frozen=True)
class Headline:
    """A figure to be read first: its value, what it tells, and where."""

    value: str
    what: str
    where: str


@dataclass(frozen=True)
class Fastest:
    """The fastest of all policies and worker counts at a size.

    Attributes:
        result: Its result.
        over: Its updates/s over those of every other policy with as many workers.
    """

    result: Result
    over: dict[str, Interval | None]

    @property
    def clear(self) -> bool:
        """Whether it is faster than each of the others beyond noise."""
        return bool(self.over) and all(each and each.low > 1 for each in self.over.values())


def fastest(bench: Result) -> list[Fastest]:
    """The fastest at each size, from the smallest on."""
    found = []
    for elements in sorted({result["elements"] for result in bench["results"]}):
        here = [result for result in bench["results"] if result["elements"] == elements]
        best = max(here, key=lambda result: result["updates_per_second"])
        over = {
            other["policy"]: _over(best, other)
            for other in here
            if other["workers"] == best["workers"] and other is not best
        }
        found.append(Fastest(best, over))
    return found


def headlines(bench: Result) -> list[Headline]:
    """The figures to be read first."""
    told = []
    best = greatest_gain(bench)
    if best is not None:
        result, baseline, gain = best
        value = f"{gain.median:.2f}x"
        where = f"95 % interval: {range_text(gain, 2)}; {_where(result)}"
        told.append(Headline(value, f"{CONTENDER} over {baseline}, at best", where))
    top = max(bench["results"], key=lambda result: result["updates_per_second"])
    value = f"{top['updates_per_second']:,.0f}"
    told.append(Headline(value, f"updates/s at most, {top['policy']}", _where(top)))
    stale = top if best is None else best[0]
    if stale["staleness"]["mean"] is not None:
        lost = stale["lost_updates_fraction"]
        told.append(
            Headline(
                number_text(stale["staleness"]["mean"], 1),
                f"updates of mean staleness, {stale['policy']}",
                f"{_where(stale)}; lost: " + ("not counted" if lost is None else lost_text(lost)),
            )
        )
    ours = [kernel for kernel in bench["kernels"] if kernel["name"].startswith("hogstream")]
    if ours:
        kernel = max(ours, key=lambda kernel: kernel["gigabytes_per_second"])
        ceiling = bench["ceilings"]["update_shaped_gigabytes_per_second"]
        share = share_text(kernel["gigabytes_per_second"] / ceiling)
        where = f"{kernel['gigabytes_per_second']:.1f} GB/s at {size_name(kernel['elements'])}"
        told.append(Headline(share, "of memory's ceiling, the kernel alone", where + " elements"))
    return told


def verdict(bench: Result) -> list[str]:
    """Which policy won, by how much, at what cost, where that ends, and what bounds it."""
    said = [_winners(bench)]
    best = greatest_gain(bench)
    if best is not None:
        result, baseline, gain = best
        sure = "" if gain.low > 1 else ", which may be noise"
        said.append(
            f"The greatest gain of {CONTENDER} over {baseline} is {gain.median:.2f}x "
            f"(95 %: {range_text(gain, 2)}) with {_where(result)}{sure}."
        )
        said += gain_sentences(bench) if len({r["elements"] for r in bench["results"]}) > 1 else []
        said.append(_cost(result))
        said.append(_shares(result))
    return [sentence for sentence in said if sentence]


def greatest_gain(bench: Result) -> tuple[Result, str, Interval] | None:
    """Where lock-free gains most over the first baseline there is: beyond noise, if anywhere."""
    for baseline in BASELINES:
        by_place = {
            (result["elements"], result["workers"]): result
            for result in bench["results"]
            if result["policy"] == baseline
        }
        gains = [
            (result, baseline, gain)
            for result in bench["results"]
            if result["policy"] == CONTENDER
            and (other := by_place.get((result["elements"], result["workers"])))
            and (gain := _over(result, other))
        ]
        if gains:
            return max(gains, key=lambda each: (each[2].low > 1, each[2].median))
    return None


def size_rows(bench: Result) -> list[tuple[str, ...]]:
    """The fastest at each size in ``SIZE_COLUMNS``."""
    rows = []
    for best in fastest(bench):
        result = best.result
        over: list[str] = []
        for baseline in BASELINES:
            gain = best.over.get(baseline)
            over += ["-", "-"] if gain is None else [f"{gain.median:.2f}x", range_text(gain, 2)]
        rows.append(
            (
                size_name(result["elements"]),
                result["policy"],
                str(result["workers"]),
                number_text(result["updates_per_second"]),
                *over,
                number_text(result["staleness"]["mean"], 1),
                number_text(result["staleness"]["max"]),
                lost_text(result["lost_updates_fraction"]),
            )
        )
    return rows


def _winners(bench: Result) -> str:
    each = fastest(bench)
    if len({result["policy"] for result in bench["results"]}) == 1:
        return f"Only {each[0].result['policy']} was measured: there is nothing to compare it with."
    wins = Counter(best.result["policy"] for best in each)
    clear = Counter(best.result["policy"] for best in each if best.clear)
    if len(each) == 1:
        name = each[0].result["policy"]
        sure = "beyond noise" if clear else "though not beyond noise over every other"
        return f"{_upper(name)} is the fastest at {_where(each[0].result)}, {sure}."
    if len(wins) == 1:
        name = each[0].result["policy"]
        return (
            f"{_upper(name)} is the fastest at each of {len(each)} sizes, at "
            f"{clear[name] or 'none'} of them beyond noise over every other policy."
        )
    said = ", ".join(
        f"{name} at {count} ({clear[name] or 'none'} beyond noise over every other policy)"
        for name, count in wins.most_common()
    )
    return f"The fastest, of {len(each)} sizes: {said}."


def _cost(result: Result) -> str:
    staleness = result["staleness"]
    said = (
        f"It costs staleness: with {_where(result)}, {number_text(staleness['mean'], 1)} updates "
        f"on average and {number_text(staleness['max'])} at most landed between a read and the "
        "update made from it"
    )
    lost = result["lost_updates_fraction"]
    if lost is None:
        return f"{said}; lost updates were not counted (hogstream bench --telemetry counts them)."
    return f"{said}, and {lost_text(lost)} of the updates were lost, block by block."


def _shares(result: Result) -> str:
    told = shares_text(result)
    if told is None:
        return "How near that is to the ceilings of this machine was not measured."
    return f"With {_where(result)} it takes {told}."


def _over(mine: Result, theirs: Result) -> Interval | None:
    rounds = "updates_per_second_of_rounds"
    return ratio_interval(mine[rounds], theirs[rounds], paired=True)


def _where(result: Result) -> str:
    workers = counted(result["workers"], "worker")
    return f"{workers} at {size_name(result['elements'])} elements"


def _upper(name: str) -> str:
    return name[:1].upper() + name[1:]
