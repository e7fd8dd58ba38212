"""The ``hogstream`` command."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

# How many streams may really run at once; CUDA reads it when it starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
# Else torch's profiler logs its own start and stop to standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

try:
    import click
    import jinja2  # noqa: F401
    import matplotlib  # noqa: F401
    import msgspec  # noqa: F401
    import rich  # noqa: F401
except ModuleNotFoundError as missing:
    sys.exit(f"hogstream: {missing.name} is not installed; pip install 'hogstream[bench]'")

from hogstream.cli import doctor as doctor_job
from hogstream.cli.bench import bench
from hogstream.cli.ceilings import show_ceilings
from hogstream.cli.compare import compare
from hogstream.cli.console import new_table, print_table
from hogstream.cli.inspect import inspect_kernels
from hogstream.cli.profile_nsight import profile
from hogstream.cli.profile_torch import torch_command
from hogstream.cli.report import report
from hogstream.cli.train import train
from hogstream.profiling.interruption import MeasurementError
from hogstream.profiling.wording import number_text


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(package_name="hogstream")
@click.pass_context
def cli(context: click.Context) -> None:
    """Asynchronous RMSprop: what going without a lock buys, and what it costs."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
def doctor() -> None:
    """Say what is installed and what works here.

    What does not work is listed with the reason.
    """
    for title, rows in (
        ("Installed", doctor_job.installed_packages()),
        ("Devices", doctor_job.check_devices()),
        ("Backends", doctor_job.check_backends()),
        ("Profilers", doctor_job.check_profilers()),
    ):
        table = new_table(title, "", "", text_columns=2)
        for name, text in rows.items():
            table.add_row(name, text)
        print_table(table)
    table = new_table("Bandwidth", "device", "copy GB/s", "update-shaped GB/s", "measured")
    for name, ceilings in doctor_job.ceilings_of_devices().items():
        rates = (
            ceilings.memory.copy_gigabytes_per_second,
            ceilings.memory.update_shaped_gigabytes_per_second,
        )
        medians = (number_text(None if rate is None else rate.median, 1) for rate in rates)
        table.add_row(name, *medians, ceilings.measured)
    print_table(table)


for command in (bench, train, compare, report, profile, show_ceilings, inspect_kernels):
    cli.add_command(command)
profile.add_command(torch_command)


def main() -> NoReturn:
    """Runs the command; bad input is one line on standard error and exit status 2."""
    try:
        cli.main(prog_name="hogstream", standalone_mode=False)
    except click.ClickException as error:
        print("hogstream:", " ".join(error.format_message().split()), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (MeasurementError, OSError) as error:
        print(f"hogstream: {error}", file=sys.stderr)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        print("hogstream: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


if __name__ == "__main__":
    main()
