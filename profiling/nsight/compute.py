"""Nsight Compute: what a kernel moves and how fast, against the 20 bytes that an element needs.

Reads ncu's CSV, in both of its layouts: a line for each launch, under names and a row of units
(``--page raw``), or a line for each metric (what ``ncu --csv`` prints while it profiles). Numbers
are those of the C locale, as we have ncu print them: 1,234.5. ncu writes them as the locale says,
so a file that was made in another one is refused where it shows.

We run ncu ourselves. NVIDIA's ``nsight-python`` measures functions that carry its decorator, in a
process that it attaches ncu to, so it cannot profile a program as it is, and it needs pandas and
an ncu of 2026.
"""

from __future__ import annotations

import csv
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.nsight.tools import FoundTool, Program
from hogstream.profiling.results.profile_schema import KernelCounters
from hogstream.profiling.results.records import Spread

#: What an update must move for an element: reads of grad, ms and param, writes of ms and param.
READ_BYTES, WRITTEN_BYTES = 12, 8
#: Our kernels that update.
KERNELS = "rmsprop_kernel"
_NOT_PERMITTED = "ERR_NVGPUCTRPERM"

_TIME = "gpu__time_duration.sum"
_DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
_READ = "dram__bytes_read.sum"
_WRITTEN = "dram__bytes_write.sum"
_REGISTERS = "launch__registers_per_thread"
_OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
METRICS = (_TIME, _DRAM, _READ, _WRITTEN, _REGISTERS, _OCCUPANCY)

_NAME, _LAUNCH = "Kernel Name", "ID"

# What units are worth, in nanoseconds or bytes.
_UNITS = {
    **dict.fromkeys(("", "%", "register", "register/thread", "ns", "nsecond", "byte"), 1.0),
    **dict.fromkeys(("us", "usecond", "Kbyte"), 1e3),
    **dict.fromkeys(("ms", "msecond", "Mbyte"), 1e6),
    **dict.fromkeys(("s", "second", "Gbyte"), 1e9),
    "Tbyte": 1e12,
}

# A number as ncu prints it in the C locale.
_NUMBER = re.compile(r"-?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?([eE][+-]?\d+)?")

# The columns of a launch, and the text and the unit of its metrics.
_Cells = tuple[dict[str, str], dict[str, tuple[str, str]]]


@dataclass(frozen=True)
class KernelLaunch:
    """One launch of a kernel.

    Attributes:
        kernel: Its name.
        grid: As ncu prints it.
        block: Likewise.
        metrics: By name; in nanoseconds, bytes and per cent.
    """

    kernel: str
    grid: str
    block: str
    metrics: dict[str, float]


def profile_command(
    tool: FoundTool, report: Path, log: Path, target: Program, kernels: str, launches: int
) -> list[str]:
    """The command that profiles the first ``launches`` of kernels whose names match a regex.

    ncu's own messages go to ``log``, so that they are told from the program's.
    """
    # ncu would lock the clocks low, and the memory would wait for the kernel.
    command = [tool.path, "--target-processes", "all", "--clock-control", "none"]
    if target.marked:
        command += ["--profile-from-start", "off"]
    return [
        *command,
        *("--kernel-name", f"regex:{kernels}", "--launch-count", str(launches)),
        *("--metrics", ",".join(METRICS), "--log-file", str(log)),
        *("--force-overwrite", "--export", str(report), *target.command),
    ]


def export_arguments(report: Path) -> list[str]:
    """What makes ncu print a report as CSV."""
    return ["--import", str(report), "--page", "raw", "--csv", "--print-units", "base"]


def check_log(log: Path) -> None:
    """Passes on the errors and warnings of ncu's log.

    Raises:
        MeasurementError: If ncu may not read the counters; says what to do.
    """
    said = log.read_text("utf-8", "replace") if log.exists() else ""
    if _NOT_PERMITTED in said:
        raise MeasurementError(
            f"ncu may not read the GPU's counters ({_NOT_PERMITTED}): run it as root, or have the "
            "driver loaded with NVreg_RestrictProfilingToAdminUsers=0; "
            f"https://developer.nvidia.com/{_NOT_PERMITTED} says how"
        )
    for line in said.splitlines():
        if line.startswith(("==ERROR==", "==WARNING==")):
            print(line, file=sys.stderr)


def read_launches(csv_text: bytes, source: str) -> list[KernelLaunch]:
    """Reads ncu's CSV.

    Args:
        csv_text: What ncu printed.
        source: The file, for messages.

    Raises:
        MeasurementError: If it is none, is cut short, or holds no launch.
    """
    try:
        launches = _launches(_table(csv_text.decode("utf-8")))
    except KeyError as error:
        raise MeasurementError(
            f"{source} has no column {error}, or a unit of that name that ncu does not have"
        ) from None
    except (csv.Error, ValueError) as error:
        raise MeasurementError(
            f"{source} is damaged, or no CSV of Nsight Compute: {error}"
        ) from None
    if not launches:
        raise MeasurementError(f"{source} holds no kernel: ncu profiled none")
    return launches


def counters(launches: Iterable[KernelLaunch], elements: int | None) -> list[KernelCounters]:
    """Medians over the launches of each kernel, of one size.

    Args:
        launches: What was profiled.
        elements: How many each launch updates; None if that is not known.
    """
    alike: dict[tuple[str, str, str], list[KernelLaunch]] = defaultdict(list)
    for launch in launches:
        alike[launch.kernel, launch.grid, launch.block].append(launch)
    return [_counters_of(same, elements) for same in alike.values()]


def _counters_of(launches: list[KernelLaunch], elements: int | None) -> KernelCounters:
    def samples(metric: str) -> list[float]:
        return [each.metrics[metric] for each in launches if metric in each.metrics]

    def median(metric: str) -> float | None:
        values = samples(metric)
        return statistics.median(values) if values else None

    def of_element(count: float | None) -> float | None:
        return None if count is None or elements is None else count / elements

    times, read, written = samples(_TIME), median(_READ), median(_WRITTEN)
    time_us = Spread.of([each / 1e3 for each in times]) if times else None
    moved = None if read is None or written is None else read + written
    return KernelCounters(
        kernel=launches[0].kernel,
        grid=launches[0].grid,
        block=launches[0].block,
        launches=len(launches),
        time_us=time_us,
        dram_percent=median(_DRAM),
        bytes_read=read,
        bytes_written=written,
        gigabytes_per_second=1e-3 * moved / time_us.median
        if moved is not None and time_us is not None and time_us.median
        else None,
        elements=elements,
        bytes_read_per_element=of_element(read),
        bytes_written_per_element=of_element(written),
        bytes_per_element=of_element(moved),
        registers=median(_REGISTERS),
        occupancy_percent=median(_OCCUPANCY),
    )


def _table(text: str) -> list[dict[str, str]]:
    """Rows of the CSV by column; ncu's messages and a program's output may stand between them."""
    quoted = [line for line in text.split("\n") if line.startswith('"')]
    table = list(dropwhile(lambda line: not line.startswith(f'"{_LAUNCH}"'), quoted))
    if not table or f'"{_NAME}"' not in table[0]:
        raise ValueError("it has no line of names")
    names, *rows = csv.reader(table, strict=True)
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} of {len(names)} columns")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _launches(table: list[dict[str, str]]) -> list[KernelLaunch]:
    by_launch = _of_lines(table) if table and "Metric Name" in table[0] else _of_columns(table)
    return [
        KernelLaunch(
            row[_NAME],
            row.get("Grid Size", ""),
            row.get("Block Size", ""),
            {
                metric: value * _UNITS[unit]
                for metric, (text, unit) in cells.items()
                if (value := _number(text)) is not None
            },
        )
        for row, cells in by_launch
    ]


def _of_columns(table: list[dict[str, str]]) -> list[_Cells]:
    """Each launch of ``--page raw``, below the row of units."""
    if not table:
        return []
    units, *rows = table
    if units[_LAUNCH]:
        raise ValueError("it has no row of units")
    present = [metric for metric in METRICS if metric in units]
    return [(row, {metric: (row[metric], units[metric]) for metric in present}) for row in rows]


def _of_lines(table: list[dict[str, str]]) -> list[_Cells]:
    """Each launch of the layout with a line for each metric."""
    launches: dict[str, _Cells] = {}
    for row in table:
        _, cells = launches.setdefault(row[_LAUNCH], (row, {}))
        if row["Metric Name"] in METRICS:
            cells[row["Metric Name"]] = row["Metric Value"], row["Metric Unit"]
    return list(launches.values())


def _number(text: str) -> float | None:
    """The number that a text is, or None of what was not measured."""
    text = text.removeprefix("(!) ")
    if text in ("", "n/a", "nan", "-nan", "inf", "-inf"):
        return None
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text!r} is no number as the C locale has it; run ncu with LC_ALL=C")
    return float(text.replace(",", ""))
