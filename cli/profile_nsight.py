"""``hogstream profile nsys``, ``ncu`` and ``read``: NVIDIA's profilers, and what they find."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from hogstream.cli import nsight_tables, options
from hogstream.cli.console import print_table, print_text
from hogstream.cli.output import check_distinct, command_line, deliver
from hogstream.kernels.backends.select import select_backend
from hogstream.profiling.environment import best_device, describe_environment
from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.nsight import compute, systems
from hogstream.profiling.nsight.tools import (
    NCU,
    NSYS,
    FoundTool,
    Program,
    Tool,
    find_tool,
    run_tool,
)
from hogstream.profiling.results.files import write_result
from hogstream.profiling.results.profile_schema import NcuProfile
from hogstream.profiling.results.records import Environment

# What runs if no program is named.
_BENCH = ("bench", "--elements", "2^16", "--workers", "16", "--seconds", "0.5")
_ELEMENTS = 1 << 26
# Nothing marks a report of Nsight Systems but its name.
_NSYS_SUFFIXES = (".nsys-rep", ".qdrep")
_NCU_MAGIC = b"NVR\0"


def _report_file(suffix: str) -> Callable[[str], Path]:
    """An output file that ends in ``suffix``, which the tool would add."""

    def parse(text: str) -> Path:
        if not text.endswith(suffix):
            raise click.BadParameter(f"must end in {suffix}, got {text!r}")
        if "%" in text:
            raise click.BadParameter(f"must hold no %, which the tool would replace, got {text!r}")
        return options.output_file(text)

    return parse


def _elements(text: str) -> int:
    sizes = options.sizes(text)
    if len(sizes) != 1:
        raise click.BadParameter(f"must be one number of elements, got {text!r}")
    return sizes[0]


def _output_option(suffix: str) -> Callable[[Any], Any]:
    return click.option(
        "--output",
        type=_report_file(suffix),
        metavar="FILE",
        help=f"Keep the report in this file.  [default: hogstream-TIME{suffix}]",
    )


_PROGRAM = click.argument(
    "program", nargs=-1, type=click.UNPROCESSED, metavar="[-- PROGRAM ARGUMENT...]"
)
# What follows the program's name is the program's.
_SETTINGS = {"allow_interspersed_args": False}


@click.command("nsys", context_settings=_SETTINGS)
@_output_option(".nsys-rep")
@options.JSON
@_PROGRAM
def profile_nsys(output: Path | None, json_file: Path | None, program: tuple[str, ...]) -> None:
    """Show with Nsight Systems what overlaps, and what launches cost.

    PROGRAM is bench or train with their options, of which what is measured is captured, or a
    command such as `python train.py`, which is captured from start to end. Without one it is a
    short bench.
    """
    check_distinct({"--output": output, "--json": json_file})
    tool, report = find_tool(NSYS), output or _new_report(".nsys-rep")
    target = Program.named(program or _BENCH)
    _run(tool, systems.profile_command(tool, report, target), target, report)
    _show_timeline(_exported(tool, report), tool, report, json_file)


@click.command("ncu", context_settings=_SETTINGS)
@click.option(
    "--elements",
    type=_elements,
    metavar="N",
    help="How many each launch updates.  [default: 2^26; of a PROGRAM it is not known]",
)
@click.option(
    "--kernels",
    metavar="REGEX",
    default=compute.KERNELS,
    show_default=True,
    help="Profile kernels with such names.",
)
@click.option(
    "--launches",
    type=click.IntRange(1),
    metavar="N",
    default=20,
    show_default=True,
    help="Profile the first so many launches.",
)
@_output_option(".ncu-rep")
@options.JSON
@_PROGRAM
def profile_ncu(
    elements: int | None,
    kernels: str,
    launches: int,
    output: Path | None,
    json_file: Path | None,
    program: tuple[str, ...],
) -> None:
    """Show with Nsight Compute what a kernel reads and writes.

    PROGRAM is bench or train, of which what is measured is profiled, or a command such as
    `python train.py`. Without one it is some updates of --elements in one tensor and in 64.
    """
    check_distinct({"--output": output, "--json": json_file})
    tool, report = find_tool(NCU), output or _new_report(".ncu-rep")
    if program:
        target = Program.named(program)
    else:
        elements = elements or _ELEMENTS
        target = Program.module("hogstream.profiling.nsight.workload", str(elements))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = compute.profile_command(tool, report, log, target, kernels, launches)
        _run(tool, command, target, report, lambda: compute.check_log(log))
    _show_counters(_exported_launches(tool, report), elements, tool, report, json_file)


@click.command("read")
@click.option(
    "--elements",
    type=_elements,
    metavar="N",
    help="How many each launch in a profile of Nsight Compute updates.",
)
@options.JSON
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def read(elements: int | None, json_file: Path | None, file: Path) -> None:
    """Read what Nsight wrote.

    FILE is a report of Nsight Systems or of Nsight Compute, for which the tool must be installed,
    or an SQLite export of the first, or CSV output of the second, for which not.
    """
    check_distinct({"FILE": file, "--json": json_file})
    with file.open("rb") as opened:
        start = opened.read(len(systems.SQLITE_MAGIC))
    if not start:
        raise MeasurementError(f"{file} is empty")
    database = systems.SQLITE_MAGIC.startswith(start)
    if database or file.suffix in _NSYS_SUFFIXES:
        if elements is not None:
            raise click.UsageError(f"--elements is for Nsight Compute, and '{file}' is not from it")
        trace = systems.read_trace(file) if database else _exported(_reader(NSYS, file), file)
        _show_timeline(trace, None, None, json_file)
        return
    if start.startswith(_NCU_MAGIC):
        launches = _exported_launches(_reader(NCU, file), file)
    else:
        launches = compute.read_launches(file.read_bytes(), str(file))
    _show_counters(launches, elements, None, None, json_file)


def _new_report(suffix: str) -> Path:
    return options.output_file(time.strftime(f"hogstream-%Y%m%d-%H%M%S{suffix}"))


def _reader(tool: Tool, file: Path) -> FoundTool:
    """The tool that reads its reports.

    Raises:
        MeasurementError: If it is not here; says what else can be done.
    """
    try:
        return find_tool(tool)
    except MeasurementError as error:
        raise MeasurementError(
            f"{file} takes {tool.name} to read, and {error}; or run `{tool.export}` where it is, "
            "and read what that writes"
        ) from None


def _run(
    tool: FoundTool,
    command: Sequence[str],
    target: Program,
    report: Path,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Runs a profiler over a program, and leaves with its status if that is not 0.

    Args:
        tool: The profiler.
        command: Its command line.
        target: The program.
        report: What it is to write.
        check: Called when it has ended; raises if it says that it could not do its work.

    Raises:
        MeasurementError: If it wrote no report.
    """
    report.unlink(missing_ok=True)  # so that what is there afterwards is of this run
    status: int | None = None
    try:
        status = run_tool(command, target.environment)
    finally:
        if status != 0 and report.exists():
            print(f"hogstream: what was captured: hogstream profile read {report}", file=sys.stderr)
    check()
    if status:
        print(f"hogstream: {tool.tool.name} ended with status {status}", file=sys.stderr)
        sys.exit(status)
    if not report.exists():
        why = "no CUDA device was measured" if target.marked else "it captured nothing"
        raise MeasurementError(f"{tool.tool.name} wrote no report: {why}")


def _exported(tool: FoundTool, report: Path) -> systems.Trace:
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "export.sqlite"
        tool.convert(report, *systems.export_arguments(report, export))
        return systems.read_trace(export)


def _exported_launches(tool: FoundTool, report: Path) -> list[compute.KernelLaunch]:
    text = tool.convert(report, *compute.export_arguments(report))
    return compute.read_launches(text, str(report))


def _show_timeline(
    trace: systems.Trace, tool: FoundTool | None, report: Path | None, json_file: Path | None
) -> None:
    result = systems.analyse(trace, command_line(), *_origin(tool))

    def show() -> None:
        print_table(nsight_tables.timeline_table(result))
        if result.kernels:
            print_table(nsight_tables.kernels_table(result))
        for sentence in nsight_tables.timeline_sentences(result):
            print_text(sentence)
        _tell(report)

    deliver(result, show, (json_file, partial(write_result, result)))


def _show_counters(
    launches: list[compute.KernelLaunch],
    elements: int | None,
    tool: FoundTool | None,
    report: Path | None,
    json_file: Path | None,
) -> None:
    environment, version = _origin(tool)
    result = NcuProfile(
        command=command_line(),
        environment=environment,
        profiler_version=version,
        results=compute.counters(launches, elements),
    )

    def show() -> None:
        print_table(nsight_tables.counters_table(result))
        for sentence in nsight_tables.counters_sentences(result):
            print_text(sentence)
        _tell(report)

    deliver(result, show, (json_file, partial(write_result, result)))


def _tell(report: Path | None) -> None:
    if report is not None:  # which the tool has written
        click.echo(f"wrote {report}")


def _origin(tool: FoundTool | None) -> tuple[Environment | None, str | None]:
    """Where a profile was made, and by which version; None where a file was only read."""
    if tool is None:
        return None, None
    device = best_device()
    backend = select_backend(None, device.type).name
    return describe_environment(device, backend), tool.version
