"""Reading and writing result files; one that is read may come from anywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from hogstream.profiling.results.embedding_schema import Embedding
from hogstream.profiling.results.movielens_schema import MovieLens
from hogstream.profiling.results.profile_schema import (
    GpuRun,
    Inspection,
    NcuProfile,
    NsysProfile,
    TorchProfile,
)
from hogstream.profiling.results.records import SCHEMA
from hogstream.profiling.results.rows_schema import RowBench
from hogstream.profiling.results.schema import (
    Bench,
    Compare,
    Decision,
    MachineCeilings,
    ModelRates,
    Train,
)

T = TypeVar("T")

#: What a file may say.
AnyResult = (
    Bench
    | RowBench
    | Train
    | Decision
    | Compare
    | ModelRates
    | MovieLens
    | Embedding
    | MachineCeilings
    | Inspection
    | NsysProfile
    | NcuProfile
    | TorchProfile
    | GpuRun
)
Reported = Bench | Train | Compare
#: What ``hogstream report`` shows, by its kind.
KINDS: dict[str, type[Reported]] = {"bench": Bench, "train": Train, "compare": Compare}

# How msgspec calls what JSON is made of, and how we do.
_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "object": "an object",
    "str": "text",
}


class BadResultError(ValueError):
    """A file is not what a command wrote; the message names it and says what is wrong."""


@dataclass(frozen=True)
class ResultFile:
    """What a command wrote.

    Attributes:
        name: Of the file, as it was given.
        result: What it says.
    """

    name: str
    result: Reported

    @property
    def kind(self) -> str:
        """Of which command it is: one of ``KINDS``."""
        return kind_of(self.result)


def kind_of(result: Reported) -> str:
    """Of which command a result is: one of ``KINDS``."""
    return next(kind for kind, each in KINDS.items() if isinstance(result, each))


def read_result(path: Path) -> ResultFile:
    """Reads a file of ``bench``, ``train`` or ``compare``.

    Raises:
        BadResultError: As ``parse_result`` does, and if the file cannot be read.
    """
    try:
        return parse_result(path.read_text("utf-8"), str(path))
    except OSError as error:
        raise BadResultError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadResultError(f"{path}: is not text in UTF-8") from None


def parse_result(text: str, name: str) -> ResultFile:
    """Reads what ``bench``, ``train`` or ``compare`` wrote.

    Args:
        text: The JSON.
        name: Of the file.

    Raises:
        BadResultError: If it is no JSON of these, or of another schema, or not whole.
    """
    try:
        return ResultFile(name, decoded(text, _type_of(text)))
    except BadResultError as error:
        raise BadResultError(f"{name}: {error}") from None


def decoded(text: str | bytes, type_: type[T]) -> T:
    """What JSON says, as a type.

    Raises:
        BadResultError: If it says something else; names the field.
    """
    try:
        return msgspec.json.decode(text, type=type_)
    except msgspec.ValidationError as error:
        raise BadResultError(_plainly(str(error))) from None
    except msgspec.DecodeError as error:
        raise BadResultError(f"is not JSON, or cut short: {error}") from None
    except UnicodeDecodeError:
        raise BadResultError("is not text in UTF-8") from None
    except RecursionError:
        raise BadResultError("is nested too deeply") from None


def encoded(value: msgspec.Struct) -> bytes:
    """JSON with a line for each entry, which ends in a line feed."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def write_result(result: AnyResult, path: Path) -> None:
    """Writes what a command found out, as ``--json`` does."""
    path.write_bytes(encoded(result))


class _Head(msgspec.Struct):
    """What tells of which command a file is; the rest is read when that is known."""

    schema: int | None = None
    kind: str | None = None


def _type_of(text: str) -> type[Reported]:
    head = decoded(text, _Head)
    if head.schema != SCHEMA and head != _Head():
        raise BadResultError(f"schema must be {SCHEMA}, got {head.schema or 'none'}")
    if head.kind not in KINDS:
        raise BadResultError("is JSON, but not of hogstream bench, train or compare")
    return KINDS[head.kind]


def _plainly(error: str) -> str:
    """What msgspec says is wrong, with the field first and in plain words."""
    said, _, where = error.partition(" - at ")
    place = re.sub(
        r"(`key` in )?`\$\.?(.*)`", lambda at: ("a key of " if at[1] else "") + at[2], where
    )
    if lacks := re.fullmatch(r"Object (missing|contains).* field `(.*)`", said):
        field = f"{place}.{lacks[2]}" if place else lacks[2]
        return f"{field} is {'missing' if lacks[1] == 'missing' else 'unknown'}"
    if wanted := re.fullmatch(r"Expected `([^`]*)`(?:, got `([^`]*)`| (.*))", said):
        needed = " ".join(filter(None, (_words(wanted[1]), wanted[3])))
        return f"{place or 'it'} must be {needed}" + (
            f", got {_words(wanted[2])}" if wanted[2] else ""
        )
    return f"{place}: {said}" if place else said


def _words(types: str) -> str:
    return " or ".join(_WORDS.get(each, each) for each in types.split(" | "))
