"""``hogstream report``: what it reads, what it refuses, and what it leaves behind."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hogstream.profiling.capture import profiled
from hogstream.profiling.report.page import render_page
from hogstream.profiling.results import last
from hogstream.profiling.results.files import BadResultError, parse_result, write_result
from hogstream.profiling.results.schema import Bench, Compare, Train
from report_testing import committed, committed_file, full_bench

Command = Callable[..., tuple[int, str, str]]

BENCH, TRAIN, COMPARE = map(committed_file, ("bench", "train-digits", "compare"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_files_are_told_apart_by_what_they_hold(hogstream: Command, tmp_path: Path) -> None:
    names = []
    for index, path in enumerate((TRAIN, COMPARE, BENCH)):
        names.append(tmp_path / f"{index}")
        names[-1].write_bytes(path.read_bytes())
    status, out, err = hogstream("report", *names)
    assert (status, out, err) == (0, "wrote report.html\n", "")
    html = (tmp_path / "report.html").read_text("utf-8")
    for anchor in ("throughput", "training", "optimizers"):
        assert f'<section id="{anchor}"' in html


def test_of_two_of_a_kind_the_diff_is_told(hogstream: Command, tmp_path: Path) -> None:
    slow, fast = tmp_path / "slow.json", tmp_path / "fast.json"
    write_result(full_bench(), slow)
    write_result(full_bench(speed=2.0), fast)
    status, out, _ = hogstream("report", slow, TRAIN, fast, "--output", "both.html")
    said = " ".join(out.split())
    assert status == 0
    assert "The second run is faster beyond noise in 8 and slower in 0 of 76 config" in said
    assert said.endswith("wrote both.html")
    html = (tmp_path / "both.html").read_text("utf-8")
    assert "<title>fast.json against slow.json" in html
    assert "faster beyond noise in 8 and slower in 0" in html


def test_names_in_files_do_nothing_to_the_terminal(hogstream: Command, tmp_path: Path) -> None:
    for name, speed in (("slow", 1.0), ("fast", 2.0)):
        bench = full_bench(speed=speed)
        for run in bench.results:
            run.policy += "[/b][red]\x1b[31m"
        write_result(bench, tmp_path / name)
    status, out, _ = hogstream("report", "slow", "fast")
    assert status == 0
    assert "lock-free[/b][red]?[31m," in "".join(out.split())


@pytest.mark.slow
def test_without_files_it_is_of_the_last_results(hogstream: Command, tmp_path: Path) -> None:
    status, out, err = hogstream("report")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "there is no last result on this machine: run hogstream bench, or name a FILE" in err
    assert list(tmp_path.iterdir()) == []
    last.keep(committed("sweep", Bench))
    last.keep(committed("bench", Bench))
    assert hogstream("report")[0] == 0
    html = (tmp_path / "report.html").read_text("utf-8")
    assert committed("bench", Bench).command in html
    assert 'id="training"' not in html
    last.keep(committed("train-digits", Train))
    assert hogstream("report")[0] == 0
    assert 'id="training"' in (tmp_path / "report.html").read_text("utf-8")


def test_what_a_profiler_has_spoilt_is_not_kept() -> None:
    with profiled():
        last.keep(committed("bench", Bench))
    assert last.last("bench") is None
    last.keep(committed("bench", Bench))
    assert last.last("bench") is not None


def test_last_result_that_cannot_be_kept_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert last.last("bench") is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    last.keep(committed("bench", Bench))
    assert last.last("bench") is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    last.keep(committed("bench", Bench))
    assert last.last("bench") == tmp_path / "home/.cache/hogstream/last-bench.json"


def to_json(result: Bench | Train | Compare) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(msgspec.json.encode(result))
    return found


def changed(*keys: Any, to: Any = None) -> bytes:
    """A bench in which one value is another, or missing."""
    bench = to_json(full_bench())
    inner: Any = bench
    for key in keys[:-1]:
        inner = inner[key]
    if to is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = to
    return json.dumps(bench).encode()


ONE_ROUND = {"median": 1.0, "interval": None, "samples": [1.0]}


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "is not JSON, or cut short"),
        (b"<html>", "is not JSON, or cut short"),
        (BENCH.read_bytes()[:-100], "is not JSON, or cut short"),
        (b"\xff\xfe{}", "is not text in UTF-8"),
        (b'{"schema": "\\ud800"}', "is not JSON, or cut short"),
        (b"[" * 100_000, "it must be an object, got a list"),
        (b'{"old": ' + b"[" * 100_000, "is nested too deeply"),
        (changed("environment", "versions", to=[[]]), "versions must be an object, got a list"),
        (b"[]", "it must be an object, got a list"),
        (b'{"results": 3}', "is JSON, but not of hogstream bench, train or compare"),
        (b'{"schema": 2, "results": []}', "is JSON, but not of hogstream"),
        (b'{"schema": 2, "kind": "ceilings"}', "is JSON, but not of hogstream bench, train or"),
        (b'{"schema": 1, "results": [{"policy": "locked"}]}', "schema must be 2, got 1"),
        (changed("results", to=[]), "results must be a list of length >= 1"),
        (changed("schema", to=3), "schema must be 2, got 3"),
        (changed("schema"), "schema must be 2, got none"),
        (changed("kernels"), "kernels is missing"),
        (changed("command"), "command is missing"),
        (changed("environment", "device_name"), "environment.device_name is missing"),
        (changed("environment", "more", to=1), "environment.more is unknown"),
        (changed("results", 3, "policy"), "results[3].policy is missing"),
        (
            changed("results", 3, "updates_per_second", "median", to=float("nan")),
            "is not JSON, or cut short",
        ),
        (
            changed("results", 3, "updates_per_second", "median", to=-1),
            "results[3].updates_per_second.median must be a number >= 0",
        ),
        (
            changed("results", 3, "updates_per_second", "median", to=1e300),
            "results[3].updates_per_second.median must be a number <= 1e+18",
        ),
        (
            changed("results", 3, "updates_per_second", "median", to=1e17),
            "results[3].updates_per_second: interval must hold the median",
        ),
        (
            changed("results", 3, "updates_per_second", "samples", 2, to=1e-300),
            "results[3].updates_per_second: samples must each be 0 or from 1e-18 on",
        ),
        (
            changed("kernels", 0, "milliseconds", "samples", 2, to=0),
            "kernels[0].milliseconds.samples[2] must be a number >= 1e-18",
        ),
        (
            changed("results", 3, "workers", to="<b>"),
            "results[3].workers must be a whole number, got text",
        ),
        (changed("settings", "seed", to=10**30), "settings.seed must be a whole number <="),
        (changed("partial", to=0), "partial must be true or false, got a whole number"),
        (
            changed("results", 5, "updates_per_second", to=ONE_ROUND),
            "results[5].updates_per_second.samples must hold 7 rounds, as those of others",
        ),
        (
            changed("results", 1, "policy", to="lock-free"),
            "results[1] is of the same configuration as another",
        ),
        (
            changed("results", 0, "latency_us", "histogram", to={"edges_us": [2], "counts": [1]}),
            "edges_us must rise, one more than there are counts",
        ),
        (
            changed("results", 0, "staleness", "histogram", to={"x": 1}),
            "a key of results[0].staleness.histogram must be a whole number",
        ),
    ],
)
def test_what_no_command_wrote_is_one_line_and_status_2(
    hogstream: Command, tmp_path: Path, content: bytes, wrong: str
) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    status, out, err = hogstream("report", BENCH, path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"hogstream: {path}: ")
    assert wrong in err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ((BENCH, BENCH, BENCH), "is the third of hogstream bench: a diff is of two"),
        (("no.json",), "no.json: cannot be read: No such file or directory"),
        (("/",), "/: cannot be read: Is a directory"),
        ((BENCH, "--output", "/"), "'--output': cannot write '/'"),
        ((BENCH, "--output", BENCH), "FILE and --output must be different files, got"),
    ],
    ids=["three", "none", "folder", "output", "over_input"],
)
def test_wrong_arguments_are_one_line_and_status_2(
    hogstream: Command, tmp_path: Path, arguments: tuple[Any, ...], wrong: str
) -> None:
    before = BENCH.read_bytes()
    status, out, err = hogstream("report", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert wrong in err
    assert list(tmp_path.iterdir()) == []
    assert BENCH.read_bytes() == before


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is in JSON; of lists in their first entries."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, inner in entries:
        yield (*place, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*place, key))


@pytest.mark.slow
def test_whatever_is_wrong_anywhere_is_refused_or_told() -> None:
    """One value after another is put in place of one that belongs there."""
    values: tuple[Any, ...] = ("x", [], {}, True, 1e17, 1e-17, [0, 0], None, 0)
    refused, told = list[str](), 0
    for whole in (
        to_json(smallest_bench()),
        to_json(smallest_train()),
        to_json(smallest_compare()),
    ):
        for index, place in enumerate(places(whole)):
            result = copy.deepcopy(whole)
            inner: Any = result
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = values[index % len(values)]
            try:
                file = parse_result(json.dumps(result), "file")
            except BadResultError as error:
                refused.append(str(error))
            else:
                assert render_page([file]).endswith("</html>")
                told += 1
    assert len(refused) > 60
    for said in refused:  # names the field
        assert re.match(r"file: (a key of )?[a-z]\w*[\w.\[\]]* ?", said), said
    assert told > 60


def smallest_bench() -> Bench:
    bench = full_bench("races")
    bench.results, bench.kernels = bench.results[:2], bench.kernels[:1]
    bench.ceilings.levels = bench.ceilings.levels[-1:]
    for run in bench.results:
        run.staleness.histogram = {0: 5, 3: 2}
    return bench


def smallest_train() -> Train:
    train = committed("train-digits", Train)
    train.results = train.results[:1]
    train.results[0].losses = train.results[0].losses[:5]
    train.results[0].metrics = train.results[0].metrics[:5]
    return train


def smallest_compare() -> Compare:
    compare = committed("compare", Compare)
    compare.results = compare.results[:2]
    return compare
