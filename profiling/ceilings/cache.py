"""What was measured of a machine once, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hogstream.profiling.capture import is_profiled
from hogstream.profiling.environment import describe_machine
from hogstream.profiling.results.user_cache import cache_folder
from hogstream.profiling.turns import COPY, LAUNCHES, TURNS, UPDATE_SHAPED
from hogstream.scheduler.files import replace_file

#: Of the files: another one whenever something else is measured, or in another way.
SCHEMA = 1


def remember(
    device: torch.device, measure: Callable[[], dict[str, Any]], *, fresh: bool
) -> dict[str, Any]:
    """Reads a machine's ceilings from the cache folder, or measures and writes them.

    A file that cannot be used is measured anew and replaced, and one that cannot be written is left
    out; either is said on standard error. What is measured under a profiler is not kept.

    Args:
        device: What they are of.
        measure: Measures them.
        fresh: Whether to measure in any case.
    """
    machine, path = describe_machine(device), cache_file(device)
    kept = None if fresh or path is None else _read(path, machine)
    if kept is not None:
        return kept
    ceilings = measure()
    if not is_profiled():
        _write(path, {"schema": SCHEMA, "machine": machine, **ceilings})
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


def _read(path: Path, machine: dict[str, Any]) -> dict[str, Any] | None:
    """The ceilings in a file; None if there is none, or none that can be used, which is said."""
    try:
        content = json.loads(path.read_bytes())
        if content["schema"] != SCHEMA:
            raise ValueError("it is of another version of hogstream")
        if content["machine"] != machine:
            raise ValueError("it is of another machine")
        _check(content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        _say(f"measuring ceilings anew, as {path} cannot be used: {error}")
        return None
    except (KeyError, TypeError):
        _say(f"measuring ceilings anew, as {path} cannot be used: it is not whole")
        return None
    return {name: content[name] for name in ("measured", "levels", LAUNCHES, TURNS)}


def _write(path: Path | None, content: dict[str, Any]) -> None:
    """Keeps ceilings in a file; if that is not possible, says so."""
    if path is None:
        _say("ceilings are measured each time, as there is no home folder to keep them in")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            file.write(json.dumps(content, indent=1, allow_nan=False).encode())
    except OSError as error:
        _say(f"ceilings are measured each time, as they cannot be kept: {error}")


def _check(ceilings: dict[str, Any]) -> None:
    """Raises ``ValueError``, ``KeyError`` or ``TypeError`` if anything is missing or no number."""
    datetime.fromisoformat(ceilings["measured"])
    rates = [ceilings[LAUNCHES], ceilings[TURNS]]
    if not ceilings["levels"]:
        raise ValueError("it has no level of memory")
    for level in ceilings["levels"]:
        rates += [level[name] for name in (COPY, UPDATE_SHAPED) if level[name] is not None]
        sizes = level["bytes"], level["threads"] or 1, level["cache_bytes"] or 1
        if not isinstance(level["level"], str) or min(sizes) < 1:
            raise ValueError("it has a level without a name or size")
    for rate in rates:
        low, high = rate["interval"] or (0, math.inf)
        if not low <= rate["median"] <= high or not all(sample > 0 for sample in rate["samples"]):
            raise ValueError("it has a rate that is none")


@cache
def _say(sentence: str) -> None:
    """Says something on standard error, once."""
    print(f"hogstream: {sentence}", file=sys.stderr)
