"""The results of ``hogstream bench`` as tables and sentences: on the console and in reports."""

from __future__ import annotations

import statistics
from typing import Any

from rich.table import Table

from hogstream.profiling.console import counted, figure, new_table

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
KERNEL_COLUMNS = ("kernel", "elements", "ms", "GB/s", "differing bits")
TRAINING_COLUMNS = (
    "policy",
    "workers",
    "test accuracy",
    "final loss",
    "updates per s",
    "staleness mean/max",
    "seconds",
)


def result_row(result: Result) -> tuple[str, ...]:
    """One result in ``COLUMNS``."""
    return (
        size_name(result["elements"]),
        str(result["workers"]),
        result["policy"],
        figure(result["updates_per_second"]),
        figure(result["gigabytes_per_second"], 1),
        figure(result["latency_us"]["p50"]),
        figure(result["latency_us"]["p99"]),
        _staleness(result),
        figure(result["gain_over_locked"], 2, "x"),
        figure(result["gain_over_ordered"], 2, "x"),
    )


def kernel_row(kernel: dict[str, Any]) -> tuple[str, ...]:
    """One kernel's result in ``KERNEL_COLUMNS``."""
    return (
        kernel["name"],
        size_name(kernel["elements"]),
        figure(kernel["milliseconds"], 2),
        figure(kernel["gigabytes_per_second"], 1),
        figure(kernel["differing_bits"]),
    )


def results_table(bench: dict[str, Any]) -> Table:
    """All results, those to compare beside each other."""
    table = new_table("Updates", *COLUMNS, text_columns=3)
    before = None
    for result in bench["results"]:
        if before is not None and before != (result["elements"], result["workers"]):
            table.add_section()
        before = result["elements"], result["workers"]
        table.add_row(*result_row(result))
    return table


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
        figure(100 * result["test_accuracy"], 1, " %"),
        figure(result["final_loss"], 4),
        figure(result["updates_per_second"]),
        _staleness(result),
        figure(result["seconds"], 1),
    )


def training_table(results: list[Result]) -> Table:
    """What each policy's training came to."""
    table = new_table("Training", *TRAINING_COLUMNS)
    for result in results:
        table.add_row(*training_row(result))
    return table


def sentences(bench: dict[str, Any]) -> list[str]:
    """What the measurement says, in words."""
    said = []
    environment, ceilings = bench["environment"], bench["ceilings"]
    said.append(
        f"Measured on {environment['device_name']} ({environment['device']}, "
        f"{environment['cores']} cores) with the {environment['backend']} backend. Beyond the "
        f"caches a copy moves {ceilings['copy_gigabytes_per_second']:.1f} GB/s, and the traffic of "
        f"an update {ceilings['update_shaped_gigabytes_per_second']:.1f} GB/s."
    )
    for elements in dict.fromkeys(result["elements"] for result in bench["results"]):
        for baseline in ("locked", "ordered"):
            gains = _gains(bench, elements, baseline)
            if gains:
                said.append(
                    f"Lock-free against {baseline} at {size_name(elements)} elements: "
                    f"{', '.join(gains)}."
                )
    said.append(
        "In brackets: the lowest and highest of the rounds, in which policies took turns. Each "
        f"worker had up to {counted(bench['settings']['depth'], 'update')} in flight."
    )
    return said


def _gains(bench: dict[str, Any], elements: int, baseline: str) -> list[str]:
    """Lock-free's gain over a baseline at each worker count, with its range over the rounds."""
    speeds = {
        (result["policy"], result["workers"]): result["updates_per_second_of_rounds"]
        for result in bench["results"]
        if result["elements"] == elements
    }
    said = []
    for (policy, workers), rounds in speeds.items():
        others = speeds.get((baseline, workers))
        if policy != "lock-free" or not others or min(others) == 0:
            continue
        gain = statistics.median(rounds) / statistics.median(others)
        ratios = [mine / theirs for mine, theirs in zip(rounds, others, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        said.append(f"{gain:.2f}x with {counted(workers, 'worker')} ({spread})")
    return said


def size_name(elements: int) -> str:
    """A number of elements as one says it: 2^20 rather than 1048576."""
    power = elements.bit_length() - 1
    return f"2^{power}" if elements == 1 << power and power >= 10 else f"{elements:,}"


def _staleness(result: Result) -> str:
    return f"{figure(result['staleness']['mean'], 1)}/{figure(result['staleness']['max'])}"
