"""What results come to: the answer, which is read first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hogstream.profiling.measure.peers import HOGSTREAM, TORCH_RMSPROP
from hogstream.profiling.report.rows import (
    fastest,
    lost_text,
    machine_text,
    range_text,
    results_by_shape,
    share_text,
)
from hogstream.profiling.report.sentences import (
    cautions,
    headline,
    of_diff,
    rivals,
    training_verdict,
    where_text,
)
from hogstream.profiling.results.confidence import Interval
from hogstream.profiling.results.diff import FASTER, SLOWER, UNKNOWN, Diff, false_alarms
from hogstream.profiling.results.files import Reported
from hogstream.profiling.results.gains import (
    ALONE,
    BASELINES,
    BY_HAND,
    CONTENDER,
    Gain,
    contender_of,
    gain_of,
    greatest_gain,
    strongest_other,
)
from hogstream.profiling.results.schema import (
    Bench,
    BenchRun,
    Compare,
    PeerTime,
    Run,
    Train,
)
from hogstream.profiling.wording import counted, number_text


@dataclass(frozen=True)
class Fact:
    """A part of an answer: what it is about, its value, and what that means."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True)
class Answer:
    """What is to be read first: which policy, by how much, at what cost, on what machine."""

    verdict: str
    facts: Sequence[Fact]


def answer(result: Reported) -> Answer:
    """What a result comes to."""
    if isinstance(result, Bench):
        return _bench_answer(result)
    if isinstance(result, Train):
        return _train_answer(result)
    return _compare_answer(result)


def _bench_answer(bench: Bench) -> Answer:
    best = greatest_gain(bench)
    if best is None:
        run = max(bench.results, key=lambda run: run.updates_per_second.median)
        speed = run.updates_per_second
        told = f"{run.policy} with {where_text(run)}; 95 %: {range_text(speed.estimate, 0)}"
        facts = [Fact("Updates/s at most", number_text(speed.median), told)]
    else:
        run, gain = best
        value, told = _gain_texts(run, gain)
        facts = [
            Fact("Gain at best", value, f"{told}, with {where_text(run)}"),
            _everywhere(bench),
        ]
    verdict = " ".join(filter(None, [headline(bench), _winners(bench)]))
    return Answer(verdict, [*facts, *_costs(run), _machine(bench)])


def _everywhere(bench: Bench) -> Fact:
    gains = [gain_of(run) for run in bench.results if run.policy == CONTENDER]
    told = [gain.ratio for gain in gains if gain is not None]
    faster, slower = sum(each.low > 1 for each in told), sum(each.high < 1 for each in told)
    return Fact(
        "Gain beyond noise",
        f"{faster} of {len(told)}",
        f"sizes and worker counts; slower beyond noise in {slower or 'none'}",
    )


def _costs(run: Run) -> list[Fact]:
    """Staleness and lost updates."""
    facts = []
    if run.staleness.mean is not None:
        most = f"versions on average, {number_text(run.staleness.max)} at most"
        value = number_text(run.staleness.mean, 1)
        facts.append(Fact("Cost: staleness", value, f"{most}; {run.policy}, {where_text(run)}"))
    lost = run.lost_updates_fraction
    if lost is None:
        facts.append(Fact("Cost: lost updates", "not counted", "--telemetry counts them"))
    else:
        told = "of the updates, block by block"
        facts.append(Fact("Cost: lost updates", lost_text(lost), told))
    return facts


def _machine(result: Reported) -> Fact:
    where = result.environment
    value = counted(where.cores, "core") if where.device == "cpu" else where.device_name
    return Fact("Machine", value, machine_text(result))


def _winners(bench: Bench) -> str:
    each = fastest(bench)
    if len({run.policy for run in bench.results}) == 1:
        return f"Only {each[0].policy} was measured: there is nothing to compare it with."
    wins = Counter(run.policy for run in each)
    clear = Counter(run.policy for run in each if _is_clear(run))
    if len(each) == 1:
        sure = "beyond noise" if clear else "though not beyond noise over every other"
        return f"{_upper(each[0].policy)} is the fastest at {where_text(each[0])}, {sure}."
    if len(wins) == 1:
        name = each[0].policy
        return (
            f"{_upper(name)} is the fastest at each of {len(each)} sizes, at "
            f"{clear[name] or 'none'} of them beyond noise over every other policy."
        )
    said = ", ".join(
        f"{name} at {count} ({clear[name] or 'none'} beyond noise over every other policy)"
        for name, count in wins.most_common()
    )
    return f"The fastest, of {len(each)} sizes: {said}."


def _is_clear(run: BenchRun) -> bool:
    """Whether it is faster beyond noise than each other policy with as many workers."""
    return bool(run.gains) and all(gain.estimate.low > 1 for gain in run.gains.values())


def _train_answer(train: Train) -> Answer:
    mine = contender_of(train)
    best, facts = strongest_other(train), []
    for name in dict.fromkeys([*([best.over] if best else []), BY_HAND, ALONE]):
        if name in mine.gains:
            ratio = mine.gains[name].estimate
            noise = "" if ratio.excludes(1) else "; it may be noise"
            told = f"95 %: {range_text(ratio, 2)}; {mine.policy} over {name}{noise}"
            facts.append(Fact(f"As fast as {name}", f"{ratio.median:.2f}x", told))
    speeds = [
        f"{run.policy} {number_text(run.updates_per_second.median)}"
        for run in train.results
        if run is not mine
    ]
    value = number_text(mine.updates_per_second.median)
    facts.append(Fact("Updates/s", value, "; ".join([mine.policy, *speeds])))
    return Answer(training_verdict(train), [*facts, *_costs(mine), _machine(train)])


def _gain_texts(run: BenchRun, gain: Gain) -> tuple[str, str]:
    """A gain, and between what: the interval, the policy, and the baseline."""
    told = f"95 %: {range_text(gain.ratio, 2)}; {run.policy} over {gain.over}"
    if any(name in run.gains for name in BASELINES if name != gain.over):
        told += " (the stronger baseline)"
    return f"{gain.ratio.median:.2f}x", told


def _compare_answer(compare: Compare) -> Answer:
    shapes = results_by_shape(compare)
    others = {shape: speeds for shape, each in shapes.items() if (speeds := rivals(each))}
    if not others:
        verdict = "There is nothing to compare: hogstream or all others were not measured."
        return Answer(verdict, [_machine(compare)])
    unbeaten = sum(all(speed.low <= 1 for speed in each.values()) for each in others.values())
    first = sum(all(speed.high < 1 for speed in each.values()) for each in others.values())
    verdict = (
        f"hogstream moves the most bytes/s, or as many within noise, at {unbeaten} of "
        f"{counted(len(others), 'shape')}; it is ahead of all others beyond noise at {first}."
    )
    largest = max(others, key=lambda shape: shapes[shape][0].elements)
    rival, speed = max(others[largest].items(), key=lambda each: each[1].median)
    ours = Interval(1 / speed.median, 1 / speed.high, 1 / speed.low) if speed.low else speed
    told = f"95 %: {range_text(ours, 2)}; bytes/s of hogstream over {rival}, the nearest other"
    facts = [Fact(f"At {largest}, the largest", f"{ours.median:.2f}x", told)]
    return Answer(
        verdict, [*facts, *_against_torch(shapes), *_share(shapes[largest]), _machine(compare)]
    )


def _against_torch(shapes: dict[str, list[PeerTime]]) -> list[Fact]:
    """What who swaps ``torch.optim.RMSprop`` for hogstream gains."""
    times = {}
    for shape, results in shapes.items():
        of_torch = [
            result.time_against_hogstream.median
            for result in results
            if result.peer in TORCH_RMSPROP and result.time_against_hogstream is not None
        ]
        if of_torch:
            times[shape] = min(of_torch)
    if not times:
        return []
    least, most = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
    value = f"{times[least]:.2f}x to {times[most]:.2f}x"
    told = "the step of the faster of loop and foreach over hogstream's"
    return [Fact("torch.optim.RMSprop", value, f"{told}; the least at {least}, the most at {most}")]


def _share(results: list[PeerTime]) -> list[Fact]:
    ours = next((each for each in results if each.peer == HOGSTREAM), None)
    if ours is None or ours.share_of_ceiling is None:
        return []
    speed = f"{ours.gigabytes_per_second:.1f} GB/s"
    told = f"of the fastest update-shaped passes over memory, in a loop, at {ours.shape}: {speed}"
    return [Fact("Of the ceiling", share_text(ours.share_of_ceiling), told)]


def diff_answer(diff: Diff, second: Reported) -> Answer:
    """What one run is against another.

    Args:
        diff: The two.
        second: The later of them.
    """
    verdicts = [change.verdict for change in diff.changes]
    faster, slower = verdicts.count(FASTER), verdicts.count(SLOWER)
    count = len(verdicts) - verdicts.count(UNKNOWN)
    told = f"{faster} faster, {slower} slower; up to {false_alarms(count)} may seem so by chance"
    facts = [Fact("Changed beyond noise", f"{faster + slower} of {count}", told)]
    for kind in (FASTER, SLOWER):  # the greatest effects come first
        most = next((change for change in diff.changes if change.verdict == kind), None)
        if most is not None and most.speed is not None:
            told = f"95 %: {range_text(most.speed, 2)}; {most.name}"
            facts.append(Fact(f"{_upper(kind)}, the most", f"{most.speed.median:.2f}x", told))
    unlike = " ".join(cautions(diff))
    alike = Fact("Like for like", "no" if unlike else "yes", unlike or "same machine and settings")
    return Answer(of_diff(diff)[0], [*facts, alike, _machine(second)])


def _upper(name: str) -> str:
    return name[:1].upper() + name[1:]
