"""What Nsight's tools measured, as tables and sentences for the console."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from hogstream.cli.console import new_table
from hogstream.profiling.nsight.compute import READ_BYTES, WRITTEN_BYTES
from hogstream.profiling.nsight.systems import WHOLE
from hogstream.profiling.results.profile_schema import (
    KernelCounters,
    NcuProfile,
    NsysProfile,
    Percentiles,
    PolicyTimeline,
)
from hogstream.profiling.wording import counted, number_text

_KERNELS = 8  # rows of a table
_WIDE, _NARROW = 56, 28  # characters of a kernel's name


def plain(text: str) -> str:
    """A text from a file for the terminal: control characters as ``?``."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def timeline_table(profile: NsysProfile) -> Table:
    """The policies of an Nsight Systems profile, side by side."""
    table = new_table("Timeline", "", *(plain(each.policy) for each in profile.results))
    for title, cell in _timeline_rows(profile):
        cells = [cell(each) for each in profile.results]
        if any(each != "-" for each in cells):
            table.add_row(title, *cells)
    return table


def kernels_table(profile: NsysProfile) -> Table:
    """The kernels that took most of the time."""
    table = new_table("Kernels", "kernel", "launches", "total ms")
    for kernel in profile.kernels[:_KERNELS]:
        table.add_row(
            _short(kernel.name), number_text(kernel.count), number_text(kernel.total_ms, 3)
        )
    return table


def timeline_sentences(profile: NsysProfile) -> list[str]:
    """What the metrics mean, and what is not in the profile."""
    entries, said = profile.results, []
    overlaps = [
        f"{100 * each.overlap:.1f} % of the time"
        + ("" if each.policy == WHOLE else f" with {plain(each.policy)}")
        for each in entries
        if each.overlap is not None
    ]
    if overlaps:
        said.append(
            f"While the GPU was busy, two kernels or more ran at once {', '.join(overlaps)}."
        )
    else:
        said.append(
            "No kernel ran while it was captured: the program did not use the GPU, or not then."
        )
    if entries[0].policy == WHOLE:
        said.append(
            "There are no runs of hogstream's scheduler in the profile, so policies are not told "
            "apart; runs are marked where the package nvtx is installed."
        )
    if profile.kernels_outside_runs:
        outside = counted(profile.kernels_outside_runs, "kernel")
        said.append(f"{outside} ran outside all runs of the scheduler, and are left out.")
    if profile.kernels_untimed:
        said.append(f"{counted(profile.kernels_untimed, 'kernel')} had no times: left out.")
    if overlaps:
        said.append(
            "Launch latency is from the start of the call to the start of the kernel. API time is "
            "what all threads spent in CUDA calls, those that wait or poll included."
        )
    return said


def counters_table(profile: NcuProfile) -> Table:
    """The kernels of an Nsight Compute profile; their bytes for each element if that is known."""
    known = _elements_known(profile)
    table = new_table(
        f"Counters{', bytes for each element' if known else ''}",
        "kernel",
        "launches",
        "us",
        "DRAM %",
        "GB/s",
        *(("B read", "B written") if known else ("MB read", "MB written")),
        "regs",
        "warps %",
    )
    for each in profile.results:
        table.add_row(
            _short(each.kernel, _NARROW),
            number_text(each.launches),
            number_text(None if each.time_us is None else each.time_us.median, 1),
            number_text(each.dram_percent, 1),
            number_text(each.gigabytes_per_second),
            *_bytes_texts(each, known),
            number_text(each.registers),
            number_text(each.occupancy_percent, 1),
        )
    return table


def _bytes_texts(entry: KernelCounters, of_elements: bool) -> list[str]:
    """What was read and written: bytes for each element, or MB."""
    if of_elements:
        each = entry.bytes_read_per_element, entry.bytes_written_per_element
        return [number_text(moved, 2) for moved in each]
    return [
        number_text(moved and moved / 1e6, 1) for moved in (entry.bytes_read, entry.bytes_written)
    ]


def counters_sentences(profile: NcuProfile) -> list[str]:
    """The traffic of each kernel against what an update must move, and what the columns are."""
    needed, said = READ_BYTES + WRITTEN_BYTES, []
    moved = [
        f"{each.bytes_per_element:.2f} by {plain(each.kernel)} "
        f"({each.bytes_per_element / needed:.2f}x)"
        for each in profile.results
        if each.bytes_per_element is not None
    ]
    if moved:
        said.append(
            f"Bytes that went between the GPU and its memory for each element, of the {needed} "
            f"that a float32 update needs ({READ_BYTES} read, {WRITTEN_BYTES} written): "
            f"{', '.join(moved)}. What is still in the cache when a kernel ends is not counted: "
            "small sizes write less."
        )
    elif not _elements_known(profile):
        said.append(
            "How many elements a launch updates is not known: --elements sets the bytes against "
            f"the {needed} that each needs."
        )
    said.append(
        "DRAM is of the peak, warps are those active of the most that there can be: the achieved "
        "occupancy. Kernels were run one at a time, so this says nothing of what runs at once."
    )
    return said


def _elements_known(profile: NcuProfile) -> bool:
    return any(each.elements is not None for each in profile.results)


def _timeline_rows(profile: NsysProfile) -> list[tuple[str, Callable[[PolicyTimeline], str]]]:
    def of_range(text: str) -> Callable[[PolicyTimeline], str]:
        return lambda each: _spread_text(each.ranges[text].us if text in each.ranges else None)

    texts = dict.fromkeys(text for each in profile.results for text in each.ranges)
    return [
        ("runs", lambda each: number_text(each.runs)),
        ("kernels", lambda each: number_text(each.kernels)),
        ("streams", lambda each: number_text(len(each.streams) or None)),
        ("kernels per stream", _per_stream),
        ("kernels per s", lambda each: number_text(each.kernels_per_second)),
        ("busy, ms", lambda each: number_text(each.busy_ms, 3)),
        ("overlap, %", lambda each: number_text(each.overlap and 100 * each.overlap, 1)),
        ("kernel, us p50/p99", lambda each: _spread_text(each.kernel_us)),
        ("gap on a stream, us p50/p99", lambda each: _spread_text(each.gap_us)),
        ("launch latency, us p50/p99", lambda each: _spread_text(each.launch_latency_us)),
        ("API time per kernel, us", lambda each: number_text(each.api_us_per_kernel, 2)),
        ("API time per update, us", lambda each: number_text(each.api_us_per_update, 2)),
        (
            "per kernel, event loop, us",
            lambda each: number_text(each.api_us_per_kernel_on_event_loop, 2),
        ),
        *((f"NVTX {plain(text)}, us p50/p99", of_range(text)) for text in sorted(texts)),
    ]


def _per_stream(entry: PolicyTimeline) -> str:
    counts = [stream.kernels for stream in entry.streams]
    return f"{min(counts):,} to {max(counts):,}" if counts else "-"


def _spread_text(times: Percentiles | None) -> str:
    return "-" if times is None else f"{times.p50:,.1f}/{times.p99:,.1f}"


def _short(name: str, width: int = _WIDE) -> str:
    """A name without its middle, if it is too long for a column."""
    half = width // 2
    return plain(name if len(name) <= width else f"{name[: half - 1]}…{name[-half:]}")
