"""Ceilings are measured once a machine, and what is kept of them is trusted only if it is whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from hogstream.profiling import turns
from hogstream.profiling.ceilings import machine
from hogstream.profiling.ceilings.cache import cache_file, keep, recall, remember
from hogstream.profiling.ceilings.machine import when_measured
from hogstream.profiling.results.records import Ceiling, Ceilings, Level
from hogstream.profiling.results.schema import Bench
from process_testing import run_python

Command = Callable[..., tuple[int, str, str]]

CPU = torch.device("cpu")


def rate(median: float) -> Ceiling:
    return Ceiling(median, (0.9 * median, 1.1 * median), [median] * 3)


def dated(median: float, date: str) -> Ceiling:
    return msgspec.structs.replace(rate(median), measured=date)


OLD = "2026-01-02T03:04:05+00:00"
CEILINGS = Ceilings(
    measured=OLD,
    levels=[
        Level("L1", 1 << 14, 2, 1 << 14, None, None),
        Level("memory", 1 << 28, 2, None, rate(20.0), rate(40.0)),
    ],
    launches_per_second=rate(500_000.0),
    event_loop_turns_per_second=Ceiling(4e5, (3e5, 5e5), [4e5]),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hogstream"


class Measured:
    """Counts how often it measures."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Ceilings:
        self.times += 1
        return msgspec.structs.replace(CEILINGS, launches_per_second=rate(1000.0 * self.times))


def test_it_is_measured_once(folder):
    measure = Measured()
    first = remember(CPU, measure, fresh=False)
    assert remember(CPU, measure, fresh=False) == first
    assert measure.times == 1
    assert [path.parent for path in folder.iterdir()] == [folder]  # one file, and no other left


def test_ceilings_only_rise_each_by_itself(folder):
    def measured(date: str, copy: float, launches: float) -> Ceilings:
        memory = msgspec.structs.replace(
            CEILINGS.memory, copy_gigabytes_per_second=dated(copy, date)
        )
        return msgspec.structs.replace(
            CEILINGS,
            measured=date,
            levels=[CEILINGS.levels[0], memory],
            launches_per_second=dated(launches, date),
        )

    first, second, third = (f"2026-01-0{day}T00:00:00+00:00" for day in (1, 2, 3))
    remember(CPU, lambda: measured(first, 3.5, 1000.0), fresh=False)  # the machine was busy
    for date, copy, launches in ((second, 25.0, 900.0), (third, 24.0, 1100.0)):
        found = remember(CPU, partial(measured, date, copy, launches), fresh=True)
        assert recall(CPU) == found
    assert found.measured == third
    assert found.memory.copy_gigabytes_per_second == dated(25.0, second)
    assert found.launches_per_second == dated(1100.0, third)
    assert found.memory.update_shaped_gigabytes_per_second == rate(40.0)
    assert when_measured(found) == (
        f"The best that was measured: memory copy at {second}; "
        f"launches, turns of the event loop, memory update-shaped at {third}."
    )


def test_what_is_kept_is_raised_by_what_another_process_kept_meanwhile(folder):
    mine = msgspec.structs.replace(CEILINGS, launches_per_second=rate(10.0))
    remember(CPU, lambda: mine, fresh=False)
    theirs = msgspec.structs.replace(CEILINGS, launches_per_second=rate(30.0))
    assert keep(CPU, theirs) == theirs
    assert keep(CPU, mine) == theirs == recall(CPU)


@pytest.mark.slow
def test_results_raise_ceilings_that_were_measured_too_low(hogstream: Command, folder, tmp_path):
    low = msgspec.structs.replace(
        CEILINGS,
        launches_per_second=rate(2.0),
        event_loop_turns_per_second=rate(2.0),
        levels=[
            msgspec.structs.replace(
                CEILINGS.levels[0], update_shaped_gigabytes_per_second=dated(0.01, OLD)
            ),
            CEILINGS.memory,
        ],
    )
    remember(CPU, lambda: low, fresh=False)
    json_file = tmp_path / "bench.json"
    status, out, err = hogstream(
        *("bench", "--device", "cpu", "--elements", "1000", "--workers", "1"),
        *("--seconds", "0.2", "--json", json_file),
    )
    assert (status, err.count("anew")) == (0, 0)
    bench = msgspec.json.decode(json_file.read_bytes(), type=Bench)
    assert recall(CPU) == bench.ceilings
    best = bench.ceilings.levels[0].update_shaped_gigabytes_per_second
    assert best is not None
    assert best.median == pytest.approx(max(each.gigabytes_per_second for each in bench.results))
    assert best.measured != OLD
    assert bench.ceilings.launches_per_second.median == pytest.approx(
        max(each.updates_per_second.median for each in bench.results)
    )
    shares = [each.share_of_ceilings for each in bench.results]
    for field in ("bandwidth", "launch_rate", "event_loop_rate"):
        assert max(getattr(each, field) for each in shares) == pytest.approx(1.0)
    assert "exceeded" not in out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("platform.node", lambda: "elsewhere"),
        ("os.sched_getaffinity", lambda _: set(range(1000))),
        ("importlib.metadata.version", lambda _: "9.9"),
    ],
)
def test_another_machine_or_version_is_measured_by_itself(folder, name, value, monkeypatch, capsys):
    measure = Measured()
    here = remember(CPU, measure, fresh=False)
    with monkeypatch.context() as patch:
        patch.setattr(name, value, raising=False)
        elsewhere = remember(CPU, measure, fresh=False)
        assert remember(CPU, measure, fresh=False) == elsewhere != here
    assert remember(CPU, measure, fresh=False) == here
    assert measure.times == len(list(folder.iterdir())) == 2
    assert capsys.readouterr().err == ""


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return apply


def memory(kept: dict[str, Any]) -> dict[str, Any]:
    level: dict[str, Any] = kept["ceilings"]["levels"][1]
    return level


def launches(kept: dict[str, Any]) -> dict[str, Any]:
    rate: dict[str, Any] = kept["ceilings"]["launches_per_second"]
    return rate


@pytest.mark.parametrize(
    ("break_", "reason"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON, or cut short"),
        (lambda text: "", "is not JSON, or cut short"),
        (lambda text: "\0\1\2", "is not JSON, or cut short"),
        (lambda text: "[1, 2]", "it must be an object"),
        (lambda text: "{}", "schema is missing"),
        (changed(lambda kept: kept.update(schema=0)), "of another version of hogstream"),
        (changed(lambda kept: kept["machine"].update(cores=0)), "it is of another machine"),
        (changed(lambda kept: kept["ceilings"].pop("levels")), "ceilings.levels is missing"),
        (changed(lambda kept: kept["ceilings"].update(levels=[])), "ceilings.levels must be"),
        (changed(lambda kept: kept["ceilings"]["levels"].pop()), "levels must end with memory"),
        (changed(lambda kept: memory(kept).pop("bytes")), r"levels\[1\].bytes is missing"),
        (changed(lambda kept: memory(kept).pop("cache_bytes")), "cache_bytes is missing"),
        (changed(lambda kept: memory(kept).update(threads=-2)), "threads must be a whole number"),
        (changed(lambda kept: kept["ceilings"].update(measured="yesterday")), "yesterday"),
        (
            changed(lambda kept: kept["ceilings"].update(launches_per_second=None)),
            "launches_per_second must be an object, got null",
        ),
        (changed(lambda kept: launches(kept).update(median=-5.0)), "median must be a number >="),
        (changed(lambda kept: launches(kept).update(median=0)), "median must be a number >="),
        (changed(lambda kept: launches(kept).update(median=5.0)), "interval must hold the median"),
        (changed(lambda kept: launches(kept).update(samples=["x"])), r"samples\[0\] must be a num"),
        (changed(lambda kept: launches(kept).update(samples=[0.0])), r"samples\[0\] must be a num"),
        (changed(lambda kept: launches(kept).update(samples=[])), "samples must be a list"),
    ],
)
def test_a_file_that_cannot_be_used_is_measured_anew(folder, break_, reason, capsys):
    measure = Measured()
    remember(CPU, measure, fresh=False)
    (path,) = folder.iterdir()
    path.write_text(break_(path.read_text()))
    again = remember(CPU, measure, fresh=False)
    assert measure.times == 2
    said = capsys.readouterr().err
    assert said.startswith(f"hogstream: the ceilings kept in {path} cannot be used: ")
    assert said.count("\n") == 1
    assert re.search(reason, said), said
    assert remember(CPU, measure, fresh=False) == again
    assert measure.times == 2


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    measure = Measured()
    for _ in range(2):
        assert remember(CPU, measure, fresh=False).levels == CEILINGS.levels
    assert measure.times == 2
    said = capsys.readouterr().err
    assert said.startswith("hogstream: ceilings are measured each time, as they cannot be kept: ")
    assert said.count("\n") == 1
    assert (tmp_path / "file").read_text() == "in the way"


def test_there_need_be_no_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which does not count
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user without one
    assert cache_file(CPU) is None
    remember(CPU, Measured(), fresh=False)
    assert "there is no home folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command_explains_itself(hogstream: Command) -> None:
    status, out, _ = hogstream("ceilings", "--help")
    assert status == 0
    assert "Say what this machine can do." in out


def check_rate(rate: dict[str, Any]) -> None:
    low, high = rate["interval"] or (min(rate["samples"]), max(rate["samples"]))
    assert 0 < min(rate["samples"]) <= low <= rate["median"] <= high <= max(rate["samples"])
    assert len(rate["samples"]) == machine.ROUNDS


@pytest.mark.slow
def test_command_measures_once_and_says_when_and_where(
    hogstream: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "_SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(machine, "ROUNDS", 3)
    json_file = tmp_path / "machine.json"
    before = datetime.now(timezone.utc).replace(microsecond=0)
    status, out, err = hogstream("ceilings", "--device", "cpu", "--json", json_file)
    assert (status, err) == (0, "")
    result = json.loads(json_file.read_text())
    found = result["ceilings"]
    assert (result["kind"], result["schema"]) == ("ceilings", 2)
    assert result["environment"]["device"] == "cpu"
    measured = datetime.fromisoformat(found["measured"])
    assert before <= measured <= datetime.now(timezone.utc)
    sizes = [level["bytes"] for level in found["levels"]]
    assert sizes == sorted(sizes)
    assert found["levels"][-1]["level"] == "memory"
    for level in found["levels"]:
        assert level["threads"] == result["environment"]["cores"]
        assert re.search(rf"^ {level['level']} +{level['bytes'] / 1024:,.0f} ", out, re.MULTILINE)
        check_rate(level["copy_gigabytes_per_second"])
        check_rate(level["update_shaped_gigabytes_per_second"])
    check_rate(found["launches_per_second"])
    check_rate(found["event_loop_turns_per_second"])
    (kept,) = folder.iterdir()
    assert f"kept in {kept}" in out
    assert f"Measured at {found['measured']}" in out
    assert f"{found['launches_per_second']['median']:,.0f}" in out
    status, again, _ = hogstream("ceilings", "--device", "cpu")
    assert (status, again) == (0, out.replace(f"wrote {json_file}\n", ""))  # not measured again
    status, doctor, _ = hogstream("doctor")
    assert status == 0
    assert found["measured"] in doctor
    status, out, _ = hogstream("ceilings", "--device", "cpu", "--fresh", "--json", json_file)
    assert json.loads(json_file.read_text())["ceilings"]["levels"] != found["levels"]


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import msgspec, torch
from hogstream.profiling import turns
from hogstream.profiling.ceilings import machine
turns._SAMPLE_SECONDS = 1e-4
machine.ROUNDS = 2
print(msgspec.json.encode(machine.machine_ceilings(torch.device("cpu"))).decode())
"""


@pytest.mark.slow
def test_caches_too_small_for_numpy_are_null_without_numba(folder):
    found = json.loads(run_python("-c", WITHOUT_NUMBA))
    for level in found["levels"]:
        for kind in ("copy", "update_shaped"):
            rate = level[f"{kind}_gigabytes_per_second"]
            assert (rate is None) == (level["bytes"] / level["threads"] < 1 << 20)
    assert found["launches_per_second"]["median"] > 0
    assert found["event_loop_turns_per_second"]["median"] > 0


@pytest.mark.gpu
def test_a_device_has_levels_of_its_own(folder):
    found = msgspec.to_builtins(machine.machine_ceilings(torch.device("cuda", 0)))
    assert [level["level"] for level in found["levels"]] == ["L2", "memory"]
    for level in found["levels"]:
        check_rate(level["copy_gigabytes_per_second"])
        check_rate(level["update_shaped_gigabytes_per_second"])
    check_rate(found["launches_per_second"])
    check_rate(found["event_loop_turns_per_second"])
