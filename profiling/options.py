"""Command-line values: parsed and checked before anything runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from hogstream.kernels.backends import select_backend
from hogstream.profiling.environment import best_device
from hogstream.scheduler.policies import POLICIES

DTYPES = ("float16", "bfloat16", "float32", "float64")


class ListOf(click.ParamType):
    """Comma-separated values, each parsed by a function that raises ValueError; no duplicates."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Parses ``value`` unless it is parsed already."""
        if isinstance(value, tuple):
            return value
        try:
            values = [self._parse(part.strip()) for part in value.split(",")]
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return tuple(dict.fromkeys(values))


class Number(click.ParamType):
    """A finite number in a range; unlike ``click.FloatRange`` it refuses NaN and infinity."""

    name = "number"

    def __init__(self, *, above: float = -math.inf, at_least: float = -math.inf) -> None:
        self._above = above
        self._at_least = at_least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parses ``value``."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (self._above < number < math.inf and number >= self._at_least):
            bound = f"> {self._above:g}" if self._above > -math.inf else f">= {self._at_least:g}"
            self.fail(f"must be a finite number {bound}, got {value!r}", param, ctx)
        return number


class OutputFile(click.ParamType):
    """A path to write to; found out now, not after the run."""

    name = "file"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        """Checks that the file can be opened for writing, and leaves things as they were."""
        path = Path(value)
        existed = path.exists()
        try:
            path.open("ab").close()
        except OSError as error:
            self.fail(f"cannot write {value!r}: {error.strerror}", param, ctx)
        if not existed:
            path.unlink()
        return path


class Device(click.ParamType):
    """A device that is there."""

    name = "device"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> torch.device:
        """Resolves ``best``, ``cpu``, ``cuda`` or ``cuda:N``."""
        if isinstance(value, torch.device):
            return value
        if value == "best":
            return best_device()
        match = re.fullmatch(r"cpu|cuda(?::(\d+))?", value)
        if match is None:
            self.fail(f"must be best, cpu, cuda or cuda:N, got {value!r}", param, ctx)
        if value == "cpu":
            return torch.device("cpu")
        index, count = int(match[1] or 0), torch.cuda.device_count()
        if index >= count:
            there = f"{count} CUDA devices, counted from 0" if count else "no CUDA device"
            self.fail(f"must be a device of this machine, which has {there}, got {value!r}")
        return torch.device("cuda", index)


def parse_size(text: str) -> int:
    """A number of elements: ``65536`` or ``2^16``; at least 1 and below 2^40.

    Raises:
        ValueError: If it is anything else.
    """
    match = re.fullmatch(r"(\d+)(?:\^(\d{1,2}))?", text)
    size = int(match[1]) ** int(match[2] or 1) if match else 0
    if not 1 <= size < 1 << 40:
        raise ValueError(f"each must be a number of elements such as 65536 or 2^16, got {text!r}")
    return size


def parse_workers(text: str) -> int:
    """A number of workers, at least 1.

    Raises:
        ValueError: If it is anything else.
    """
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) < 1:
        raise ValueError(f"each must be an integer >= 1, got {text!r}")
    return int(text)


def parse_policy(text: str) -> str:
    """The name of a policy.

    Raises:
        ValueError: If there is no such policy.
    """
    if text not in POLICIES:
        raise ValueError(f"each must be one of {', '.join(POLICIES)}, got {text!r}")
    return text


def resolve_backend(name: str | None, device: torch.device) -> str:
    """The name of the backend to use.

    Raises:
        click.BadParameter: If the backend is unknown, missing, or not for this device.
    """
    try:
        return select_backend(name, device.type).name
    except (RuntimeError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint="'--backend'") from error
