"""MovieLens: ratings as files have them, what is wrong with a file, folds, and the download."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hogstream.workloads.movielens import (
    LICENCE,
    Ratings,
    download_ml_100k,
    folds,
    read_ratings,
)
from hogstream.workloads.movielens.download import MEMBER, download_file

TABS = "7\t30\t3\t881250949\n2\t5\t4.5\t891717742\n7\t5\t1\t878887116\n"
COLONS = TABS.replace("\t", "::")
COMMAS = "userId,movieId,rating,timestamp\n" + TABS.replace("\t", ",")
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + TABS


def ratings_of(users: list[int], items: list[int], values: list[float]) -> Ratings:
    return Ratings(
        np.array(users, np.int32),
        np.array(items, np.int32),
        np.array(values, np.float32),
        user_count=max(users) + 1,
        item_count=max(items) + 1,
    )


def written(folder: Path, text: str, name: str = "file") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        TABS,
        COLONS,
        COMMAS,
        INTER,
        "rating:float\titem_id:token\tuser_id:token\n3\t30\t7\n4.5\t5\t2\n1\t5\t7\n",
        TABS.removesuffix("\n"),
        TABS.replace("\n", "\r\n"),
    ],
    ids=["u.data", "dat", "csv", "inter", "other columns", "no last newline", "newlines of DOS"],
)
def test_each_format_is_told_by_its_first_line(tmp_path: Path, text: str) -> None:
    """Ids are numbered in their order: users 2 and 7, items 5 and 30."""
    ratings = read_ratings(written(tmp_path, text))
    assert ratings.users.tolist() == [1, 0, 1]
    assert ratings.items.tolist() == [1, 0, 0]
    assert ratings.values.tolist() == [3.0, 4.5, 1.0]
    assert (ratings.user_count, ratings.item_count) == (2, 2)
    arrays = ratings.users, ratings.items, ratings.values
    assert [each.dtype for each in arrays] == [np.int32, np.int32, np.float32]


def test_ratings_are_those_of_all_lines_of_a_long_file(tmp_path: Path) -> None:
    """Longer than what is read at a time; every user rates one item."""
    lines = [f"{user}::9::{user % 5}::0\n" for user in range(1, 40_001)]
    ratings = read_ratings(written(tmp_path, "".join(lines)))
    assert ratings.users.tolist() == [*range(40_000)]
    assert ratings.values.tolist() == [user % 5 for user in range(1, 40_001)]
    assert (ratings.user_count, ratings.item_count) == (40_000, 1)


IDS = "must have ids of a user and an item, integers from 0 to 2147483647, and a rating, "


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: must have ratings, got an empty file"),
        ("userId,movieId,rating\n", "must have ratings, got only a header"),
        ("film\n", "line 1: must be in the format of one of u.data, .*got a first line 'film'"),
        ("userId,rating\n1,2\n", "line 1: .*userId, movieId, rating, got none named movieId in"),
        ("user_id:token\titem_id:token\n", "line 1: .*got none named rating in 'user_id, item_id'"),
        (TABS + "7\t5\n", r"line 4: must have at least 3 fields with '\\t'.*got 2 in '7\\t5'"),
        (COLONS + "7:5:1\n", "line 4: must have at least 3 fields with '::'.*got 1 in '7:5:1'"),
        (COMMAS + "\n7,5,1,0\n", "line 5: must have at least 3 fields with ','.*got 1 in ''"),
        ("1::2::x\n", f"line 1: {IDS}a finite float32, got '1', '2' and 'x'"),
        (COMMAS + "7,5,1#,0\n", "line 5: .* got '7', '5' and '1#'"),
        (COMMAS + "7,5,nan,0\n", "line 5: .* got '7', '5' and 'nan'"),
        (COMMAS + "7,5,-inf,0\n", "line 5: .* got '7', '5' and '-inf'"),
        (COMMAS + "7,5,1e39,0\n", "line 5: .* got '7', '5' and '1e39'"),
        (TABS + "7.5\t5\t1\n", "line 4: .* got '7.5', '5' and '1'"),
        (TABS + "7\t-1\t1\n", "line 4: .* got '7', '-1' and '1'"),
        (TABS + "2147483648\t5\t1\n", "line 4: .* got '2147483648', '5' and '1'"),
        (TABS * 10_000 + "7\t5\t\n", "line 30001: .* got '7', '5' and ''"),
        (INTER + TABS * 10_000 + "7\t5\t\n", "line 30005: .* got '7', '5' and ''"),
        ("x" * 1_000, "line 1: .* got a first line '" + "x" * 80 + "'$"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(
    tmp_path: Path, text: str, said: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=said) as refusal:
        read_ratings(path)
    assert str(refusal.value).startswith(str(path))


def test_bytes_that_are_no_text_are_told_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "u.data"
    path.write_bytes(TABS.encode() + b"7\t5\t\xff\n")
    with pytest.raises(ValueError, match=r"u.data, line 4: .* got '7', '5' and '\ufffd'"):
        read_ratings(path)


def test_a_missing_file_is_told_with_what_downloads_it(tmp_path: Path) -> None:
    path = tmp_path / "u.data"
    with pytest.raises(FileNotFoundError, match="hogstream movielens downloads") as refusal:
        read_ratings(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("name", ["u.data", "ratings.dat", "ratings.csv", "ml-100k.inter"])
def test_a_folder_is_read_for_its_one_file(tmp_path: Path, name: str) -> None:
    written(tmp_path, TABS, name)
    written(tmp_path, "not ratings", "u.data.txt")
    assert len(read_ratings(tmp_path).values) == 3


@pytest.mark.parametrize(
    ("names", "got"),
    [((), "none"), (("u.data", "ratings.csv", "README"), "ratings.csv, u.data")],
)
def test_a_folder_without_one_file_is_refused(
    tmp_path: Path, names: tuple[str, ...], got: str
) -> None:
    for name in names:
        written(tmp_path, TABS, name)
    with pytest.raises(ValueError, match=rf"exactly one of .*\*\.inter, got {got}$") as refusal:
        read_ratings(tmp_path)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"values": [3.0, 4.0, 5.0]}, "values must be ndarray, got list"),
        (
            {"values": np.ones(3)},
            r"values must be float32 of shape \(3,\), got float64 of shape \(3,\)",
        ),
        ({"values": np.ones((3, 1), np.float32)}, r"of shape \(3,\), got .* of shape \(3, 1\)"),
        ({"values": np.array([1, 2, np.nan], np.float32)}, "values must be finite"),
        ({"users": np.zeros(2, np.int32)}, r"users must be int32 of shape \(3,\), got .*\(2,\)"),
        ({"items": np.zeros(3, np.int64)}, "items must be int32 of .*, got int64"),
        ({"items": np.array([0, -1, 1], np.int32)}, "items must be from 0 to 1, got -1 to 1"),
        ({"user_count": 1}, "users must be from 0 to 0, got 0 to 1"),
        ({"item_count": 3}, "items must have no gaps, got no rating of number 2"),
        ({"item_count": 2.0}, "item_count must be an integer >= 1, got 2.0"),
    ],
)
def test_what_is_wrong_in_ratings_is_named(changes: dict[str, Any], said: str) -> None:
    ratings = ratings_of([0, 1, 1], [1, 0, 1], [3.0, 4.0, 5.0])
    with pytest.raises((TypeError, ValueError), match=said):
        replace(ratings, **changes)


def test_ratings_need_one_at_least() -> None:
    none = {name: np.array([], np.int32) for name in ("users", "items")}
    with pytest.raises(ValueError, match="no rating of number 0"):
        Ratings(**none, values=np.array([], np.float32), user_count=1, item_count=1)


def seven() -> Ratings:
    return ratings_of([0, 1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 2, 2, 3], [1.0] * 7)


def test_each_rating_is_tested_in_one_fold_and_trained_on_in_the_others() -> None:
    parts = list(folds(seven(), count=3))
    assert [len(test) for _, test in parts] == [3, 2, 2]
    assert sorted(np.concatenate([test for _, test in parts])) == [*range(7)]
    for train, test in parts:
        assert sorted([*train, *test]) == [*range(7)]


def test_folds_are_shuffled_as_the_seed_says() -> None:
    def order(**seed: int) -> list[int]:
        return [int(index) for _, test in folds(seven(), **seed) for index in test]

    assert order() == order(seed=0) == np.random.default_rng(0).permutation(7).tolist()
    assert order(seed=1) == np.random.default_rng(1).permutation(7).tolist()
    assert order(seed=0) != order(seed=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"count": 1}, "count must be an integer >= 2 and <= 7, got 1"),
        ({"count": 8}, "count must be an integer >= 2 and <= 7, got 8"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"ratings": 3}, "ratings must be Ratings, got int"),
    ],
)
def test_folds_that_cannot_be_are_refused_at_once(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        folds(**{"ratings": seven()} | arguments)


DATA = INTER.encode()
SHA256 = hashlib.sha256(DATA).hexdigest()


def offer(monkeypatch: pytest.MonkeyPatch, folder: Path, members: dict[str, bytes] | None) -> None:
    """Has pip find a wheel of recbole with some members in a folder; None for no wheel."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    if members is None:
        return
    about = {
        "METADATA": b"Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\nRequires-Dist: ray\n",
        "WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": b"",
    }
    with zipfile.ZipFile(folder / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
        for name, data in members.items():
            wheel.writestr(name, data)
        for name, data in about.items():
            wheel.writestr(f"recbole-1.2.1.dist-info/{name}", data)


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, b"damaged"], ids=["absent", "damaged"])
def test_a_file_is_downloaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes | None
) -> None:
    """Without what the wheel depends on; the second time there is no wheel to be had."""
    path = tmp_path / "cache" / "ml.inter"
    if before is not None:
        path.parent.mkdir()
        path.write_bytes(before)
    offer(monkeypatch, tmp_path / "wheels", {MEMBER: DATA, "recbole/other.py": b""})
    download_file(path, SHA256)
    assert path.read_bytes() == DATA
    assert [*path.parent.iterdir()] == [path]
    offer(monkeypatch, tmp_path / "none", None)
    download_file(path, SHA256)
    assert read_ratings(path).user_count == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("members", "said"),
    [
        (None, r"pip could not download recbole==1.2.1, exit status 1:\n(.*\n)*ERROR: No matching"),
        ({"recbole/other.py": b""}, rf"recbole-1.2.1-py3-none-any.whl must hold {MEMBER}"),
        ({MEMBER: b"other"}, f"must have SHA-256 {SHA256}, got [0-9a-f]{{64}}$"),
    ],
    ids=["no wheel", "no member", "another digest"],
)
def test_a_download_that_fails_says_why_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes] | None, said: str
) -> None:
    path = tmp_path / "ml.inter"
    path.write_bytes(b"damaged")
    offer(monkeypatch, tmp_path / "wheels", members)
    with pytest.raises(RuntimeError, match=said):
        download_file(path, SHA256)
    assert path.read_bytes() == b"damaged"


@pytest.mark.slow
def test_what_is_downloaded_for_users_must_be_movielens_100k(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    offer(monkeypatch, tmp_path / "wheels", {MEMBER: DATA})
    with pytest.raises(RuntimeError, match=f"must have SHA-256 4edb74e2.*, got {SHA256}"):
        download_ml_100k()
    assert not (tmp_path / "cache").exists()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "nowhere")
    with pytest.raises(RuntimeError, match="set XDG_CACHE_HOME"):
        download_ml_100k()


def test_licence_says_who_made_the_data_and_what_is_allowed() -> None:
    for words in ("GroupLens", "research", "redistributed", "commercial", "Harper", "5(4)"):
        assert words in LICENCE
