"""``hogstream profile torch``."""

from __future__ import annotations

import io
import json
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from rich.table import Table

from hogstream.cli import options
from hogstream.cli.bench import bench
from hogstream.cli.console import new_table, print_table, print_text
from hogstream.cli.output import check_distinct, command_line, deliver
from hogstream.cli.train import train
from hogstream.kernels.backends.select import select_backend
from hogstream.profiling.capture import profiled
from hogstream.profiling.environment import best_device, describe_environment
from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.interruption import End
from hogstream.profiling.results.files import read_result, write_result
from hogstream.profiling.results.profile_schema import TorchProfile
from hogstream.profiling.results.records import Environment
from hogstream.profiling.results.schema import Bench, Train
from hogstream.profiling.torch_profiler import trace as job
from hogstream.profiling.wording import number_text
from hogstream.scheduler import Timeline

_OPERATORS_SHOWN = 15

#: What is run if nothing is named.
_SAMPLE = ("train", "digits")
# Short, as a trace has some hundred bytes for each operator and update.
_COMMANDS = ("bench", "train")
_DEFAULTS: dict[click.Command, dict[str, Any]] = {
    bench: {"elements": "2^16", "workers": "4", "policies": "lock-free", "seconds": "0.1"},
    train: {"policies": "lock-free", "beside": False, "updates": 100, "rounds": 1},
}


@click.command("torch", context_settings={"allow_interspersed_args": False})
@click.option(
    "--trace",
    type=options.output_file,
    metavar="FILE",
    default="torch-trace.json",
    show_default=True,
    help="Write the trace, for ui.perfetto.dev, to this file.",
)
@options.JSON
@click.argument(
    "workload", nargs=-1, type=click.UNPROCESSED, metavar="[-- bench|train WORKLOAD|SCRIPT.py ...]"
)
def torch_command(trace: Path, json_file: Path | None, workload: tuple[str, ...]) -> None:
    """Run something under torch's profiler: its operators, and each lane and worker.

    What is run is bench or train with their arguments (of bench, one policy, worker count
    and size), briefly unless you say otherwise; or a script of yours, of whose updates it is only
    seen how they are enqueued; or else train digits. The profiler slows it down: for how fast it
    is, run it without.
    """
    check_distinct({"--trace": trace, "--json": json_file})
    words = workload or _SAMPLE
    ran, recording = job.record(_workload(words), whole=words[0] not in _COMMANDS)
    result = TorchProfile(
        command=command_line(),
        environment=ran.environment,
        partial=ran.end.partial,
        error=ran.end.error,
        warnings=[],
        workload=list(words),
        bench=ran.result.settings if isinstance(ran.result, Bench) else None,
        train=ran.result.settings if isinstance(ran.result, Train) else None,
        clock_error_us=recording.clock_error_us,
        operators=recording.operators,
        scheduler=recording.scheduler,
    )
    encoded = json.dumps(recording.trace).encode() + b"\n"

    def show() -> None:
        print_table(_operators_table(recording))
        events, size = len(recording.trace["traceEvents"]), len(encoded)
        said = f"The trace has {events:,} events in {size / 1e6:.1f} MB."
        if recording.scheduler:
            print_table(_scheduler_table(recording))
            said += (
                " Lanes and workers are placed among the operators to within "
                f"{recording.clock_error_us:.0f} us."
            )
        print_text(said)

    deliver(
        result,
        show,
        (trace, lambda path: path.write_bytes(encoded)),
        (json_file, partial(write_result, result)),
    )


@dataclass(frozen=True)
class _Ran:
    """What was run under the profiler.

    Attributes:
        environment: On what.
        end: How it ended.
        result: Of a command; None of a script.
    """

    environment: Environment
    end: End
    result: Bench | Train | None = None


def _workload(words: tuple[str, ...]) -> Callable[[Path], _Ran]:
    """What to profile; called with a file for its timeline."""
    if words[0] == "bench":
        command, arguments = bench, words[1:]
    elif words[0] == "train":
        command, arguments = train, words[1:]
    elif words[0].endswith(".py"):
        if not Path(words[0]).is_file():
            raise click.UsageError(f"there is no script '{words[0]}'")
        return partial(_run_script, words)
    else:
        raise click.UsageError(
            f"what follows -- must be bench, train or a Python script (.py, without "
            f"python), with its arguments, got '{' '.join(words)}'"
        )
    for option in ("--trace", "--json"):
        if any(word.partition("=")[0] == option for word in arguments):
            raise click.UsageError(f"{option} must stand before --, got it among the arguments")
    return partial(_run_command, command, arguments)


def _run_command(command: click.Command, arguments: tuple[str, ...], lanes: Path) -> _Ran:
    shown = io.StringIO()
    with TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        with profiled(), redirect_stdout(shown):  # of metrics that the profiler has spoilt
            status = command.main(
                [*arguments, "--trace", str(lanes), "--json", str(file)],
                prog_name=f"hogstream profile torch -- {command.name}",
                standalone_mode=False,
                help_option_names=["-h", "--help"],  # click keeps those that it is first run with
                default_map=_DEFAULTS[command],
            )
        if status:  # it could not write, and said so
            raise click.exceptions.Exit(status)
        if not file.exists():  # it was asked for help
            click.echo(shown.getvalue(), nl=False)
            raise click.exceptions.Exit
        result = read_result(file).result
    assert isinstance(result, (Bench, Train))
    return _Ran(result.environment, End(result.partial, result.error), result)


def _run_script(words: tuple[str, ...], lanes: Path) -> _Ran:
    Timeline().write(lanes)  # an empty one: only who makes a scheduler can give it a timeline
    before, sys.argv = sys.argv, list(words)
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise MeasurementError(f"{words[0]} ended with exit status {end.code}") from None
    finally:
        sys.argv = before
        del sys.path[0]
    device = best_device()
    backend = select_backend(None, device.type).name
    return _Ran(describe_environment(device, backend), End())


def _operators_table(recording: job.Recording) -> Table:
    table = new_table(
        "Operators, by time of their own",
        *("operator", "where", "count", "self ms", "total ms", "mean us"),
        text_columns=2,
    )
    for row in recording.operators[:_OPERATORS_SHOWN]:
        table.add_row(
            _shortened(row.name),
            row.where,
            number_text(row.count),
            number_text(row.self_us / 1e3, 2),
            number_text(row.total_us / 1e3, 2),
            number_text(row.total_us / row.count, 1),
        )
    return table


def _scheduler_table(recording: job.Recording) -> Table:
    table = new_table(
        "Scheduler",
        *("label", "policy", "lane", "count", "total ms", "mean us", "p99 us"),
        text_columns=3,
    )
    for row in recording.scheduler:
        table.add_row(
            row.label,
            row.policy,
            "all" if row.lane is None else str(row.lane),
            number_text(row.count),
            number_text(row.total_us / 1e3, 2),
            number_text(row.mean_us, 1),
            number_text(row.p99_us, 1),
        )
    return table


def _shortened(name: str) -> str:
    """A name that fits the table, without its middle: most differ at their ends."""
    return name if len(name) <= 40 else f"{name[:16]}...{name[-21:]}"
