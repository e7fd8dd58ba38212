"""What results say, in words: what stands behind the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hogstream.profiling.ceilings.machine import ceiling_warnings
from hogstream.profiling.measure.peers import HOGSTREAM, HOGSTREAM_FLAT, MEMORY
from hogstream.profiling.report.rows import (
    lost_text,
    machine_text,
    range_text,
    results_by_shape,
    share_text,
    target_text,
)
from hogstream.profiling.results.confidence import Interval
from hogstream.profiling.results.diff import FASTER, SLOWER, UNKNOWN, Diff, false_alarms
from hogstream.profiling.results.files import Reported
from hogstream.profiling.results.gains import (
    ALONE,
    BY_HAND,
    CONTENDER,
    Gain,
    contender_of,
    fastest_today,
    gains_by_place,
    greatest_gain,
    shares_alone,
    stronger_of,
    strongest_other,
)
from hogstream.profiling.results.records import Measurement
from hogstream.profiling.results.schema import Bench, BenchRun, Compare, PeerTime, Run, Train
from hogstream.profiling.wording import counted, number_text, size_name

# What a change of code is expected to change: it makes no difference of machine or settings.
_SUBJECT = ("commit", "hogstream")
_MACHINE_DRIFT = 1.1


def headline(bench: Bench) -> str | None:
    """What lock-free gains at best, and what over what people run today; None if nothing tells."""
    best = greatest_gain(bench)
    if best is None:
        return None
    run, gain = best
    sure = "" if gain.ratio.low > 1 else ", which may be noise"
    said = (
        f"At best lock-free makes {_times(gain.ratio)} the updates/s of "
        f"{_stronger(bench.results, gain)} with {where_text(run)}{sure}"
    )
    today = fastest_today(bench, run.elements, run.workers)
    if today is None or today.lock_free_ratio is None:
        return f"{said}."
    times = _times(today.lock_free_ratio.estimate)
    return f"{said}, and {times} those of the fastest of what people run today, {today.name}."


def _times(ratio: Interval) -> str:
    interval = "" if ratio.bounds is None else f" (95 %: {range_text(ratio, 2)})"
    return f"{ratio.median:.2f} times{interval}"


def verdict(bench: Bench) -> list[str]:
    """Where lock-free's gain ends, what it costs where it is greatest, and what bounds it."""
    best = greatest_gain(bench)
    if best is None:
        return []
    run, gain = best
    sure = "" if gain.ratio.low > 1 else ", which may be noise"
    value = f"{gain.ratio.median:.2f}x (95 %: {range_text(gain.ratio, 2)})"
    said = [
        f"The greatest gain of {CONTENDER} over {_stronger(bench.results, gain)} is {value} with "
        f"{where_text(run)}{sure}."
    ]
    if len({each.elements for each in bench.results}) > 1:
        said += gains(bench)
    told = shares_text(run)
    said.append(_cost(run))
    if told is not None:
        said.append(f"With {where_text(run)} it takes {told}.")
    return said


def _stronger(runs: Sequence[Run], gain: Gain) -> str:
    """What a gain is over; if it is the stronger of two, that too."""
    over = stronger_of(runs)
    return over if over == gain.over else f"{gain.over} ({over})"


def gains(bench: Bench) -> list[str]:
    """Up to which size lock-free gains, if it was compared, and what one update moves beyond."""
    grid = gains_by_place(bench.results)
    if not grid:
        return []
    return [_where_it_gains(stronger_of(bench.results), grid, shares_alone(bench))]


def _where_it_gains(
    baseline: str, grid: dict[tuple[int, int], Gain], alone: dict[int, float]
) -> str:
    counts = Counter(elements for elements, _ in grid)
    sizes = sorted(size for size in counts if counts[size] == max(counts.values()))  # not in part
    gaining = [elements for elements in sizes if _gains_at(elements, grid)]
    if not gaining:
        return f"Lock-free clearly gains over {baseline}, with most worker counts, at no size."
    last = gaining[-1]
    best, workers = max(
        (key for key in grid if key[0] in gaining), key=lambda k: grid[k].ratio.median
    )
    said = (
        f"Lock-free clearly gains over {baseline}, with most worker counts, up to "
        f"{size_name(last)} elements; the most, {grid[best, workers].ratio.median:.2f}x, with "
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


def _gains_at(elements: int, grid: dict[tuple[int, int], Gain]) -> bool:
    """Whether lock-free is faster beyond noise with more than half of the worker counts."""
    here = [gain.ratio.low > 1 for (size, _), gain in grid.items() if size == elements]
    return 2 * sum(here) > len(here)


def _cost(run: Run) -> str:
    said = (
        f"It costs staleness: with {where_text(run)}, {number_text(run.staleness.mean, 1)} updates "
        f"on average and {number_text(run.staleness.max)} at most landed between a read and the "
        "update made from it"
    )
    lost = run.lost_updates_fraction
    if lost is None:
        return f"{said}; lost updates were not counted (hogstream bench --telemetry counts them)."
    return f"{said}, and {lost_text(lost)} of the updates were lost, block by block."


def of_bench(bench: Bench) -> list[str]:
    """What a bench says, in words."""
    said = [*filter(None, [headline(bench)])]
    said.append(" ".join([f"Measured on {machine_text(bench)}.", *_memory_sentences(bench)]))
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
    said += _today_sentences(bench)
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
        f"Beyond the caches a copy moves {number_text(copy.median, 1)} GB/s, and the traffic of an "
        f"update {number_text(update.median, 1)} GB/s."
    ]


def _gains_by_size(bench: Bench) -> list[str]:
    said, over = [], stronger_of(bench.results)
    grid = gains_by_place(bench.results)
    for elements in dict.fromkeys(size for size, _ in grid):
        told = ", ".join(
            f"{gain.ratio.median:.2f}x with {counted(workers, 'worker')} "
            f"({gain.over}; {range_text(gain.ratio, 2)})"
            for (size, workers), gain in grid.items()
            if size == elements
        )
        said.append(f"Lock-free against {over} at {size_name(elements)} elements: {told}.")
    note = (
        "In brackets: the stronger of the two, and 95 % confidence intervals, by bootstrap over "
        "rounds in which policies took turns. "
    )
    return [*said, (note if said else "") + _in_flight(bench)]


def _today_sentences(bench: Bench) -> list[str]:
    """For each size, what lock-free gains over what people run today, with the most workers."""
    said = []
    for elements in dict.fromkeys(run.elements for run in bench.today or ()):
        runs = [run for run in bench.today or () if run.elements == elements]
        most = max(run.workers for run in runs)
        told = ", ".join(
            f"{run.lock_free_ratio.median:.2f}x those of {run.name} "
            f"({range_text(run.lock_free_ratio.estimate, 2)})"
            for run in runs
            if run.workers == most and run.lock_free_ratio is not None
        )
        if told:
            where = f"{counted(most, 'worker')} at {size_name(elements)} elements"
            said.append(f"Lock-free's updates/s with {where}: {told}.")
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
        f"With {run.policy} and {where_text(run)}, worker {worker} failed: {error}."
        for run in runs
        for worker, error in run.failures.items()
    ]


def of_train(train: Train) -> list[str]:
    """Whether lock-free reached the target sooner, what it costs, and which workers failed."""
    lost = [
        f"Lost with {run.policy} of the updates, block by block: {_losses(run)}."
        for run in train.results
        if run.lost_updates_fraction is not None
    ]
    said = [training_verdict(train), *_over_by_hand(train), _evaluation(train)]
    said += _share_sentences(train.results) + lost
    return said + _failure_sentences(train.results) + train.warnings


def training_verdict(train: Train) -> str:
    """Whether lock-free reached the target sooner than the strongest other."""
    mine = contender_of(train)
    name = mine.policy[:1].upper() + mine.policy[1:]
    rounds = f"{sum(mine.reached)} of {counted(len(mine.reached), 'round')}"
    if not mine.mostly_reached:
        others = [
            f"{run.policy} in {sum(run.reached)} of {len(run.reached)}"
            for run in train.results
            if run is not mine and run.mostly_reached
        ]
        beside = f"; {', '.join(others)}" if others else ""
        return f"{name} reached {target_text(train)} in {rounds} only{beside}."
    took = f"{mine.seconds_to_target.median:.2f} s (the median; in {rounds})"
    best = strongest_other(train)
    if best is None:
        return f"{name} reached {target_text(train)} after {took}, with nothing to compare it with."
    theirs = next(run for run in train.results if run.policy == best.over)
    reached = (
        f"{mine.policy} reached {target_text(train)} after {took}, and {best.over}, the strongest "
        f"other, after {theirs.seconds_to_target.median:.2f} s"
    )
    times = f"{_times(best.ratio)} as fast"
    if best.ratio.bounds is None:
        return f"Too few rounds to tell who is sooner: {reached}; that is {times}."
    if not best.ratio.excludes(1):
        return f"It makes no difference here: {reached}; that is {times}, which is within noise."
    answered = "sooner" if best.ratio.low > 1 else "later"
    return f"{name} is {answered}: {reached}; that is {times}."


def _over_by_hand(train: Train) -> list[str]:
    """What lock-free gains over what people write by hand, and over one worker alone."""
    mine, told = contender_of(train), []
    best = strongest_other(train)
    for name, what in (
        (BY_HAND, "processes by hand with torch.optim.RMSprop under a lock"),
        (ALONE, "one worker alone"),
    ):
        if name in mine.gains and best is not None and best.over != name:  # which was told
            ratio = mine.gains[name].estimate
            noise = "" if ratio.excludes(1) else ", which may be noise"
            told.append(f"{_times(ratio)} as fast as {what}{noise}")
    if not told:
        return []
    name = mine.policy[:1].upper() + mine.policy[1:]
    return [f"{name} reached the target {'; and '.join(told)}."]


def _evaluation(train: Train) -> str:
    """How exact the times are, and what that costs."""
    every = max(run.seconds / run.evaluations for run in train.results)
    share = max(run.evaluation_share for run in train.results)
    return (
        f"While workers went on, copies of the parameters were evaluated, every {1000 * every:.0f} "
        f"ms or more often, which took {share_text(share)} of the time of a core at most: times "
        f"to the target are no more exact. Intervals are by bootstrap over rounds, in which all "
        f"took turns."
    )


def of_compare(compare: Compare) -> list[str]:
    """Which optimizer is nearest to hogstream at each shape, and whether any moves more bytes/s."""
    said = []
    for shape, results in results_by_shape(compare).items():
        if told := _nearest(rivals(results)):
            said.append(f"{shape}: {told}.")
    if said:
        said += _flat_iterations(compare)
        said.append(
            "A step comes after a backward that makes new gradients. Bytes/s count its least "
            "traffic, 20 bytes an element, and 8 more for each further mean or momentum. Noise: "
            "the 95 % interval of the ratio holds 1. Ratios in tables are of times, over those of "
            "hogstream. What memory can do is measured in a loop, in which what fits the caches "
            "stays there."
        )
    return said + compare.warnings


def _nearest(speeds: dict[str, Interval]) -> str:
    ranked = sorted(speeds, key=lambda peer: speeds[peer].median, reverse=True)
    if not ranked:
        return ""
    told = {peer: f"{peer} ({speeds[peer].median:.2f}x)" for peer in ranked}
    faster = [told[peer] for peer in ranked if speeds[peer].low > 1]
    noise = [peer for peer in ranked if not speeds[peer].excludes(1)]
    alike = [told[peer] for peer in noise if not speeds[peer].wide]
    unsure = [told[peer] for peer in noise if speeds[peer].wide]
    if faster:
        said = f"more bytes/s than hogstream: {', '.join(faster)}"
    elif unsure:
        said = "nothing is seen to move more bytes/s than hogstream"
    else:
        said = "nothing moves more bytes/s than hogstream"
    if alike:
        said += f"; as many, within noise: {', '.join(alike)}"
    if unsure:
        said += f"; too noisy to tell: {', '.join(unsure)}"
    return said if faster or noise else f"{said}; the nearest is {told[ranked[0]]}"


def _flat_iterations(compare: Compare) -> list[str]:
    """What ``flat=True`` makes of whole iterations, in which it has gradients to zero."""
    told = [
        f"{ratio.median:.2f}x at {result.shape}"
        for result in compare.results
        if result.peer == HOGSTREAM_FLAT
        and (ratio := result.iteration_against_hogstream) is not None
        and ratio.estimate.excludes(1)
    ]
    if not told:
        return []
    return [
        "Whole iterations (zero_grad, forward, backward, step) with flat=True take, where they "
        f"differ beyond noise, of those without: {', '.join(told)}."
    ]


def rivals(results: list[PeerTime]) -> dict[str, Interval]:
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


def of_diff(diff: Diff) -> list[str]:
    """What has changed, what chance alone would show, and whether like was set against like."""
    verdicts = [change.verdict for change in diff.changes]
    told = [verdict for verdict in verdicts if verdict != UNKNOWN]
    said = []
    if not verdicts:
        said.append("The two runs have no configuration in common.")
    elif not told:
        said.append("Neither faster nor slower can be told: there are too few rounds.")
    else:
        said += _change_sentences(diff, told)
    said += cautions(diff)
    for which, only in (("first", diff.only_first), ("second", diff.only_second)):
        if only:
            said.append(f"Only the {which} run has {counted(len(only), 'configuration')} of these.")
    return said


def _change_sentences(diff: Diff, told: list[str]) -> list[str]:
    faster, slower, count = told.count(FASTER), told.count(SLOWER), len(told)
    changed, chance = faster + slower, false_alarms(len(told))
    by_chance = (
        f"An interval of 95 % is wrong once in twenty: of {counted(count, 'configuration')} up to "
        f"{chance} may seem changed by chance alone"
    )
    said = []
    if not changed:
        said.append(f"Nothing changed beyond noise, of {counted(count, 'configuration')}.")
    else:
        most = next(each for each in diff.changes if each.verdict in (FASTER, SLOWER))
        assert most.speed is not None
        said += [
            f"The second run is faster beyond noise in {faster} and slower in {slower} of "
            f"{counted(count, 'configuration')}.",
            f"They differ most of all in {most.name}: {most.speed.median:.2f}x "
            f"(95 %: {most.speed.low:.2f} to {most.speed.high:.2f}).",
        ]
        by_chance += f", and {changed} {'is' if changed == 1 else 'are'} "
        by_chance += "no more than that" if changed <= chance else "more than that"
    said.append(f"{by_chance}. The verdicts are not corrected for it.")
    said.append(
        "Rounds of one run share the state of the machine. To see what two runs of the same code "
        "differ by, run it twice and take the diff of those."
    )
    return said


def cautions(diff: Diff) -> list[str]:
    """Why the two runs are not alike but for the code, if they are not."""
    said = []
    names = [name for name, _, _ in diff.differences if name not in _SUBJECT]
    if names:
        said.append(f"Like is not set against like: the runs differ in {', '.join(names)}.")
    drift = [f"{name} {ratio}" for name, _, _, ratio in diff.ceilings if _has_drifted(ratio)]
    if drift:
        said.append(
            f"The machine itself was not the same: {', '.join(drift)} of what it was in the first."
        )
    return said


def _has_drifted(ratio: str) -> bool:
    value = float(ratio.removesuffix("x"))
    return not 1 / _MACHINE_DRIFT <= value <= _MACHINE_DRIFT


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


def where_text(run: Run) -> str:
    """With how many workers, and at which size."""
    workers = counted(run.workers, "worker")
    return f"{workers} at {size_name(run.elements)} elements"
