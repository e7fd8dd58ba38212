"""How ``bench`` and ``train`` have the scheduler run: options that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click
import torch

from hogstream.cli.options import seconds_above_zero
from hogstream.scheduler import SharedParameters, StreamScheduler
from hogstream.scheduler.policies import POLICIES, select_policy
from hogstream.scheduler.processes.scheduler import POLICIES as PROCESS_POLICIES

Command = Callable[..., None]


@dataclass(frozen=True)
class Scheduling:
    """Arguments of ``StreamScheduler``, which documents them; but for the policy and workers."""

    depth: int = 1
    batch: int = 1
    batch_of: str = "lane"
    state: str = "shared"
    read: str = "live"
    staleness_aware: bool = False
    telemetry: bool = False
    on_error: str = "stop"
    on_nonfinite: str = "apply"
    deadline: float | None = None

    def batch_with(self, policy: str) -> int:
        """The batch with a policy: 1 if it waits for each update, to be compared with nonetheless.

        Args:
            policy: Its name.
        """
        chosen = select_policy(policy)
        return 1 if chosen.exclusive or chosen.bound is not None else self.batch

    def arguments(self, policy: str) -> dict[str, Any]:
        """Keyword arguments of ``StreamScheduler`` with a policy."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**own, "policy": policy, "batch": self.batch_with(policy)}

    def check(
        self,
        policies: Iterable[str],
        workers: Iterable[int],
        processes: int,
        device: torch.device,
        backend: str,
    ) -> None:
        """Checks that all policies can run so, with every worker count; starts nothing.

        Raises:
            click.BadParameter: If one cannot; names the option.
        """
        allowed = policies_over(processes)
        if processes > 1 and not set(policies) <= set(allowed):
            raise click.BadParameter(
                f"must be 1 with policies other than {' and '.join(allowed)}, got {processes}",
                param_hint="'--processes'",
            )
        if self.batch > 1 and all(self.batch_with(policy) == 1 for policy in policies):
            raise click.BadParameter(
                f"must be 1 with {', '.join(policies)}, which waits for each update, "
                f"got {self.batch}",
                param_hint="'--batch'",
            )
        shared = SharedParameters({"flat": torch.zeros(1, device=device)})
        for policy in policies:
            for count in workers:
                try:
                    StreamScheduler(
                        shared, workers=count, backend=backend, **self.arguments(policy)
                    )
                except (ValueError, RuntimeError) as error:
                    name, _, rest = str(error).partition(" ")
                    option = f"'--{name.replace('_', '-')}'"
                    raise click.BadParameter(rest, param_hint=option) from error


def policies_over(processes: int) -> tuple[str, ...]:
    """The policies to compare if none are named, with workers spread over so many processes."""
    return tuple(POLICIES) if processes == 1 else PROCESS_POLICIES


def check_outputs_over(processes: int, outputs: dict[str, Path | None]) -> None:
    """Checks that nothing is asked for that workers in other processes do not tell.

    Args:
        processes: How many there are.
        outputs: What they do not tell, by option.

    Raises:
        click.UsageError: If something is.
    """
    for option, path in outputs.items():
        if processes > 1 and path is not None:
            raise click.UsageError(f"{option} needs --processes 1, got {processes}")


def scheduling_options(depth: int) -> Callable[[Command], Command]:
    """Adds the options to a command, which gets them as ``scheduling``.

    Args:
        depth: The default of ``--depth``.
    """

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**values: Any) -> None:
            chosen = {each.name: values.pop(each.name) for each in fields(Scheduling)}
            if chosen["depth"] is None:
                least = chosen["batch"] if chosen["batch_of"] == "lane" else 1
                chosen["depth"] = max(depth, least)
            command(scheduling=Scheduling(**chosen), **values)

        decorated: Command = run
        for option in reversed(_options(depth)):
            decorated = option(decorated)
        return decorated

    return decorate


def _options(depth: int) -> list[Callable[[Command], Command]]:
    return [
        click.option(
            "--depth",
            type=click.IntRange(min=1),
            show_default=f"{depth}, or as many as a batch of one lane",
            help="How many updates of one worker may be in flight.",
        ),
        click.option(
            "--batch",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="How many updates are handed over at once. locked and bounded:K, which wait for "
            "each update, are compared without.",
        ),
        _choice("--batch-of", "lane", "lanes", text="A batch is of one worker, or of all."),
        _choice("--state", "shared", "per-worker", text="One ms for all, or each worker its own."),
        _choice("--read", "live", "snapshot", text="Workers read live parameters, or a copy."),
        click.option(
            "--staleness-aware", is_flag=True, help="Divide lr by the staleness of each update."
        ),
        click.option("--telemetry", is_flag=True, help="Count lost updates in the kernel."),
        _choice(
            *("--on-error", "stop", "continue", "restart"),
            text="When a worker fails: stop all, go on without it, or start it again.",
        ),
        _choice(
            *("--on-nonfinite", "apply", "skip", "raise"),
            text="When a gradient is not finite: apply it, skip it, or fail its worker.",
        ),
        click.option(
            "--deadline",
            type=seconds_above_zero,
            metavar="SECONDS",
            show_default="none",
            help="A worker that takes longer between two waits has failed.",
        ),
    ]


def _choice(option: str, *choices: str, text: str) -> Callable[[Command], Command]:
    """An option that takes one of some words, the first by default."""
    return click.option(
        option, type=click.Choice(choices), default=choices[0], show_default=True, help=text
    )
