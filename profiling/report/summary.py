"""Results as tables and sentences: on the console, in reports and in the README."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from hogstream.cli.console import new_table
from hogstream.profiling.measure.peers import HOGSTREAM, MEMORY
from hogstream.profiling.results.confidence import FEWEST, Interval, ratio_interval
from hogstream.profiling.results.gains import (
    BASELINES,
    CONTENDER,
    gain_columns,
    gain_sentences,
    gain_tables,
    gains_over,
    share_text,
)
from hogstream.profiling.wording import counted, number_text, size_name

Result = dict[str, Any]

COLUMNS = (
    "elements",
    "workers",
    "policy",
    "updates per s",
    "GB/s",
    "p50 us",
    "p99 us",
    "staleness mean/max",
    "gain over locked",
    "gain over ordered",
)
RACE_COLUMNS = (
    "elements",
    "workers",
    "policy",
    "staleness mean",
    "staleness p99",
    "staleness max",
    "lost",
    "overwrites per update",
)
KERNEL_COLUMNS = ("kernel", "elements", "ms", "95 % interval", "GB/s", "differing bits")
TRAINING_COLUMNS = (
    "policy",
    "workers",
    "test accuracy",
    "final loss",
    "updates per s",
    "staleness mean/max",
    "seconds",
    "95 % interval",
)
LEVEL_COLUMNS = (
    "memory",
    "KiB used",
    "threads",
    "copy GB/s",
    "95 % interval",
    "update-shaped GB/s",
    "95 % interval",
)
RATE_COLUMNS = ("of the host", "per second", "95 % interval")
COMPARE_COLUMNS = (
    "optimizer",
    "ms",
    "95 % interval",
    "GB/s",
    "of ceiling",
    "launches",
    "host us",
    "time against hogstream",
)
COMPARE_README_COLUMNS = (
    "shape",
    "optimizer",
    "ms",
    "GB/s",
    "of ceiling",
    "time against hogstream",
)


def result_row(result: Result) -> tuple[str, ...]:
    """One result in ``COLUMNS``."""
    return (
        size_name(result["elements"]),
        str(result["workers"]),
        result["policy"],
        number_text(result["updates_per_second"]),
        number_text(result["gigabytes_per_second"], 1),
        number_text(result["latency_us"]["p50"]),
        number_text(result["latency_us"]["p99"]),
        _staleness(result),
        number_text(result["gain_over_locked"], 2, "x"),
        number_text(result["gain_over_ordered"], 2, "x"),
    )


def race_rows(bench: dict[str, Any]) -> list[tuple[str, ...]]:
    """All results in ``RACE_COLUMNS``, if lost updates were counted; else none."""
    return [
        (
            size_name(result["elements"]),
            str(result["workers"]),
            result["policy"],
            number_text(result["staleness"]["mean"], 1),
            number_text(result["staleness"]["p99"]),
            number_text(result["staleness"]["max"]),
            lost_text(result["lost_updates_fraction"]),
            number_text(result["overwrites_per_update"], 4),
        )
        for result in bench["results"]
        if result.get("lost_updates_fraction") is not None  # older files do not say
    ]


def kernel_row(kernel: dict[str, Any]) -> tuple[str, ...]:
    """One kernel's result in ``KERNEL_COLUMNS``."""
    return (
        kernel["name"],
        size_name(kernel["elements"]),
        number_text(kernel["milliseconds"], 2),
        _interval_text(kernel.get("milliseconds_interval"), 2),
        number_text(kernel["gigabytes_per_second"], 1),
        number_text(kernel["differing_bits"]),
    )


def results_tables(bench: dict[str, Any]) -> list[Table]:
    """All results, and what races there were if they were counted."""
    results = [result_row(result) for result in bench["results"]]
    tables = [_by_configuration("Updates", COLUMNS, results)]
    races = race_rows(bench)
    return [*tables, _by_configuration("Races", RACE_COLUMNS, races)] if races else tables


def _by_configuration(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    """A table in which the results to compare, of one size and worker count, are together."""
    table = new_table(title, *columns, text_columns=3)
    before = None
    for row in rows:
        if before is not None and before != row[:2]:
            table.add_section()
        before = row[:2]
        table.add_row(*row)
    return table


def gains_tables(bench: dict[str, Any]) -> list[Table]:
    """Lock-free's gain over each baseline, sizes against worker counts."""
    tables = []
    for title, rows in gain_tables(bench).items():
        table = new_table(title, *gain_columns(bench))
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def kernels_table(bench: dict[str, Any]) -> Table:
    """The kernels alone."""
    table = new_table("Kernels alone", *KERNEL_COLUMNS)
    for kernel in bench["kernels"]:
        table.add_row(*kernel_row(kernel))
    return table


def training_row(result: Result) -> tuple[str, ...]:
    """One policy's training in ``TRAINING_COLUMNS``."""
    return (
        result["policy"],
        str(result["workers"]),
        number_text(100 * result["test_accuracy"], 1, " %"),
        number_text(result["final_loss"], 4),
        number_text(result["updates_per_second"]),
        _staleness(result),
        number_text(
            result.get("training_seconds", result["seconds"]), 1
        ),  # older files had one round
        _interval_text(result.get("training_seconds_interval"), 1),
    )


def _interval_text(bounds: list[float] | None, digits: int) -> str:
    """Both ends of an interval; a dash where there is none, as in older files."""
    return " to ".join(number_text(end, digits) for end in bounds or ()) or "-"


def training_table(results: list[Result]) -> Table:
    """What each policy's training came to."""
    table = new_table("Training", *TRAINING_COLUMNS)
    for result in results:
        table.add_row(*training_row(result))
    return table


def training_sentences(train: dict[str, Any]) -> list[str]:
    """Which policy was faster, what was lost, if it was counted, and which workers failed."""
    results: list[Result] = train["results"]
    said = [
        f"Lost with {result['policy']} of the updates, block by block: {_losses(result)}."
        for result in results
        if result["lost_updates_fraction"] is not None
    ]
    said = _training_gains(train) + _share_sentences(results) + said
    return said + _failure_sentences(results) + warnings(train)


def _training_gains(train: dict[str, Any]) -> list[str]:
    """How much sooner lock-free was done than the baselines, if there were rounds to tell."""
    rounds = {each["policy"]: each.get("training_seconds_of_rounds") for each in train["results"]}
    mine = rounds.get(CONTENDER)
    said = []
    for baseline in BASELINES:
        theirs = rounds.get(baseline)
        if not mine or not theirs or len(mine) != len(theirs) or len(mine) < FEWEST:
            continue
        gain = ratio_interval(theirs, mine, paired=True)
        if gain is not None:
            said.append(
                f"against {baseline} {gain.median:.2f}x ({gain.low:.2f} to {gain.high:.2f})"
            )
    if not said:
        return []
    return [
        f"As fast is lock-free {', '.join(said)}; in brackets: 95 % confidence intervals, by "
        f"bootstrap over {len(mine or ())} rounds, in which policies took turns."
    ]


def level_rows(ceilings: dict[str, Any]) -> list[tuple[str, ...]]:
    """The bandwidth of each level of memory in ``LEVEL_COLUMNS``; none in older files."""
    return [
        (
            level["level"],
            number_text(level["bytes"] and level["bytes"] / 1024),
            number_text(level["threads"]),
            *_rate_cells(level["copy_gigabytes_per_second"], 1),
            *_rate_cells(level["update_shaped_gigabytes_per_second"], 1),
        )
        for level in ceilings.get("levels") or ()
    ]


def rate_rows(ceilings: dict[str, Any]) -> list[tuple[str, ...]]:
    """What the host can do in ``RATE_COLUMNS``; none in older files."""
    rates = {"launches": "launches down a lane", "event_loop_turns": "turns of the event loop"}
    return [
        (name, *_rate_cells(ceilings[f"{key}_per_second"], 0))
        for key, name in rates.items()
        if ceilings.get(f"{key}_per_second")
    ]


def _rate_cells(rate: dict[str, Any] | None, digits: int) -> tuple[str, str]:
    """Median and interval; dashes for what was not measured."""
    if rate is None:
        return "-", "-"
    return number_text(rate["median"], digits), _interval_text(rate["interval"], digits)


def compare_row(result: Result) -> tuple[str, ...]:
    """One optimizer at one shape, in ``COMPARE_COLUMNS``."""
    low, high = result["milliseconds_interval"]
    return (
        result["peer"],
        _milliseconds(result["milliseconds"]),
        f"{_milliseconds(low)} to {_milliseconds(high)}",
        number_text(result["gigabytes_per_second"], 1),
        share_text(result["share_of_ceiling"]),
        number_text(result["launches"]),
        number_text(result["host_us"]),
        number_text(result["time_against_hogstream"], 2, "x"),
    )


def compare_readme_row(result: Result) -> tuple[str, ...]:
    """One optimizer at one shape, in ``COMPARE_README_COLUMNS``."""
    name, milliseconds, _, speed, share, _, _, ratio = compare_row(result)
    return result["shape"], name, milliseconds, speed, share, ratio


def compare_tables(compare: dict[str, Any]) -> list[Table]:
    """A table for each shape, then one of what was skipped."""
    tables = []
    for shape, results in results_by_shape(compare).items():
        tensors, elements = counted(results[0]["tensors"], "tensor"), results[0]["elements"]
        table = new_table(f"{shape}: {tensors}, {elements:,} elements", *COMPARE_COLUMNS)
        for result in results:
            table.add_row(*compare_row(result))
        tables.append(table)
    if compare["skipped"]:
        table = new_table("Skipped", "", "", "", text_columns=3)
        for row in _skipped(compare):
            table.add_row(*row)
        tables.append(table)
    return tables


def compare_sentences(compare: dict[str, Any]) -> list[str]:
    """Which optimizer is nearest to hogstream at each shape, and whether any moves more bytes/s."""
    said = []
    for shape, results in results_by_shape(compare).items():
        speeds = _speeds_against_hogstream(results)
        ranked = sorted(speeds, key=lambda peer: speeds[peer].median, reverse=True)
        faster = [peer for peer in ranked if speeds[peer].low > 1]
        alike = [peer for peer in ranked if not speeds[peer].excludes(1)]
        told = {peer: f"{peer} ({speeds[peer].median:.2f}x)" for peer in ranked}
        parts = []
        if faster:
            parts.append(f"more bytes/s than hogstream: {', '.join(told[name] for name in faster)}")
        elif ranked:
            parts.append("nothing moves more bytes/s than hogstream")
        if alike:
            parts.append(f"as many, within noise: {', '.join(told[name] for name in alike)}")
        elif ranked and not faster:
            parts.append(f"the nearest is {told[ranked[0]]}")
        if parts:
            said.append(f"{shape}: {'; '.join(parts)}.")
    if said:
        said.append(
            "Bytes/s count the least traffic of a step, 20 bytes an element, and for Adam and "
            "LaProp 28. Noise: the 95 % interval of the ratio holds 1. Shapes that fit the caches "
            "were measured warm."
        )
    return said + warnings(compare)


def _speeds_against_hogstream(results: list[Result]) -> dict[str, Interval]:
    """Bytes/s of the other optimizers at a shape over hogstream's, if that was measured."""
    by_peer = {result["peer"]: result for result in results}
    ours = by_peer.get(HOGSTREAM)
    speeds = {}
    for name, result in by_peer.items():
        if ours is None or name in MEMORY or name.startswith(HOGSTREAM):
            continue
        time = ratio_interval(
            ours["milliseconds_of_rounds"], result["milliseconds_of_rounds"], paired=True
        )
        if time is not None:
            more = result["bytes_per_element"] / ours["bytes_per_element"]
            speeds[name] = Interval(more * time.median, more * time.low, more * time.high)
    return speeds


def skipped_sentences(compare: dict[str, Any]) -> list[str]:
    """What did not run, at which shapes, and why."""
    return [f"Skipped {peer} at {where}: {reason}." for peer, where, reason in _skipped(compare)]


def results_by_shape(compare: dict[str, Any]) -> dict[str, list[Result]]:
    """The results of a comparison, in order."""
    shapes: dict[str, list[Result]] = {}
    for result in compare["results"]:
        shapes.setdefault(result["shape"], []).append(result)
    return shapes


def _skipped(compare: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Peer, shapes and reason, a line for each reason."""
    skipped: dict[tuple[str, str], list[str]] = {}
    for entry in compare["skipped"]:
        skipped.setdefault((entry["peer"], entry["reason"]), []).append(entry["shape"])
    return [
        (peer, "every shape" if shapes == compare["settings"]["shapes"] else ", ".join(shapes), why)
        for (peer, why), shapes in skipped.items()
    ]


def interruption(result: dict[str, Any]) -> list[str]:
    """That a result is not whole, if it is not."""
    if not result.get("partial"):  # older files do not say
        return []
    why = f"Ended early, as {result['error']}" if result.get("error") else "Interrupted"
    return [f"{why}: these are only the results that there were by then."]


def sentences(bench: dict[str, Any]) -> list[str]:
    """What the measurement says, in words."""
    environment, ceilings = bench["environment"], bench["ceilings"]
    said = [
        f"Measured on {environment['device_name']} ({environment['device']}, "
        f"{environment['cores']} cores) with the {environment['backend']} backend. Beyond the "
        f"caches a copy moves {ceilings['copy_gigabytes_per_second']:.1f} GB/s, and the traffic of "
        f"an update {ceilings['update_shaped_gigabytes_per_second']:.1f} GB/s."
    ]
    if is_sweep(bench):
        said += _sweep_sentences(bench)
    else:
        said += _bench_sentences(bench) + _share_sentences(bench["results"])
    return (
        said
        + _lost_sentences(bench)
        + _cost_sentences(bench)
        + _failure_sentences(bench["results"])
        + warnings(bench)
    )


def warnings(result: dict[str, Any]) -> list[str]:
    """What cannot be concluded; older files do not say."""
    said: list[str] = result.get("warnings", [])
    return said


def is_sweep(bench: dict[str, Any]) -> bool:
    """Whether ``--sweep`` made it: with so many sizes, gains are told as tables."""
    return bool(bench["settings"].get("sweep"))  # older files do not say


def _bench_sentences(bench: dict[str, Any]) -> list[str]:
    said = []
    for elements in dict.fromkeys(result["elements"] for result in bench["results"]):
        for baseline in BASELINES:
            gains = _gains(bench, elements, baseline)
            if gains:
                said.append(
                    f"Lock-free against {baseline} at {size_name(elements)} elements: "
                    f"{', '.join(gains)}."
                )
    said.append(
        "In brackets: 95 % confidence intervals, by bootstrap over rounds in which policies took "
        "turns. " + _in_flight(bench)
    )
    return said


def _sweep_sentences(bench: dict[str, Any]) -> list[str]:
    return [
        *gain_sentences(bench),
        "In parentheses: the difference may be noise, as the 95 % interval, by bootstrap over "
        "rounds in which policies took turns, holds 1x. One alone: what the updates of a single "
        "worker move, of the update-shaped ceiling of the level of memory that holds parameters "
        "and ms. " + _in_flight(bench),
    ]


def _in_flight(bench: dict[str, Any]) -> str:
    """How updates were handed over."""
    settings = bench["settings"]
    processes = settings.get("processes", 1)  # older files do not say
    said = f"Workers were spread over {processes} processes. " if processes > 1 else ""
    said += f"Each worker had up to {counted(settings['depth'], 'update')} in flight"
    if settings.get("batch", 1) == 1:  # older files do not say
        return said + "."
    alone = dict.fromkeys(each["policy"] for each in bench["results"] if each["batch"] == 1)
    whose = "one worker" if settings["batch_of"] == "lane" else "all workers"
    said += f", handed over in batches of {settings['batch']} of {whose}"
    return said + (f"; with {' and '.join(alone)}, one by one." if alone else ".")


def shares_text(result: Result) -> str | None:
    """What a result takes of the ceilings of its machine; None if they were not measured."""
    shares = result.get("share_of_ceilings") or {}  # older files do not say
    told = [
        f"{share_text(shares[key])} of {what}"
        for key, what in (
            ("bandwidth", f"the bandwidth of {shares.get('level') or 'memory'}"),
            ("launch_rate", "the launch rate of a lane"),
            ("event_loop_rate", "the turns of the event loop"),
        )
        if shares.get(key) is not None
    ]
    return ", ".join(told) or None


def _share_sentences(results: list[Result]) -> list[str]:
    """For each size, what the fastest lock-free result takes of the ceilings."""
    said = []
    mine = [each for each in results if each["policy"] == CONTENDER and shares_text(each)]
    for elements in dict.fromkeys(each["elements"] for each in mine):
        best = max(
            (each for each in mine if each["elements"] == elements),
            key=lambda each: each["updates_per_second"],
        )
        workers = counted(best["workers"], "worker")
        said.append(f"at {size_name(elements)} elements, with {workers}, {shares_text(best)}")
    return [f"Lock-free takes, of this machine's ceilings: {'; '.join(said)}."] if said else []


def _lost_sentences(bench: dict[str, Any]) -> list[str]:
    """For each size, with how many workers lock-free lost most, and how stale its updates were."""
    lost = [
        each
        for each in bench["results"]
        if each["policy"] == CONTENDER and each.get("lost_updates_fraction") is not None
    ]
    said = []
    for elements in dict.fromkeys(each["elements"] for each in lost):
        worst = max(
            (each for each in lost if each["elements"] == elements),
            key=lambda each: (each["lost_updates_fraction"], each["workers"]),
        )
        workers = counted(worst["workers"], "worker")
        said.append(f"at {size_name(elements)} elements {_losses(worst)}, with {workers}")
    if not said:
        return []
    return [f"Lost with lock-free of the updates, block by block, at most: {'; '.join(said)}."]


def _losses(result: Result) -> str:
    staleness = result["staleness"]
    return (
        f"{lost_text(result['lost_updates_fraction'])} (staleness: mean "
        f"{number_text(staleness['mean'], 1)}, max {number_text(staleness['max'])})"
    )


def _cost_sentences(bench: dict[str, Any]) -> list[str]:
    """What telemetry takes of the updates/s, with its interval."""
    said = [
        f"at {size_name(cost['elements'])} elements {_taken(cost['ratio'])} % "
        f"({_taken(cost['ratio_interval'][1])} to {_taken(cost['ratio_interval'][0])}), with "
        f"{counted(cost['workers'], 'worker')}"
        for cost in bench.get("telemetry_cost") or ()  # older files do not say
        if cost.get("ratio_interval")
    ]
    return [f"Telemetry costs lock-free, of its updates/s: {'; '.join(said)}."] if said else []


def _failure_sentences(results: list[Result]) -> list[str]:
    """Which workers failed, and why, where the others went on."""
    return [
        f"With {result['policy']} and {counted(result['workers'], 'worker')} at "
        f"{size_name(result['elements'])} elements, worker {worker} failed: {error}."
        for result in results
        for worker, error in result.get("failures", {}).items()  # older files do not say
    ]


def _gains(bench: dict[str, Any], elements: int, baseline: str) -> list[str]:
    """Lock-free's gain over a baseline at each worker count, with its interval."""
    return [
        f"{gain.median:.2f}x with {counted(workers, 'worker')} ({gain.low:.2f} to {gain.high:.2f})"
        for (size, workers), gain in gains_over(baseline, bench["results"]).items()
        if size == elements
    ]


def lost_text(share: float | None) -> str:
    """A share of lost updates as per cent; never 0 if there were any."""
    return "<0.01 %" if share and share < 1e-4 else number_text(share and 100 * share, 2, " %")


def _taken(ratio: float) -> str:
    return f"{100 * (1 - ratio):.1f}"


def _milliseconds(value: float) -> str:
    """Milliseconds in three digits or more."""
    return number_text(value, 3 if value < 10 else 1 if value < 100 else 0)


def _staleness(result: Result) -> str:
    return (
        f"{number_text(result['staleness']['mean'], 1)}/{number_text(result['staleness']['max'])}"
    )
