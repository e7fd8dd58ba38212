"""How ``bench`` and ``train`` have the scheduler run: options made from its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field, replace
from functools import wraps
from typing import Any

import click
import torch
from click.core import ParameterSource

from hogstream.cli.options import number_above_zero
from hogstream.profiling.results.gains import CONTENDER
from hogstream.scheduler import SchedulerSettings, SettingError
from hogstream.scheduler.policies import DENSE_POLICIES, select_policy
from hogstream.scheduler.processes.scheduler import POLICIES as PROCESS_POLICIES
from hogstream.scheduler.settings import OPTIONS

Command = Callable[..., None]

_NOT_BATCHED = "awaited and bounded:K, which wait for each update, are compared without."


def policies_over(processes: int) -> tuple[str, ...]:
    """The policies to compare if none are named, with workers spread over so many processes."""
    return DENSE_POLICIES if processes == 1 else PROCESS_POLICIES


def scheduling_options(depth: str) -> Callable[[Command], Command]:
    """Adds the options to a command, which gets as ``scheduling``, by setting, those given.

    Args:
        depth: The default of ``--depth``, in words.
    """

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**values: Any) -> None:
            source = click.get_current_context().get_parameter_source
            chosen = {each.name: values.pop(each.name) for each in OPTIONS}
            given = {
                name: value
                for name, value in chosen.items()
                if source(name) is not ParameterSource.DEFAULT
            }
            command(scheduling=given, **values)

        decorated: Command = run
        for setting in reversed(OPTIONS):
            decorated = _option(setting, depth)(decorated)
        return decorated

    return decorate


def make_settings(
    base: SchedulerSettings,
    scheduling: dict[str, Any],
    policies: Sequence[str],
    workers: Sequence[int],
    processes: int,
    device: torch.device,
    backend: str,
) -> SchedulerSettings:
    """The settings, checked: all policies can run so, with every worker count.

    Args:
        base: What is not asked for otherwise.
        scheduling: As from ``scheduling_options``.
        policies: Names of those to be run.
        workers: Worker counts.
        processes: How many the workers are spread over.
        device: Where.
        backend: Which kernels.

    Returns:
        With the least of the worker counts, and the default policy: ``with_policy`` gives others.

    Raises:
        click.BadParameter: If one cannot; names the option.
    """
    allowed = policies_over(processes)
    if processes > 1 and not set(policies) <= set(allowed):
        raise click.BadParameter(
            f"must be 1 with policies other than {', '.join(allowed)}, got {processes}",
            param_hint="'--processes'",
        )
    batch = scheduling.get("batch", base.batch)
    if batch > 1 and not any(select_policy(policy).takes_batches for policy in policies):
        raise click.BadParameter(
            f"must be 1 with {', '.join(policies)}, which waits for each update, got {batch}",
            param_hint="'--batch'",
        )
    # As many updates in flight as a batch of one lane has, if nobody says how many.
    least = batch if scheduling.get("batch_of", base.batch_of) == "lane" else 1
    chosen = {"depth": max(base.depth, least), **scheduling}
    try:
        settings = replace(base, workers=min(workers), policy=CONTENDER, backend=backend, **chosen)
        settings.select_backend(device.type)
    except SettingError as error:
        raise click.BadParameter(error.reason, param_hint=f"'{_name(error.name)}'") from error
    return settings


def _option(setting: Field[Any], depth: str) -> Callable[[Command], Command]:
    """The option of a setting: its name, choices, default and help."""
    text = setting.metadata["help"]
    if setting.name == "depth":
        return click.option(
            _name(setting.name),
            type=click.IntRange(min=1),
            show_default=f"{depth}, or as many as a batch of one lane",
            help=text,
        )
    if setting.name == "deadline":
        return click.option(
            _name(setting.name),
            type=number_above_zero,
            metavar="SECONDS",
            show_default="none",
            help=text,
        )
    if isinstance(setting.default, bool):
        return click.option(_name(setting.name), is_flag=True, help=text)
    choices = setting.metadata.get("choices")
    return click.option(
        _name(setting.name),
        type=click.Choice(choices) if choices else click.IntRange(min=1),
        default=setting.default,
        show_default=True,
        help=f"{text} {_NOT_BATCHED}" if setting.name == "batch" else text,
    )


def _name(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"
