"""What results come to, in words: the answer first, then what stands behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hogstream.profiling.ceilings.machine import ceiling_warnings
from hogstream.profiling.measure.peers import HOGSTREAM, MEMORY
from hogstream.profiling.report.rows import (
    fastest,
    lost_text,
    machine_text,
    range_text,
    results_by_shape,
    share_text,
)
from hogstream.profiling.results.confidence import Interval
from hogstream.profiling.results.diff import (
    FASTER,
    SLOWER,
    UNKNOWN,
    Diff,
    cautions,
    diff_sentences,
    false_alarms,
)
from hogstream.profiling.results.files import Reported
from hogstream.profiling.results.gains import (
    BASELINES,
    CONTENDER,
    gains_over,
    over_stronger,
    shares_alone,
    training_gains,
)
from hogstream.profiling.results.records import Measurement
from hogstream.profiling.results.schema import (
    Bench,
    BenchRun,
    Compare,
    PeerTime,
    Run,
    Train,
    TrainRun,
)
from hogstream.profiling.wording import counted, number_text, size_name


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


# The answers.


def answer(result: Reported) -> Answer:
    """What a result comes to."""
    if isinstance(result, Bench):
        return _bench_answer(result)
    if isinstance(result, Train):
        return _train_answer(result)
    return _compare_answer(result)


def _bench_answer(bench: Bench) -> Answer:
    best = _greatest_gain(bench)
    if best is None:
        run = max(bench.results, key=lambda run: run.updates_per_second.median)
        speed = run.updates_per_second
        told = f"{run.policy} with {_where(run)}; 95 %: {range_text(speed.estimate, 0)}"
        facts = [Fact("Updates/s at most", number_text(speed.median), told)]
    else:
        run, baseline, gain = best
        value, told = _gain_texts(run, baseline, gain)
        facts = [
            Fact("Gain at best", value, f"{told}, with {_where(run)}"),
            _everywhere(bench),
        ]
    return Answer(_winners(bench), [*facts, *_costs(run), _machine(bench)])


def _greatest_gain(bench: Bench) -> tuple[BenchRun, str, Interval] | None:
    """Where lock-free gains most over the stronger baseline: beyond noise, if anywhere."""
    gains = [
        (run, *over)
        for run in bench.results
        if run.policy == CONTENDER and (over := over_stronger(run))
    ]
    return max(gains, key=lambda each: (each[2].low > 1, each[2].median)) if gains else None


def _everywhere(bench: Bench) -> Fact:
    gains = [over_stronger(run) for run in bench.results if run.policy == CONTENDER]
    told = [gain for _, gain in filter(None, gains)]
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
        facts.append(Fact("Cost: staleness", value, f"{most}; {run.policy}, {_where(run)}"))
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
        return f"{_upper(each[0].policy)} is the fastest at {_where(each[0])}, {sure}."
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


def _is_clear(run: BenchRun | TrainRun) -> bool:
    """Whether it is faster beyond noise than each other policy with as many workers."""
    return bool(run.gains) and all(gain.estimate.low > 1 for gain in run.gains.values())


def _train_answer(train: Train) -> Answer:
    best = min(train.results, key=lambda run: run.training_seconds.median)
    alone = len(train.results) == 1
    verdict = f"{_upper(best.policy)} trained{'' if alone else ' the soonest,'} in "
    verdict += f"{best.training_seconds.median:.1f} s (the median)"
    if alone:
        verdict += ", with nothing to compare it with"
    elif not _is_clear(best):
        verdict += ", though not beyond noise"
    mine = next((run for run in train.results if run.policy == CONTENDER), best)
    facts = []
    over = over_stronger(mine)
    if over is not None:
        value, told = _gain_texts(mine, *over)
        noise = "" if over[1].excludes(1) else "; it may be noise"
        facts.append(Fact("As fast", value, told + noise))
    return Answer(f"{verdict}.", [*facts, _learned(mine, train), *_costs(mine), _machine(train)])


def _gain_texts(run: BenchRun | TrainRun, baseline: str, gain: Interval) -> tuple[str, str]:
    """A gain, and between what: the interval, the policy, and the baseline."""
    told = f"95 %: {range_text(gain, 2)}; {run.policy} over {baseline}"
    if any(name in run.gains for name in BASELINES if name != baseline):
        told += " (the stronger baseline)"
    return f"{gain.median:.2f}x", told


def _learned(mine: TrainRun, train: Train) -> Fact:
    told = {run.policy: f"{100 * run.test_accuracy.median:.1f} %" for run in train.results}
    value = told.pop(mine.policy)
    others = [f"{policy} {accuracy}" for policy, accuracy in told.items()]
    return Fact("Test accuracy", value, "; ".join([mine.policy, *others]))


def _compare_answer(compare: Compare) -> Answer:
    shapes = results_by_shape(compare)
    rivals = {shape: speeds for shape, each in shapes.items() if (speeds := _rivals(each))}
    if not rivals:
        verdict = "There is nothing to compare: hogstream or all others were not measured."
        return Answer(verdict, [_machine(compare)])
    unbeaten = sum(all(speed.low <= 1 for speed in each.values()) for each in rivals.values())
    first = sum(all(speed.high < 1 for speed in each.values()) for each in rivals.values())
    verdict = (
        f"hogstream moves the most bytes/s, or as many within noise, at {unbeaten} of "
        f"{counted(len(rivals), 'shape')}; it is ahead of all others beyond noise at {first}."
    )
    largest = max(rivals, key=lambda shape: shapes[shape][0].elements)
    rival, speed = max(rivals[largest].items(), key=lambda each: each[1].median)
    ours = Interval(1 / speed.median, 1 / speed.high, 1 / speed.low) if speed.low else speed
    told = f"95 %: {range_text(ours, 2)}; bytes/s of hogstream over {rival}, the nearest other"
    facts = [Fact(f"At {largest}, the largest", f"{ours.median:.2f}x", told)]
    return Answer(
        verdict, [*facts, *_against_torch(shapes), *_share(shapes[largest]), _machine(compare)]
    )


def _against_torch(shapes: dict[str, list[PeerTime]]) -> list[Fact]:
    """What who swaps ``torch.optim.RMSprop`` for hogstream gains."""
    times = {
        shape: result.time_against_hogstream.median
        for shape, results in shapes.items()
        for result in results
        if result.peer == "torch-foreach" and result.time_against_hogstream is not None
    }
    if not times:
        return []
    least, most = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
    value = f"{times[least]:.2f}x to {times[most]:.2f}x"
    told = f"its step's time over hogstream's; the least at {least}, the most at {most}"
    return [Fact("torch.optim.RMSprop", value, told)]


def _share(results: list[PeerTime]) -> list[Fact]:
    ours = next((each for each in results if each.peer == HOGSTREAM), None)
    if ours is None or ours.share_of_ceiling is None:
        return []
    speed = f"{ours.gigabytes_per_second:.1f} GB/s"
    told = f"of an update-shaped pass over memory at {ours.shape}: {speed}"
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
    return Answer(diff_sentences(diff)[0], [*facts, alike, _machine(second)])


# What stands behind them.


def verdict(bench: Bench) -> list[str]:
    """Where lock-free's gain ends, what it costs where it is greatest, and what bounds it."""
    best = _greatest_gain(bench)
    if best is None:
        return []
    run, baseline, gain = best
    sure = "" if gain.low > 1 else ", which may be noise"
    said = [
        f"The greatest gain of {CONTENDER} over {baseline} is {gain.median:.2f}x "
        f"(95 %: {range_text(gain, 2)}) with {_where(run)}{sure}."
    ]
    if len({each.elements for each in bench.results}) > 1:
        said += gains(bench)
    told = shares_text(run)
    said.append(_cost(run))
    if told is not None:
        said.append(f"With {_where(run)} it takes {told}.")
    return said


def gains(bench: Bench) -> list[str]:
    """For each baseline, up to which size lock-free gains, and what one update moves beyond."""
    grids = {name: gains_over(name, bench.results) for name in BASELINES}
    alone = shares_alone(bench)
    return [_where_it_gains(name, grid, alone) for name, grid in grids.items() if grid]


def _where_it_gains(
    baseline: str, grid: dict[tuple[int, int], Interval], alone: dict[int, float]
) -> str:
    counts = Counter(elements for elements, _ in grid)
    sizes = sorted(size for size in counts if counts[size] == max(counts.values()))  # not in part
    gaining = [elements for elements in sizes if _gains_at(elements, grid)]
    if not gaining:
        return f"Lock-free clearly gains over {baseline}, with most worker counts, at no size."
    last = gaining[-1]
    best, workers = max((key for key in grid if key[0] in gaining), key=lambda k: grid[k].median)
    said = (
        f"Lock-free clearly gains over {baseline}, with most worker counts, up to "
        f"{size_name(last)} elements; the most, {grid[best, workers].median:.2f}x, with "
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


def _gains_at(elements: int, grid: dict[tuple[int, int], Interval]) -> bool:
    """Whether lock-free is faster beyond noise with more than half of the worker counts."""
    here = [gain.low > 1 for (size, _), gain in grid.items() if size == elements]
    return 2 * sum(here) > len(here)


def _cost(run: Run) -> str:
    said = (
        f"It costs staleness: with {_where(run)}, {number_text(run.staleness.mean, 1)} updates "
        f"on average and {number_text(run.staleness.max)} at most landed between a read and the "
        "update made from it"
    )
    lost = run.lost_updates_fraction
    if lost is None:
        return f"{said}; lost updates were not counted (hogstream bench --telemetry counts them)."
    return f"{said}, and {lost_text(lost)} of the updates were lost, block by block."


def of_bench(bench: Bench) -> list[str]:
    """What a bench says, in words."""
    said = [" ".join([f"Measured on {machine_text(bench)}.", *_memory_sentences(bench)])]
    if bench.settings.sweep:  # with so many sizes, gains are told as tables
        said += [
            *gains(bench),
            "In parentheses: the difference may be noise, as the 95 % interval, by bootstrap over "
            "rounds in which policies took turns, holds 1x. One alone: what the updates of a "
            "single worker move, of the update-shaped ceiling of the level of memory that holds "
            "parameters and ms. " + _in_flight(bench),
        ]
    else:
        said += _gains_by_size(bench) + _share_sentences(bench.results)
    return (
        said
        + _lost_sentences(bench)
        + _telemetry_sentences(bench)
        + _failure_sentences(bench.results)
        + bench.warnings
    )


def _memory_sentences(bench: Bench) -> list[str]:
    """What memory can do, if it was measured."""
    memory = bench.ceilings.memory
    copy, update = memory.copy_gigabytes_per_second, memory.update_shaped_gigabytes_per_second
    if copy is None or update is None:
        return []
    return [
        f"Beyond the caches a copy moves {copy.median:.1f} GB/s, and the traffic of an update "
        f"{update.median:.1f} GB/s."
    ]


def _gains_by_size(bench: Bench) -> list[str]:
    said = []
    for elements in dict.fromkeys(run.elements for run in bench.results):
        for baseline in BASELINES:
            told = ", ".join(
                f"{gain.median:.2f}x with {counted(workers, 'worker')} ({range_text(gain, 2)})"
                for (size, workers), gain in gains_over(baseline, bench.results).items()
                if size == elements
            )
            if told:
                said.append(
                    f"Lock-free against {baseline} at {size_name(elements)} elements: {told}."
                )
    said.append(
        "In brackets: 95 % confidence intervals, by bootstrap over rounds in which policies took "
        "turns. " + _in_flight(bench)
    )
    return said


def _in_flight(bench: Bench) -> str:
    """How updates were submitted and launched."""
    settings, scheduling = bench.settings, bench.settings.scheduling
    said = ""
    if settings.processes > 1:
        said += f"Workers were spread over {settings.processes} processes. "
    said += f"Each worker had up to {counted(scheduling.depth, 'update')} in flight"
    if scheduling.batch == 1:
        return said + "."
    alone = dict.fromkeys(run.policy for run in bench.results if run.batch == 1)
    whose = "one worker" if scheduling.batch_of == "lane" else "all workers"
    said += f", launched in batches of {scheduling.batch} of {whose}"
    return said + (f"; with {' and '.join(alone)}, one by one." if alone else ".")


def shares_text(run: Run) -> str | None:
    """What a run takes of the ceilings of its machine; None if they were not measured."""
    shares = run.share_of_ceilings
    told = [
        f"{share_text(share)} of {what}"
        for share, what in (
            (shares.bandwidth, f"the bandwidth of {shares.level or 'memory'}"),
            (shares.launch_rate, "the launch rate of a lane"),
            (shares.event_loop_rate, "the turns of the event loop"),
        )
        if share is not None
    ]
    return ", ".join(told) or None


def _share_sentences(runs: Sequence[Run]) -> list[str]:
    """For each size, what the fastest lock-free run takes of the ceilings."""
    said = []
    mine = [run for run in runs if run.policy == CONTENDER and shares_text(run)]
    for elements in dict.fromkeys(run.elements for run in mine):
        best = max(
            (run for run in mine if run.elements == elements),
            key=lambda run: run.updates_per_second.median,
        )
        workers = counted(best.workers, "worker")
        said.append(f"at {size_name(elements)} elements, with {workers}, {shares_text(best)}")
    return [f"Lock-free takes, of this machine's ceilings: {'; '.join(said)}."] if said else []


def _lost_sentences(bench: Bench) -> list[str]:
    """For each size, with how many workers lock-free lost most, and how stale its updates were."""
    lost: dict[int, list[tuple[float, int, BenchRun]]] = {}
    for run in bench.results:
        if run.policy == CONTENDER and run.lost_updates_fraction is not None:
            worst = (run.lost_updates_fraction, run.workers, run)
            lost.setdefault(run.elements, []).append(worst)
    said = []
    for elements, runs in lost.items():
        _, workers, run = max(runs, key=lambda each: each[:2])
        told = f"{_losses(run)}, with {counted(workers, 'worker')}"
        said.append(f"at {size_name(elements)} elements {told}")
    if not said:
        return []
    return [f"Lost with lock-free of the updates, block by block, at most: {'; '.join(said)}."]


def _losses(run: Run) -> str:
    return (
        f"{lost_text(run.lost_updates_fraction)} (staleness: mean "
        f"{number_text(run.staleness.mean, 1)}, max {number_text(run.staleness.max)})"
    )


def _telemetry_sentences(bench: Bench) -> list[str]:
    """What telemetry takes of the updates/s, with its interval."""
    said = []
    for cost in bench.telemetry_cost or ():
        if cost.ratio is not None and cost.ratio.interval is not None:
            low, high = cost.ratio.interval
            said.append(
                f"at {size_name(cost.elements)} elements {_taken(cost.ratio.median)} % "
                f"({_taken(high)} to {_taken(low)}), with {counted(cost.workers, 'worker')}"
            )
    return [f"Telemetry costs lock-free, of its updates/s: {'; '.join(said)}."] if said else []


def _taken(ratio: float) -> str:
    return f"{100 * (1 - ratio):.1f}"


def _failure_sentences(runs: Sequence[Run]) -> list[str]:
    """Which workers failed, and why, where the others went on."""
    return [
        f"With {run.policy} and {_where(run)}, worker {worker} failed: {error}."
        for run in runs
        for worker, error in run.failures.items()
    ]


def of_train(train: Train) -> list[str]:
    """Which policy was faster, what was lost, if it was counted, and which workers failed."""
    lost = [
        f"Lost with {run.policy} of the updates, block by block: {_losses(run)}."
        for run in train.results
        if run.lost_updates_fraction is not None
    ]
    said = _training_gains(train) + _share_sentences(train.results) + lost
    return said + _failure_sentences(train.results) + train.warnings


def _training_gains(train: Train) -> list[str]:
    """How much sooner lock-free was done than the baselines, if there were rounds to tell."""
    told = [
        f"against {name} {gain.median:.2f}x ({range_text(gain, 2)})"
        for name, gain in training_gains(train).items()
        if gain.bounds is not None
    ]
    if not told:
        return []
    return [
        f"As fast is lock-free {', '.join(told)}; in brackets: 95 % confidence intervals, by "
        f"bootstrap over {train.settings.rounds} rounds, in which policies took turns."
    ]


def of_compare(compare: Compare) -> list[str]:
    """Which optimizer is nearest to hogstream at each shape, and whether any moves more bytes/s."""
    said = []
    for shape, results in results_by_shape(compare).items():
        if told := _nearest(_rivals(results)):
            said.append(f"{shape}: {told}.")
    if said:
        said.append(
            "Bytes/s count the least traffic of a step, 20 bytes an element, and for Adam and "
            "LaProp 28. Noise: the 95 % interval of the ratio holds 1. Shapes that fit the caches "
            "were measured warm."
        )
    return said + compare.warnings


def _nearest(speeds: dict[str, Interval]) -> str:
    ranked = sorted(speeds, key=lambda peer: speeds[peer].median, reverse=True)
    if not ranked:
        return ""
    told = {peer: f"{peer} ({speeds[peer].median:.2f}x)" for peer in ranked}
    faster = [told[peer] for peer in ranked if speeds[peer].low > 1]
    alike = [told[peer] for peer in ranked if not speeds[peer].excludes(1)]
    if faster:
        said = f"more bytes/s than hogstream: {', '.join(faster)}"
    else:
        said = "nothing moves more bytes/s than hogstream"
    if alike:
        return f"{said}; as many, within noise: {', '.join(alike)}"
    return said if faster else f"{said}; the nearest is {told[ranked[0]]}"


def _rivals(results: list[PeerTime]) -> dict[str, Interval]:
    """Bytes/s of the other optimizers at a shape over hogstream's, if that was measured."""
    ours = next((each for each in results if each.peer == HOGSTREAM), None)
    speeds = {}
    for result in results:
        time, name = result.time_against_hogstream, result.peer
        if ours is None or time is None or name in MEMORY or name.startswith(HOGSTREAM):
            continue
        more, slower = result.bytes_per_element / ours.bytes_per_element, time.estimate
        if slower.low:
            low, high = more / slower.high, more / slower.low
            speeds[name] = Interval(more / slower.median, low, high)
    return speeds


def warnings(result: Reported) -> list[str]:
    """What changes the answer: not that ceilings are unsure, which the answer does not rest on."""
    if isinstance(result, Compare):
        return result.warnings
    shares = [run.share_of_ceilings for run in result.results]
    besides = ceiling_warnings(result.ceilings, shares)
    return [said for said in result.warnings if said not in besides]


def interruption(result: Measurement) -> list[str]:
    """That a result is not whole, if it is not."""
    if not result.partial:
        return []
    why = "Interrupted" if result.error is None else f"Ended early, as {result.error}"
    return [f"{why}: these are only the results that there were by then."]


def _where(run: Run) -> str:
    workers = counted(run.workers, "worker")
    return f"{workers} at {size_name(run.elements)} elements"


def _upper(name: str) -> str:
    return name[:1].upper() + name[1:]
