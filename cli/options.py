"""Command-line values: functions that parse and check one before anything runs.

Each function takes the text of an option and raises ``click.BadParameter`` if it cannot be
honoured; click adds the option's name. Options that several commands share are at the end.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from hogstream.cli import pictures
from hogstream.kernels.backends.select import BACKENDS, select_backend
from hogstream.kernels.operands import DTYPE_NAMES
from hogstream.profiling.environment import best_device, cuda_devices
from hogstream.profiling.measure.peers import PEERS
from hogstream.profiling.measure.shapes import MODELS, Shape
from hogstream.profiling.results.records import MOST
from hogstream.scheduler.policies import COMPILED_POLICIES, select_policy

T = TypeVar("T")

#: More threads or streams than this are a slip of the hand.
MAX_WORKERS = 1024
MAX_TENSORS = 10_000
DTYPES = tuple(DTYPE_NAMES.values())


def sizes(text: str) -> tuple[int, ...]:
    """Numbers of elements such as ``65536,2^20``; each at least 1 and below 2^40."""
    return _each(_size, text)


def row_counts(text: str) -> tuple[int, ...]:
    """Numbers of rows such as ``10^4,2^20``; each at least 1 and below 2^40."""
    return _each(partial(_size, of="rows"), text)


def worker_counts(text: str) -> tuple[int, ...]:
    """Numbers of workers such as ``1,2,4``; each from 1 to ``MAX_WORKERS``."""
    return _each(_worker_count, text)


def policies(text: str) -> tuple[str, ...]:
    """Names of policies such as ``lock-free,bounded:4``."""
    return _each(_policy, text)


def policy_or_all(text: str) -> tuple[str, ...]:
    """The name of one policy; none for ``all``."""
    return () if text == "all" else (_policy(text),)


def shapes(text: str) -> tuple[Shape, ...]:
    """What steps update, such as ``2^20,1000x2^10,gpt2``."""
    return _each(_shape, text)


def peers(text: str) -> tuple[str, ...]:
    """Names of optimizers such as ``hogstream,torch-foreach``."""
    return _each(_peer, text)


def number_above_zero(text: str) -> float:
    """A finite number > 0."""
    return _number(text, lambda value: value > 0, "> 0")


def number_from_zero(text: str) -> float:
    """A finite number >= 0."""
    return _number(text, lambda value: value >= 0, ">= 0")


def output_file(text: str) -> Path:
    """A path that can be opened for writing; the file system is left as it was."""
    path = Path(text)
    try:
        target = path.resolve()  # of a link, where it leads
        existed = path.exists()
        if existed and not (path.is_file() or path.is_dir()):  # a pipe waits to be opened
            if not os.access(path, os.W_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return path
        path.open("ab").close()
        if not existed:
            target.unlink()
    except OSError as error:
        raise click.BadParameter(f"cannot write {text!r}: {error.strerror}") from None
    return path


def replaceable_file(text: str) -> Path:
    """An output file that is a regular one, or none yet."""
    path = output_file(text)
    if path.exists() and not path.is_file():
        raise click.BadParameter(f"must be a regular file, or none yet, got {text!r}")
    return path


def page_file(text: str) -> Path:
    """An output file for a page."""
    pictures.check()
    return output_file(text)


def picture_file(text: str) -> Path:
    """An output file that ends in .png, .svg or .pdf."""
    if Path(text).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise click.BadParameter(f"must end in .png, .svg or .pdf, got {text!r}")
    return page_file(text)


def device(text: str) -> torch.device:
    """``best``, ``cpu``, ``cuda`` or ``cuda:N``, if this machine has it."""
    if text == "best":
        return best_device()
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", text)
    if match is None:
        raise click.BadParameter(f"must be best, cpu, cuda or cuda:N, got {text!r}")
    if text == "cpu":
        return torch.device("cpu")
    index, count = int(match[1] or 0), cuda_devices()
    if index >= count:
        raise click.BadParameter(f"this machine has {count} CUDA devices, got {text!r}")
    return torch.device("cuda", index)


def resolve_backend(name: str | None, device: torch.device) -> str:
    """The name of the backend to use: the one named, or the device's default."""
    try:
        return select_backend(name, device.type).name
    except (RuntimeError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint="'--backend'") from error


def _each(parse: Callable[[str], T], text: str) -> tuple[T, ...]:
    """Parses what stands between commas, once each, in order."""
    return tuple(dict.fromkeys(parse(part.strip()) for part in text.split(",")))


def _size(text: str, of: str = "elements") -> int:
    match = re.fullmatch(r"(\d{1,13})(?:\^(\d{1,2}))?", text)
    size = int(match[1]) ** int(match[2] or 1) if match else 0
    if not 1 <= size < 1 << 40:
        raise click.BadParameter(
            f"each must be a number of {of} below 2^40, such as 65536 or 2^16, got {text!r}"
        )
    return size


def _worker_count(text: str) -> int:
    if not re.fullmatch(r"\d{1,6}", text) or not 1 <= int(text) <= MAX_WORKERS:
        raise click.BadParameter(f"each must be an integer from 1 to {MAX_WORKERS}, got {text!r}")
    return int(text)


def _policy(text: str) -> str:
    try:
        return select_policy(text).name
    except ValueError as error:
        raise click.BadParameter(str(error).partition(" ")[2]) from None


def _shape(text: str) -> Shape:
    if text in MODELS:
        return MODELS[text]()
    count, _, size = text.rpartition("x")
    try:
        tensors, elements = _size(count or "1"), _size(size)
    except click.BadParameter:
        tensors, elements = 0, 0
    if not 1 <= tensors <= MAX_TENSORS:
        raise click.BadParameter(
            f"each must be {', '.join(MODELS)}, a number of elements below 2^40, such as "
            f"65536 or 2^16, or up to {MAX_TENSORS:,} tensors of it such as 1000x2^16, got {text!r}"
        )
    return Shape(text, ((elements,),) * tensors)


def _peer(text: str) -> str:
    if text not in PEERS:
        raise click.BadParameter(f"each must be one of {', '.join(PEERS)}, got {text!r}")
    return text


def _number(text: str, holds: Callable[[float], bool], allowed: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and holds(value)):
        raise click.BadParameter(f"must be a finite number {allowed}, got {text!r}")
    if value > MOST:  # which no result file holds
        raise click.BadParameter(f"must be at most {MOST:g}, got {text!r}")
    return value


# Options that several commands share.
DEVICE = click.option(
    "--device",
    type=device,
    metavar="DEVICE",
    default="best",
    show_default=True,
    help="best, cpu, cuda or cuda:N. best is CUDA if there is one.",
)
BACKEND = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    help="Which kernels.  [default: the best for the device]",
)
COMPILED_POLICY = click.option(
    "--policy",
    "policies",
    type=click.Choice(("all", *COMPILED_POLICIES)),
    callback=lambda _context, _param, given: COMPILED_POLICIES if given == "all" else (given,),
    default="all",
    show_default=True,
    help="What an update waits for.",
)
SEED = click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of all random input.",
)
JSON = click.option(
    "--json",
    "json_file",
    type=output_file,
    metavar="FILE",
    help="Write results to this file.",
)


def plot_option(what: str) -> Callable[[Any], Any]:
    """``--plot``, which saves a picture of what a command found out."""
    return click.option(
        "--plot",
        type=picture_file,
        metavar="FILE",
        help=f"Save {what}: .png, .svg or .pdf.",
    )


TRACE = click.option(
    "--trace",
    type=replaceable_file,
    metavar="FILE",
    help="Write what each lane and worker did, for ui.perfetto.dev, to this file.",
)
PROCESSES = click.option(
    "--processes",
    type=click.IntRange(1, MAX_WORKERS),
    default=1,
    show_default=True,
    help="Spread workers over so many: --workers is of each. For lock-free, locked and awaited.",
)
