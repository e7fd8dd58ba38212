"""Reading the JSON output of ``bench``, ``train`` and ``compare``, which may come from anywhere."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hogstream.profiling.environment import SCHEMA
from hogstream.profiling.results.confidence import median_interval

KINDS = ("bench", "train", "compare")
_LARGEST, _SMALLEST = 1e18, 1e-18  # beyond them arithmetic overflows, and nothing was measured


class BadResultError(ValueError):
    """A file is not what a command wrote; the message names it and says what is wrong."""


@dataclass(frozen=True)
class ResultFile:
    """The JSON output of a command.

    Attributes:
        name: Of the file, as it was given.
        kind: One of ``KINDS``.
        result: The JSON output.
    """

    name: str
    kind: str
    result: dict[str, Any]


def read_result(path: Path) -> ResultFile:
    """Reads and checks a file.

    Raises:
        BadResultError: As ``parse_result`` does, and if the file cannot be read.
    """
    try:
        return parse_result(path.read_text("utf-8-sig"), str(path))
    except OSError as error:
        raise BadResultError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadResultError(f"{path}: is not text in UTF-8") from None


def parse_result(text: str, name: str) -> ResultFile:
    """Checks the JSON output of a command, so that whoever uses it meets no surprise.

    Args:
        text: The JSON. What may be missing, as older files lack it, is null in what is returned.
        name: Of the file.

    Raises:
        BadResultError: If it is not JSON of a command, or of another schema, or not whole.
    """
    try:
        result = json.loads(text, parse_constant=_refuse, parse_float=_float, parse_int=_int)
        kind = _kind(result)
        _check(result, _FORMS[kind], "")
        if kind == "bench":
            _check_bench(result)
        elif kind == "compare":
            _check_compare(result)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise BadResultError(f"{name}: is not JSON, or cut short: {error.msg} at {where}") from None
    except RecursionError:
        raise BadResultError(f"{name}: is nested too deeply") from None
    except BadResultError as error:
        raise BadResultError(f"{name}: {error}") from None
    return ResultFile(name, kind, result)


def _kind(result: Any) -> str:
    if not isinstance(result, dict) or not isinstance(result.get("results"), list):
        raise BadResultError("is JSON, but not of hogstream bench, train or compare")
    if result.get("schema") != SCHEMA:
        raise BadResultError(f"schema must be {SCHEMA}, got {_told(result.get('schema'))}")
    if not result["results"]:
        raise BadResultError("results holds nothing")
    first = result["results"][0]
    for kind, key in (("compare", "peer"), ("train", "losses"), ("bench", "policy")):
        if isinstance(first, dict) and key in first:
            return kind
    raise BadResultError("is JSON, but not of hogstream bench, train or compare")


def _refuse(constant: str) -> float:
    raise BadResultError(f"holds {constant}, which is no number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadResultError(f"holds {text[:20]}, which is no number that can be used")
    return value


def _int(text: str) -> int:
    if len(text) > 19:
        raise BadResultError(f"holds {text[:20]}..., which is no number that can be used")
    return int(text)


# What a value must look like: a dictionary by key ("key?" may be missing or null, "key~" may be
# missing), a list of one form for all entries, or a function that tells what it must be, if it is
# not.


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "text"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _number(value: Any) -> str | None:
    """From 0 on."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "a number"
    if value == 0 or _SMALLEST <= value <= _LARGEST:
        return None
    return f"0 or from {_SMALLEST:g} to {_LARGEST:g}"


def _above_zero(value: Any) -> str | None:
    return _number(value) or ("above 0" if value == 0 else None)


def _count(value: Any) -> str | None:
    return None if type(value) is int and 0 <= value < 1 << 53 else "a whole number from 0 on"


def _size(value: Any) -> str | None:
    return None if type(value) is int and 1 <= value < 1 << 53 else "a whole number from 1 on"


def _some(value: Any) -> str | None:
    """A list of numbers above 0, at least one: samples."""
    if not isinstance(value, list) or not value:
        return "a list of numbers"
    return next(filter(None, map(_number, value)), None) and "a list of numbers from 0 on"


def _pair(value: Any) -> str | None:
    return None if not _some(value) and len(value) == 2 else "two numbers from 0 on"


def _losses(value: Any) -> str | None:
    return (
        None
        if isinstance(value, list) and not any(map(_pair, value))
        else "a list of seconds and losses"
    )


def _texts(value: Any) -> str | None:
    fits = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    return None if fits else "text by name"


def _ages(value: Any) -> str | None:
    """The histogram of staleness."""
    fits = isinstance(value, dict) and all(
        age.isascii() and age.isdigit() and len(age) < 16 and not _count(count)
        for age, count in value.items()
    )
    return None if fits else "counts by staleness"


def _histogram(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "edges_us and counts"
    edges, counts = (value.get(key) or [] for key in ("edges_us", "counts"))
    if _some(edges) or not isinstance(counts, list) or any(map(_count, counts)):
        return "numbers as edges_us and whole ones as counts"
    if len(edges) != len(counts) + 1 or sorted(edges) != edges:
        return "rising edges_us, one more than there are counts"
    return None


_SPREAD = {"median": _above_zero, "interval?": _pair, "samples?": _some}
_ENVIRONMENT = {"device": _text, "device_name": _text, "backend": _text, "cores": _size}
_STALENESS = {"mean?": _number, "p50?": _number, "p99?": _number, "max?": _number}
_RUN = {
    "policy": _text,
    "workers": _size,
    "elements": _size,
    "dtype?": _text,
    "batch~": _size,
    "updates_per_second": _number,
    "gigabytes_per_second": _number,
    "latency_us": {"p50?": _number, "p90?": _number, "p99?": _number, "histogram?": _histogram},
    "staleness": {**_STALENESS, "histogram?": _ages},
    "lost_updates_fraction?": _number,
    "overwrites_per_update?": _number,
    "failures~": _texts,
    "share_of_ceilings?": {
        "level?": _text,
        "bandwidth?": _number,
        "launch_rate?": _number,
        "event_loop_rate?": _number,
    },
}
_MACHINE = {
    "measured?": _text,
    "levels?": [
        {
            "level": _text,
            "bytes?": _size,
            "threads?": _size,
            "copy_gigabytes_per_second?": _SPREAD,
            "update_shaped_gigabytes_per_second?": _SPREAD,
        }
    ],
    "launches_per_second?": _SPREAD,
    "event_loop_turns_per_second?": _SPREAD,
}
_SETTINGS = {"processes~": _size, "batch~": _size, "batch_of~": _text, "sweep?": _flag}
_WHOLE = {
    "command": _text,
    "partial?": _flag,
    "error?": _text,
    "environment": _ENVIRONMENT,
    "warnings~": [_text],
}
_FORMS: dict[str, Any] = {
    "bench": {
        **_WHOLE,
        "settings": {**_SETTINGS, "depth": _size},
        "ceilings": {
            "copy_gigabytes_per_second": _above_zero,
            "update_shaped_gigabytes_per_second": _above_zero,
            **_MACHINE,
        },
        "kernels": [
            {
                "name": _text,
                "elements": _size,
                "milliseconds": _above_zero,
                "gigabytes_per_second": _above_zero,
                "differing_bits?": _count,
                "milliseconds_interval?": _pair,
                "milliseconds_of_rounds?": _some,
            }
        ],
        "results": [
            {
                **_RUN,
                "updates_per_second_of_rounds": _some,
                "gain_over_locked?": _number,
                "gain_over_ordered?": _number,
            }
        ],
        "telemetry_cost?": [
            {
                "elements": _size,
                "workers": _size,
                "ratio?": _number,
                "ratio_interval?": _pair,
                "lowest?": _number,
                "highest?": _number,
            }
        ],
    },
    "train": {
        **_WHOLE,
        "settings": _SETTINGS,
        "ceilings?": _MACHINE,
        "results": [
            {
                **_RUN,
                "test_accuracy": _number,
                "final_loss": _number,
                "seconds": _number,
                "training_seconds~": _number,
                "training_seconds_interval?": _pair,
                "training_seconds_of_rounds~": _some,
                "updates_per_second_of_rounds~": _some,
                "losses": _losses,
            }
        ],
    },
    "compare": {
        **_WHOLE,
        "settings": {"shapes": [_text]},
        "results": [
            {
                "shape": _text,
                "tensors": _size,
                "elements": _size,
                "peer": _text,
                "milliseconds": _above_zero,
                "milliseconds_interval?": _pair,
                "milliseconds_of_rounds": _some,
                "bytes_per_element": _size,
                "operations_per_element": _count,
                "gigabytes_per_second": _above_zero,
                "share_of_ceiling?": _number,
                "time_against_hogstream?": _number,
                "launches?": _count,
                "host_us?": _number,
            }
        ],
        "skipped": [{"shape": _text, "peer": _text, "reason": _text}],
    },
}


def _check(value: Any, form: Any, where: str) -> None:
    if isinstance(form, dict):
        if not isinstance(value, dict):
            raise BadResultError(f"{where or 'it'} must be an object, got {_told(value)}")
        for key, inner in form.items():
            name = key.rstrip("?~")
            path = f"{where}.{name}" if where else name
            if name not in value and key.endswith("~"):
                continue
            if value.get(name) is None:
                if key.endswith("?"):
                    value[name] = None  # so that readers need not tell missing from null
                    continue
                raise BadResultError(f"{path} is missing")
            _check(value[name], inner, path)
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise BadResultError(f"{where} must be a list, got {_told(value)}")
        for index, entry in enumerate(value):
            _check(entry, form[0], f"{where}[{index}]")
    elif wanted := form(value):
        raise BadResultError(f"{where} must be {wanted}, got {_told(value)}")


def _check_bench(bench: dict[str, Any]) -> None:
    """Checks what entries have to do with one another."""
    settings, rounds, seen = bench["settings"], dict[tuple[int, int], int](), set()
    if settings.get("batch", 1) > 1 and "batch_of" not in settings:
        raise BadResultError("settings.batch_of is missing")
    for index, cost in enumerate(bench["telemetry_cost"] or ()):
        if cost["ratio_interval"] is None:  # older files gave the range over the rounds
            cost["ratio_interval"] = [cost["lowest"], cost["highest"]]
        if cost["ratio"] is not None and None in cost["ratio_interval"]:
            raise BadResultError(f"telemetry_cost[{index}] lacks the interval of its ratio")
    for index, result in enumerate(bench["results"]):
        result.setdefault("batch", 1)
        here, mine = (result["elements"], result["workers"]), result["updates_per_second_of_rounds"]
        if rounds.setdefault(here, len(mine)) != len(mine):  # as policies took turns
            raise BadResultError(
                f"results[{index}].updates_per_second_of_rounds must hold {rounds[here]} rounds, "
                f"as those of other policies do, got {len(mine)}"
            )
        if (result["policy"], *here) in seen:
            raise BadResultError(
                f"results[{index}] is of the same policy, workers and elements as another"
            )
        seen.add((result["policy"], *here))


def _check_compare(compare: dict[str, Any]) -> None:
    """Checks that optimizers took turns: at one shape all have as many rounds."""
    rounds: dict[str, int] = {}
    for index, result in enumerate(compare["results"]):
        samples = result["milliseconds_of_rounds"]
        if rounds.setdefault(result["shape"], len(samples)) != len(samples):
            raise BadResultError(
                f"results[{index}].milliseconds_of_rounds must hold {rounds[result['shape']]} "
                f"rounds, as those of other optimizers do, got {len(samples)}"
            )
        if result["milliseconds_interval"] is None:  # older files gave quartiles
            interval = median_interval(samples)
            bounded = math.isfinite(interval.high)
            ends = [interval.low, interval.high] if bounded else 2 * [interval.median]
            result["milliseconds_interval"] = ends


def _told(value: Any) -> str:
    """A value in few words: it may be as large as the file."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
