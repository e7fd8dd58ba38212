"""What Nsight's tools measured, as tables and sentences for the console."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from hogstream.cli.console import new_table
from hogstream.profiling.nsight.compute import READ_BYTES, WRITTEN_BYTES
from hogstream.profiling.nsight.systems import WHOLE
from hogstream.profiling.wording import counted, number_text

Result = dict[str, Any]

_KERNELS = 8  # rows of a table
_WIDE, _NARROW = 56, 28  # characters of a kernel's name


def plain(text: str) -> str:
    """A text from a file for the terminal: control characters as ``?``."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def timeline_table(result: Result) -> Table:
    """The policies of an Nsight Systems profile, side by side."""
    entries = result["results"]
    table = new_table("Timeline", "", *(plain(entry["policy"]) for entry in entries))
    for title, cell in _timeline_rows(result):
        cells = [cell(entry) for entry in entries]
        if any(each != "-" for each in cells):
            table.add_row(title, *cells)
    return table


def kernels_table(result: Result) -> Table:
    """The kernels that took most of the time."""
    table = new_table("Kernels", "kernel", "launches", "total ms")
    for kernel in result["kernels"][:_KERNELS]:
        table.add_row(
            _short(kernel["name"]), number_text(kernel["count"]), number_text(kernel["total_ms"], 3)
        )
    return table


def timeline_sentences(result: Result) -> list[str]:
    """What the figures mean, and what is not in the profile."""
    entries, said = result["results"], []
    overlaps = [
        f"{100 * entry['overlap']:.1f} % of the time"
        + ("" if entry["policy"] == WHOLE else f" with {plain(entry['policy'])}")
        for entry in entries
        if entry["overlap"] is not None
    ]
    if overlaps:
        said.append(
            f"While the GPU was busy, two kernels or more ran at once {', '.join(overlaps)}."
        )
    else:
        said.append(
            "No kernel ran while it was captured: the program did not use the GPU, or not then."
        )
    if entries[0]["policy"] == WHOLE:
        said.append(
            "There are no runs of hogstream's scheduler in the profile, so policies are not told "
            "apart; runs are marked where the package nvtx is installed."
        )
    if result["kernels_outside_runs"]:
        outside = counted(result["kernels_outside_runs"], "kernel")
        said.append(f"{outside} ran outside all runs of the scheduler, and are left out.")
    if result["kernels_untimed"]:
        said.append(f"{counted(result['kernels_untimed'], 'kernel')} had no times: left out.")
    if overlaps:
        said.append(
            "Launch latency is from the start of the call to the start of the kernel. API time is "
            "what all threads spent in CUDA calls, those that wait or poll included."
        )
    return said


def counters_table(result: Result) -> Table:
    """The kernels of an Nsight Compute profile; their bytes for each element if that is known."""
    each = _elements_known(result)
    table = new_table(
        f"Counters{', bytes for each element' if each else ''}",
        "kernel",
        "launches",
        "us",
        "DRAM %",
        "GB/s",
        *(("B read", "B written") if each else ("MB read", "MB written")),
        "regs",
        "warps %",
    )
    for entry in result["results"]:
        table.add_row(
            _short(entry["kernel"], _NARROW),
            number_text(entry["launches"]),
            number_text(entry["time_us"], 1),
            number_text(entry["dram_percent"], 1),
            number_text(entry["gigabytes_per_second"]),
            *(
                number_text(entry[f"{way}_per_element"], 2)
                if each
                else number_text(entry[way] and entry[way] / 1e6, 1)
                for way in ("bytes_read", "bytes_written")
            ),
            number_text(entry["registers"]),
            number_text(entry["occupancy_percent"], 1),
        )
    return table


def counters_sentences(result: Result) -> list[str]:
    """The traffic of each kernel against what an update must move, and what the columns are."""
    needed, said = READ_BYTES + WRITTEN_BYTES, []
    moved = [
        f"{entry['bytes_per_element']:.2f} by {plain(entry['kernel'])} "
        f"({entry['bytes_per_element'] / needed:.2f}x)"
        for entry in result["results"]
        if entry["bytes_per_element"] is not None
    ]
    if moved:
        said.append(
            f"Bytes that went between the GPU and its memory for each element, of the {needed} "
            f"that a float32 update needs ({READ_BYTES} read, {WRITTEN_BYTES} written): "
            f"{', '.join(moved)}. What is still in the cache when a kernel ends is not counted: "
            "small sizes write less."
        )
    elif not _elements_known(result):
        said.append(
            "How many elements a launch updates is not known: --elements sets the bytes against "
            f"the {needed} that each needs."
        )
    said.append(
        "DRAM is of the peak, warps are those active of the most that there can be: the achieved "
        "occupancy. Kernels were run one at a time, so this says nothing of what runs at once."
    )
    return said


def _elements_known(result: Result) -> bool:
    return any(entry["elements"] is not None for entry in result["results"])


def _timeline_rows(result: Result) -> list[tuple[str, Callable[[Result], str]]]:
    def at(key: str, digits: int, scale: float = 1.0) -> Callable[[Result], str]:
        return lambda entry: number_text(None if entry[key] is None else scale * entry[key], digits)

    def spread(key: str) -> Callable[[Result], str]:
        return lambda entry: _spread_text(entry[key])

    def of_range(text: str) -> Callable[[Result], str]:
        return lambda entry: _spread_text(entry["ranges"].get(text, {}).get("us"))

    texts = dict.fromkeys(text for entry in result["results"] for text in entry["ranges"])
    return [
        ("runs", at("runs", 0)),
        ("kernels", at("kernels", 0)),
        ("streams", lambda entry: number_text(len(entry["streams"]) or None)),
        ("kernels per stream", _per_stream),
        ("kernels per s", at("kernels_per_second", 0)),
        ("busy, ms", at("busy_ms", 3)),
        ("overlap, %", at("overlap", 1, 100)),
        ("kernel, us p50/p99", spread("kernel_us")),
        ("gap on a stream, us p50/p99", spread("gap_us")),
        ("launch latency, us p50/p99", spread("launch_latency_us")),
        ("API time per kernel, us", at("api_us_per_kernel", 2)),
        ("API time per update, us", at("api_us_per_update", 2)),
        ("per kernel, event loop, us", at("api_us_per_kernel_on_event_loop", 2)),
        *((f"NVTX {plain(text)}, us p50/p99", of_range(text)) for text in sorted(texts)),
    ]


def _per_stream(entry: Result) -> str:
    counts = [stream["kernels"] for stream in entry["streams"]]
    return f"{min(counts):,} to {max(counts):,}" if counts else "-"


def _spread_text(spread: dict[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['p50']:,.1f}/{spread['p99']:,.1f}"


def _short(name: str, width: int = _WIDE) -> str:
    """A name without its middle, if it is too long for a column."""
    half = width // 2
    return plain(name if len(name) <= width else f"{name[: half - 1]}…{name[-half:]}")
