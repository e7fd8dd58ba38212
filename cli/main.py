"""The entry of the ``hogstream`` command: loads what it needs, and tells how it ended."""

from __future__ import annotations

import os
import sys

try:
    from importlib.util import find_spec
    from typing import NoReturn

    from hogstream.cli.signals import ENDED, Termination, ending_at_once
except KeyboardInterrupt:
    print("hogstream: interrupted", file=sys.stderr)
    sys.exit(130)

# How many streams may really run at once; CUDA reads it when it starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
# Else torch's profiler logs its own start and stop to standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_PACKAGES = ("click", "jinja2", "matplotlib", "msgspec", "rich")


def main() -> NoReturn:
    """Runs the command, and ends the process with its exit status.

    Bad input is one line on standard error and exit status 2; SIGINT is 130, and SIGTERM 143.
    """
    with ending_at_once():
        _open_streams()
        for package in _PACKAGES:
            if find_spec(package) is None:
                sys.exit(f"hogstream: {package} is not installed; pip install 'hogstream[bench]'")
        import click

        from hogstream.cli.commands import cli
        from hogstream.profiling.errors import MeasurementError
    with Termination() as termination:
        try:
            status = cli.main(prog_name="hogstream", standalone_mode=False) or 0
            sys.stdout.flush()
        except click.ClickException as error:
            _leave(2, " ".join(error.format_message().split()))
        except BrokenPipeError:  # whoever read the output has seen enough
            _leave(1)
        except (MeasurementError, OSError) as error:
            _leave(1, str(error))
        except (click.Abort, KeyboardInterrupt):
            _leave(128 + termination.signal, ENDED[termination.signal])
        _leave(status)


def _open_streams() -> None:
    """Opens standard streams that were closed: else files that are opened next pass for them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))


def _leave(status: int, said: str = "") -> NoReturn:
    if said:
        print("hogstream:", said, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # it was told before; Python would try again as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


if __name__ == "__main__":
    main()
