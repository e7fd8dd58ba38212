"""The best that was seen of a machine, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct

from hogstream.profiling.capture import is_profiled
from hogstream.profiling.ceilings.raising import higher
from hogstream.profiling.environment import describe_machine
from hogstream.profiling.results.files import BadResultError, decoded, encoded
from hogstream.profiling.results.last import cache_folder
from hogstream.profiling.results.records import Ceilings
from hogstream.scheduler.files import replace_file

#: Of the files: another one whenever something else is measured, or in another way.
SCHEMA = 5


class _Kept(Struct, forbid_unknown_fields=True):
    """What a file holds.

    Attributes:
        schema: ``SCHEMA`` of the version that wrote it.
        machine: As ``describe_machine`` told it.
        ceilings: What was measured.
    """

    schema: int
    machine: dict[str, Any]
    ceilings: Ceilings


def remember(device: torch.device, measure: Callable[[], Ceilings], *, fresh: bool) -> Ceilings:
    """Reads a machine's ceilings from the cache folder, or measures and writes them.

    A file that cannot be used is measured anew and replaced, and one that cannot be written is left
    out; either is said on standard error. What is measured under a profiler is not kept.

    Args:
        device: What they are of.
        measure: Measures them.
        fresh: Whether to measure in any case; what was kept stays where it is higher.
    """
    kept = recall(device)
    if kept is not None and not fresh:
        return kept
    return keep(device, measure())


def recall(device: torch.device) -> Ceilings | None:
    """The ceilings of a machine as they are kept; None if there are none that can be used."""
    path = cache_file(device)
    return None if path is None else _read(path, describe_machine(device))


def keep(device: torch.device, ceilings: Ceilings) -> Ceilings:
    """Keeps ceilings of a machine, as far as those that are kept are no higher.

    Returns:
        The higher of each.
    """
    machine, path = describe_machine(device), cache_file(device)
    kept = None if path is None else _read(path, machine)
    if kept is not None:
        ceilings = higher(kept, ceilings)
    if ceilings != kept and not is_profiled():
        _write(path, _Kept(SCHEMA, machine, ceilings))
    return ceilings


def cache_file(device: torch.device) -> Path | None:
    """Where the ceilings of a device of this machine are kept: other versions, another file.

    Returns:
        None if there is no folder for it.
    """
    folder = cache_folder()
    if folder is None:
        return None
    machine = json.dumps(describe_machine(device), sort_keys=True)
    key = hashlib.sha256(machine.encode()).hexdigest()[:16]
    return folder / f"ceilings-{device.type}-{key}.json"


def _read(path: Path, machine: dict[str, Any]) -> Ceilings | None:
    """The ceilings in a file; None if there is none, or none that can be used, which is said."""
    try:
        kept = decoded(path.read_bytes(), _Kept)
        if kept.schema != SCHEMA:
            raise BadResultError("it is of another version of hogstream")
        if kept.machine != machine:
            raise BadResultError("it is of another machine")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, BadResultError) as error:
        _say(f"the ceilings kept in {path} cannot be used: {error}")
        return None
    return kept.ceilings


def _write(path: Path | None, kept: _Kept) -> None:
    """Keeps ceilings in a file; if that is not possible, says so."""
    if path is None:
        _say("ceilings are measured each time, as there is no home folder to keep them in")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            file.write(encoded(kept))
    except OSError as error:
        _say(f"ceilings are measured each time, as they cannot be kept: {error}")


@cache
def _say(sentence: str) -> None:
    """Says something on standard error, once."""
    print(f"hogstream: {sentence}", file=sys.stderr)
