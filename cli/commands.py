"""The commands, each imported when it is called: help and mistakes do not wait for torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import click

from hogstream.cli.signals import ending_at_once


class Later(NamedTuple):
    """A command that is not imported yet.

    Attributes:
        module: In ``hogstream.cli``.
        name: Of the command there.
        help: The first sentence of its own help.
    """

    module: str
    name: str
    help: str


class Group(click.Group):
    """A command of others, some of which are imported when they are called."""

    def __init__(self, *, later: dict[str, Later], **settings: Any) -> None:
        super().__init__(invoke_without_command=True, **settings)
        self.later = later

    def list_commands(self, _: click.Context) -> list[str]:
        """Their names, in order."""
        return sorted({*self.commands, *self.later})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Imports a command, if it is to be; None if there is none of the name."""
        if name not in self.later:
            return super().get_command(context, name)
        module, attribute, _ = self.later[name]
        with ending_at_once():
            found: click.Command = getattr(import_module(f"hogstream.cli.{module}"), attribute)
        return found

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists them without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._help(name)) for name in self.list_commands(context)])

    def _help(self, name: str) -> str:
        if name in self.later:
            return self.later[name].help
        return self.commands[name].get_short_help_str(limit=1 << 16)


def _help_if_alone(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    later={
        "bench": Later(
            "bench", "bench", "Measure lock-free updates against locks, and what people run today."
        ),
        "ceilings": Later("ceilings", "show_ceilings", "Say what this machine can do."),
        "compare": Later("compare", "compare", "Measure hogstream against other optimizers."),
        "decide": Later(
            "decide",
            "decide",
            "Say which way to train your own model is the fastest, and what it costs.",
        ),
        "doctor": Later("doctor", "doctor", "Say what is installed and what works here."),
        "embedding": Later(
            "embedding",
            "embedding",
            "Train vectors of words by skip-gram with negative sampling: each policy, and gensim.",
        ),
        "inspect": Later("inspect", "inspect_kernels", "Compile the kernels and say what they do."),
        "movielens": Later(
            "movielens",
            "movielens",
            "Factorise MovieLens' ratings by cross-validation: lock-free, with locks, alone, and "
            "Surprise.",
        ),
        "report": Later("report", "report", "Write a report that opens in a browser, offline."),
        "train": Later(
            "train",
            "train",
            "Train a model to a target: lock-free, with locks, with one worker alone, and by hand.",
        ),
    },
)
@click.version_option(package_name="hogstream")
@click.pass_context
def cli(context: click.Context) -> None:
    """Asynchronous RMSprop: what going without a lock buys, and what it costs."""
    _help_if_alone(context)


@cli.group(
    cls=Group,
    later={
        "ncu": Later(
            "profile_nsight",
            "profile_ncu",
            "Show with Nsight Compute what a kernel reads and writes.",
        ),
        "nsys": Later(
            "profile_nsight",
            "profile_nsys",
            "Show with Nsight Systems what overlaps, and what launches cost.",
        ),
        "read": Later("profile_nsight", "read", "Read what Nsight wrote."),
        "torch": Later(
            "profile_torch",
            "torch_command",
            "Run something under torch's profiler: its operators, and each lane and worker.",
        ),
    },
)
@click.pass_context
def profile(context: click.Context) -> None:
    """Profile updates: when they ran, and what they moved."""
    _help_if_alone(context)
