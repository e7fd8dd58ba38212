"""Files as NVIDIA's profilers write them, to their documented schemas, and tools that stand in."""

from __future__ import annotations

import os
import sqlite3
import stat
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

PROCESS = 0x1000042_000000  # a serialised process identifier: its threads differ in the low bits
KERNEL, RUNTIME, NVTX = "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME", "NVTX_EVENTS"
DOMAIN_CREATE, START_END, PUSH_POP = 75, 60, 59

# Columns as Nsight Systems 2024.6 exports them, with a value for those that a test does not give.
SCHEMA: dict[str, dict[str, tuple[str, Any]]] = {
    "StringIds": {"id": ("INTEGER PRIMARY KEY", None), "value": ("TEXT NOT NULL", "")},
    "TARGET_INFO_GPU": {
        "vmId": ("INTEGER NOT NULL", 1),
        "id": ("INTEGER NOT NULL", 0),
        "name": ("TEXT", "NVIDIA H200"),
    },
    KERNEL: {
        "start": ("INTEGER NOT NULL", 0),
        "end": ("INTEGER NOT NULL", 0),
        "deviceId": ("INTEGER NOT NULL", 0),
        "contextId": ("INTEGER NOT NULL", 1),
        "greenContextId": ("INTEGER", None),
        "streamId": ("INTEGER NOT NULL", 7),
        "correlationId": ("INTEGER", None),
        "globalPid": ("INTEGER", PROCESS),
        "demangledName": ("INTEGER NOT NULL", 1),
        "shortName": ("INTEGER NOT NULL", 1),
        "registersPerThread": ("INTEGER NOT NULL", 32),
        "gridX": ("INTEGER NOT NULL", 1),
        "graphNodeId": ("INTEGER", None),
    },
    RUNTIME: {
        "start": ("INTEGER NOT NULL", 0),
        "end": ("INTEGER", 0),  # NOT NULL as documented, but a call may be cut off
        "eventClass": ("INTEGER NOT NULL", 0),
        "globalTid": ("INTEGER", PROCESS + 1),
        "correlationId": ("INTEGER", None),
        "nameId": ("INTEGER NOT NULL", 2),
        "returnValue": ("INTEGER NOT NULL", 0),
    },
    NVTX: {
        "start": ("INTEGER NOT NULL", 0),
        "end": ("INTEGER", None),
        "eventType": ("INTEGER NOT NULL", START_END),
        "category": ("INTEGER", None),
        "text": ("TEXT", None),
        "globalTid": ("INTEGER", PROCESS + 1),
        "textId": ("INTEGER", None),
        "domainId": ("INTEGER", 3),
        "int64Value": ("INTEGER", None),
    },
}

Rows = Iterable[dict[str, Any]]
STRINGS = {1: "rmsprop_kernel", 2: "cudaLaunchKernel_v7000"}


def write_export(
    path: Path,
    *,
    kernels: Rows | None = None,
    calls: Rows | None = None,
    ranges: Rows | None = None,
    strings: dict[int, str] | None = None,
    without: Sequence[str] = (),
    more: Sequence[str] = (),
) -> Path:
    """Writes an export; a table that is None is left out, as Nsight Systems does if it is empty.

    Args:
        path: Where.
        kernels: Rows by column, as are ``calls`` and ``ranges``.
        strings: Those that names refer to; the names of a kernel and a call if None.
        without: Columns to leave out, from every table.
        more: Columns to add to every table.
    """
    tables: dict[str, Rows | None] = {
        "StringIds": [{"id": i, "value": v} for i, v in (strings or STRINGS).items()],
        "TARGET_INFO_GPU": [{}],
        KERNEL: kernels,
        RUNTIME: calls,
        NVTX: ranges,
    }
    with closing(sqlite3.connect(path)) as database, database:
        for table, rows in tables.items():
            if rows is None:
                continue
            columns = {name: each for name, each in SCHEMA[table].items() if name not in without}
            declared = [f'"{name}" {kind}' for name, (kind, _) in columns.items()]
            declared += [f'"{name}" BLOB' for name in more]
            database.execute(f'CREATE TABLE "{table}" ({", ".join(declared)})')
            for row in rows:
                values = [row.get(name, default) for name, (_, default) in columns.items()]
                values += [b"\xff"] * len(more)
                marks = ", ".join("?" * len(values))
                database.execute(f'INSERT INTO "{table}" VALUES ({marks})', values)
    return path


def domain(name: str = "hogstream", number: int = 3) -> dict[str, Any]:
    return {"eventType": DOMAIN_CREATE, "text": name, "domainId": number}


METRICS = {
    "gpu__time_duration.sum": ("ns", "105,300"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "92.5"),
    "dram__bytes_read.sum": ("byte", "12,000,000"),
    "dram__bytes_write.sum": ("byte", "7,600,000"),
    "launch__registers_per_thread": ("register/thread", "40"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "61.25"),
}
_LAUNCH = {
    "Process ID": "1234",
    "Process Name": "python3.12",
    "Host Name": "127.0.0.1",
    "Kernel Name": "rmsprop_kernel",
    "Context": "1",
    "Stream": "7",
    "Block Size": "(128, 1, 1)",
    "Grid Size": "(976, 1, 1)",
    "Device": "0",
    "CC": "9.0",
}


def raw_csv(*launches: dict[str, str], metrics: dict[str, tuple[str, str]] | None = None) -> str:
    """What ``ncu --page raw --csv`` prints of launches that differ from the usual as given."""
    metrics = METRICS if metrics is None else metrics
    names = ["ID", *_LAUNCH, *metrics]
    units = [*[""] * (1 + len(_LAUNCH)), *(unit for unit, _ in metrics.values())]
    values = {metric: value for metric, (_, value) in metrics.items()}
    rows = [
        [{"ID": str(number), **_LAUNCH, **values, **launch}[name] for name in names]
        for number, launch in enumerate(launches)
    ]
    return "".join(_line(row) for row in (names, units, *rows))


def details_csv(*launches: dict[str, str]) -> str:
    """What ``ncu --csv`` prints while it profiles, its messages among it."""
    names = [*_LAUNCH, "Section Name", "Metric Name", "Metric Unit", "Metric Value"]
    rows = [
        [
            str(number),
            *({**_LAUNCH, **launch}[name] for name in _LAUNCH),
            *("Command line profiler metrics", metric, unit, launch.get(metric, value)),
        ]
        for number, launch in enumerate(launches)
        for metric, (unit, value) in METRICS.items()
    ]
    return (
        "==PROF== Connected to process 1234 (/usr/bin/python3.12)\n"
        'the program prints "this"\n'
        '==PROF== Profiling "rmsprop_kernel": 0%....50%....100% - 5 passes\n'
        + "".join(_line(row) for row in (["ID", *names], *rows))
        + "==PROF== Disconnected from process 1234\n"
    )


def _line(cells: Sequence[str]) -> str:
    return ",".join(f'"{cell}"' for cell in cells) + "\n"


def stand_in(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a program alone on the PATH that runs Python with its arguments in ``arguments``."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(
        f"#!{sys.executable} -IS\nimport os, sys\narguments = sys.argv[1:]\n{body}\n", "utf-8"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin:/bin")
    return program
