"""Ratings of items by users: read from the files that they come in, and cut into folds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hogstream.scheduler.checks import check_integer, check_type

Indices = npt.NDArray[np.intp]

_NAMES = ("u.data", "ratings.dat", "ratings.csv", "*.inter")
_FILES = ", ".join(_NAMES)
_LARGEST_ID = np.iinfo(np.int32).max
_LARGEST_RATING = np.finfo(np.float32).max
# At a time: few enough to need little memory, many enough for NumPy's reader to be fast.
_LINES = 1 << 14


@dataclass(frozen=True, eq=False)
class Ratings:
    """Who rated what, and how: n ratings, each of one item by one user.

    Users and items are numbered from 0 without gaps: each number has at least one rating.

    Attributes:
        users: The user of each rating, int32, shape (n,).
        items: The item of each rating, int32, shape (n,).
        values: The ratings, finite, float32, shape (n,).
        user_count: How many users there are.
        item_count: How many items there are.

    Raises:
        TypeError: If an array is not NumPy's, or a count is no integer.
        ValueError: If an array has another dtype or shape, a number is out of range or has no
            rating, or a rating is not finite.
    """

    users: npt.NDArray[np.int32]
    items: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    user_count: int
    item_count: int

    def __post_init__(self) -> None:
        check_type("values", self.values, np.ndarray)
        shape = (self.values.size,)
        _check_array("values", self.values, np.float32, shape)
        if not np.isfinite(self.values).all():
            raise ValueError("values must be finite")
        for name, count in (("user", self.user_count), ("item", self.item_count)):
            numbers = getattr(self, f"{name}s")
            _check_array(f"{name}s", numbers, np.int32, shape)
            _check_numbers(f"{name}s", numbers, check_integer(f"{name}_count", count, 1))


def _check_array(name: str, array: Any, dtype: type, shape: tuple[int]) -> None:
    check_type(name, array, np.ndarray)
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"{name} must be {np.dtype(dtype)} of shape {shape}, "
            f"got {array.dtype} of shape {array.shape}"
        )


def _check_numbers(name: str, numbers: npt.NDArray[np.int32], count: int) -> None:
    """Checks that the numbers are those from 0 to count - 1, each there once or more."""
    if not ((numbers >= 0) & (numbers < count)).all():
        raise ValueError(
            f"{name} must be from 0 to {count - 1}, got {numbers.min()} to {numbers.max()}"
        )
    unused = np.flatnonzero(np.bincount(numbers, minlength=count) == 0)
    if len(unused):
        raise ValueError(f"{name} must have no gaps, got no rating of number {unused[0]}")


def folds(ratings: Ratings, count: int = 5, seed: int = 0) -> Iterator[tuple[Indices, Indices]]:
    """Cuts ratings for k-fold cross-validation: each is in the test part of one fold.

    The ratings are shuffled first, then cut into parts whose sizes differ by at most one. A user or
    an item of a test part may have no rating in the training part that goes with it.

    Args:
        ratings: What is cut.
        count: Of folds: at least 2, at most one for each rating.
        seed: Of the shuffling: the same seed gives the same folds.

    Returns:
        An iterator of pairs, training part and test part: the indices of their ratings, int64,
        shapes (n - m,) and (m,).

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If ``count`` or ``seed`` is out of range.
    """
    check_type("ratings", ratings, Ratings)
    size = len(ratings.values)
    check_integer("count", count, 2, size)
    order = np.random.default_rng(check_integer("seed", seed, 0)).permutation(size)
    parts = np.array_split(order, count)
    return ((np.concatenate(parts[:at] + parts[at + 1 :]), part) for at, part in enumerate(parts))


def read_ratings(path: str | os.PathLike[str]) -> Ratings:
    """Reads ratings from a file of MovieLens, or of RecBole.

    The first line tells the format:

    - ML-100K's ``u.data``: user, item, rating and time, with tabs between them;
    - ML-1M's and ML-10M's ``ratings.dat``: the same with ``::`` between them;
    - ``ratings.csv`` of ML-20M and later: columns userId, movieId and rating, with commas;
    - RecBole's ``.inter``: columns user_id, item_id and rating, each with its type behind a colon,
      with tabs.

    Further columns are not read. Ids are integers from 0 to 2**31 - 1. Users and items are numbered
    from 0 in the order of their ids.

    Args:
        path: The file, or a folder with exactly one of ``u.data``, ``ratings.dat``,
            ``ratings.csv`` and ``*.inter``.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If the folder has none of these files or more than one, or the file is not in
            one of these formats. The error names the file and the line.
    """
    file = _file_at(Path(path))
    users, items, values = [], [], []
    for rows in _read_rows(file):
        users.append(rows[:, 0].astype(np.int32))
        items.append(rows[:, 1].astype(np.int32))
        values.append(rows[:, 2].astype(np.float32))
    if not values:
        raise ValueError(f"{file}: must have ratings, got only a header")
    user_numbers, user_count = _number(np.concatenate(users))
    item_numbers, item_count = _number(np.concatenate(items))
    return Ratings(user_numbers, item_numbers, np.concatenate(values), user_count, item_count)


def _number(ids: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], int]:
    """Numbers ids from 0 in their order; returns the number of each, and how many there are."""
    known = np.unique(ids)  # its return_inverse takes almost three times the memory
    return np.searchsorted(known, ids).astype(np.int32), len(known)


def _file_at(path: Path) -> Path:
    """The file of ratings at a path, or in the folder there."""
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file or folder {path}; without --data, hogstream movielens downloads "
            "MovieLens-100K"
        )
    if not path.is_dir():
        return path
    found = sorted(each for each in path.iterdir() if any(map(each.match, _NAMES)))
    if len(found) != 1:
        names = ", ".join(each.name for each in found) or "none"
        raise ValueError(f"{path}: must have exactly one of {_FILES}, got {names}")
    return found[0]


class _Format(NamedTuple):
    """How lines are laid out: what is between fields, and which are user, item and rating."""

    separator: str
    columns: tuple[int, ...]
    has_header: bool


def _format_of(first: str) -> _Format:
    """The format of a file with a given first line."""
    if not first:
        raise ValueError("must have ratings, got an empty file")
    first = first.rstrip("\n")
    if "::" in first:
        return _Format("::", (0, 1, 2), has_header=False)
    fields = first.split("\t")
    if any(":" in field for field in fields):
        names = [field.partition(":")[0] for field in fields]
        return _Format("\t", _columns(names, "user_id", "item_id", "rating"), has_header=True)
    if len(fields) > 1:
        return _Format("\t", (0, 1, 2), has_header=False)
    fields = first.split(",")
    if len(fields) > 1:
        return _Format(",", _columns(fields, "userId", "movieId", "rating"), has_header=True)
    raise ValueError(f"must be in the format of one of {_FILES}, got a first line {_shown(first)}")


def _columns(header: list[str], *names: str) -> tuple[int, ...]:
    """Where the columns of some names are."""
    for name in names:
        if name not in header:
            raise ValueError(
                f"must have a header with {', '.join(names)}, "
                f"got none named {name} in {_shown(', '.join(header))}"
            )
    return tuple(map(header.index, names))


def _read_rows(path: Path) -> Iterator[npt.NDArray[np.float64]]:
    """Yields ids of users, ids of items and ratings, shape (m, 3), for some lines at a time."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
        try:
            layout = _format_of(first)
        except ValueError as error:
            raise ValueError(f"{path}, line 1: {error}") from None
        number = 1 + layout.has_header
        lines = chain(() if layout.has_header else (first,), file)
        while some := list(islice(lines, _LINES)):
            rows = _parse(some, layout)
            if rows is None:
                at = next(at for at, line in enumerate(some) if _parse([line], layout) is None)
                raise ValueError(f"{path}, line {number + at}: {_fault(some[at], layout)}")
            yield rows
            number += len(some)


def _parse(lines: list[str], layout: _Format) -> npt.NDArray[np.float64] | None:
    """User, item and rating of each line, shape (m, 3); None if any line is not as allowed."""
    if "\n" in lines:  # which NumPy skips
        return None
    # NumPy splits at one character: it sees an empty field between two colons.
    step = len(layout.separator)
    columns = [step * column for column in layout.columns]
    try:
        rows = np.loadtxt(
            lines, delimiter=layout.separator[0], usecols=columns, comments=None, ndmin=2
        )
    except ValueError:
        return None
    # Ids are read as float64, which holds them exactly: as int32, NumPy would take 1.5 for 1.
    ids, values = rows[:, :2], rows[:, 2]
    allowed = (ids >= 0) & (ids <= _LARGEST_ID) & (ids == np.floor(ids))
    return rows if allowed.all() and (np.abs(values) <= _LARGEST_RATING).all() else None


def _fault(line: str, layout: _Format) -> str:
    """What is wrong with a line."""
    fields = line.rstrip("\n").split(layout.separator)
    least = max(layout.columns) + 1
    if len(fields) < least:
        return (
            f"must have at least {least} fields with {layout.separator!r} between them, "
            f"got {len(fields)} in {_shown(line)}"
        )
    user, item, rating = (_shown(fields[column]) for column in layout.columns)
    return (
        f"must have ids of a user and an item, integers from 0 to {_LARGEST_ID}, and a rating, "
        f"a finite float32, got {user}, {item} and {rating}"
    )


def _shown(text: str) -> str:
    """A text as errors show it, not longer than a line."""
    return repr(text.rstrip("\n")[:80])
