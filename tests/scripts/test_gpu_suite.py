"""``make gpu``: what it does with programs that succeed, fail, hang or leave others behind."""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest

from gpu import processes
from gpu.outcomes import FAILED, LINES, PASSED, SKIPPED, STAGE, STOPPED, End, Outcome, read
from gpu.processes import Program
from gpu.run_tests import __file__ as run_tests
from gpu.stages import ROOT, Job, Stage
from gpu.suite import Run, table
from process_testing import run_python, until

LIMIT_SECONDS = 60
READY = "import pathlib, signal; pathlib.Path('ready').touch()\n"


def is_gone(pid: int) -> bool:
    """Whether a process is no more, though nobody may have asked for its status yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def started(code: str, folder: Path, seconds: float = LIMIT_SECONDS) -> Program:
    command = [sys.executable, "-c", code]
    return Program(
        command, folder / "log", seconds=seconds, folder=folder, environment={**os.environ}
    )


@pytest.mark.parametrize(("code", "status"), [("print('done')", 0), ("exit(3)", 3)])
def test_a_program_ends_by_itself(tmp_path: Path, code: str, status: int) -> None:
    program = started(code, tmp_path)
    until(program.has_ended)
    assert (program.status, program.stopped) == (status, False)


def test_past_its_limit_a_program_is_interrupted_and_may_write_what_it_has(tmp_path: Path) -> None:
    waits = f"try:\n {READY} signal.pause()\nexcept KeyboardInterrupt:\n print('half of it')"
    program = started(waits, tmp_path, seconds=0)
    until((tmp_path / "ready").exists)  # only who asks whether it has ended sends signals
    until(program.has_ended)
    assert (program.status, program.stopped) == (0, True)
    assert (tmp_path / "log").read_text() == "half of it\n"


def test_what_ignores_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.0)
    waits = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{READY}"
    program = started(f"{waits}while True: signal.pause()", tmp_path, seconds=0)
    until((tmp_path / "ready").exists)
    until(program.has_ended)
    assert (program.status, program.stopped) == (-9, True)


def test_what_a_program_has_started_and_left_is_ended_with_it(tmp_path: Path) -> None:
    leaves = """
import subprocess, sys
left = subprocess.Popen([sys.executable, "-c", "import signal\\nwhile True: signal.pause()"])
print(left.pid)
"""
    program = started(leaves, tmp_path)
    until(program.has_ended)
    left = int((tmp_path / "log").read_text())
    until(lambda: is_gone(left))


def job(name: str, code: str, seconds: float = LIMIT_SECONDS, **options: str) -> Job:
    return Job(name, ("-c", code), seconds, **options)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "work", "cpu", "", tmp_path / "all.zip")


def lines_in(archive: Path, stage: str) -> list[Outcome]:
    with zipfile.ZipFile(archive) as made:
        text = made.read(f"lines/{stage}.jsonl").decode()
    return [Outcome(**json.loads(line)) for line in text.splitlines()]


WRITES = "open(r'{file}', 'w').close()"


@pytest.mark.parametrize(
    ("tried", "end", "said"),
    [
        (job("some", "pass"), PASSED, ""),
        (job("some", WRITES, suffix=".json"), PASSED, ""),
        (job("some", "print('no time')", suffix=".json"), FAILED, "it wrote no result: no time"),
        (job("some", WRITES + "; exit('why')", suffix=".json"), FAILED, "why"),
        (job("some", "exit(1)"), FAILED, "it printed nothing"),
        (job("some", "import os; os.abort()"), FAILED, "it printed nothing"),
        (job("some", "1 / 0", tool="ncu"), SKIPPED, "ncu was not found"),
    ],
    ids=["good", "result", "no_result", "failed", "silent", "crashed", "no_tool"],
)
def test_what_becomes_of_a_job(run: Run, tmp_path: Path, tried: Job, end: End, said: str) -> None:
    run.run_all([Stage("one", LIMIT_SECONDS, (tried,))])
    (outcome,) = run.outcomes
    assert (outcome.stage, outcome.name, outcome.end, outcome.said) == ("one", "some", end, said)
    assert lines_in(tmp_path / "all.zip", "one") == [outcome]


def test_a_tool_runs_the_interpreter(run: Run, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text('#!/bin/sh\necho "$1"; shift; exec "$@"\n')
    tool.chmod(0o755)
    run.machine["tools"] = {"some-tool": str(tool), "broken": str(tmp_path / "none")}
    under = Job("under", ("-c", "exit('ran')"), 60, tool="some-tool", under=("--checked",))
    broken = Job("broken", ("-c", "1 / 0"), 60, tool="broken", under=("--checked",))
    run.run_all([Stage("one", LIMIT_SECONDS, (under, broken))])
    assert (run.folder / "logs" / "one-under.log").read_text() == "--checked\nran\n"
    assert run.outcomes[1].said.startswith("it cannot be started: ")


def test_a_job_that_takes_too_long_ends_alone_and_its_stage_goes_on(run: Run) -> None:
    waits = "import signal\nwhile True: signal.pause()"
    jobs = job("hangs", waits, seconds=0), job("good", "pass")
    run.run_all([Stage("one", LIMIT_SECONDS, jobs, beside=2)])
    ends = {each.name: each.end for each in run.outcomes}
    assert ends == {"hangs": STOPPED, "good": PASSED}


def test_no_job_begins_when_its_stage_has_no_time_left(run: Run, capsys: object) -> None:
    run.run_all([Stage("none", 0, (job("late", "1 / 0"),)), Stage("next", 60, (job("a", "pass"),))])
    late_one, good = run.outcomes
    assert (late_one.end, late_one.said) == (STOPPED, "no time was left for it")
    assert good.end == PASSED


def test_interrupted_a_run_leaves_what_it_had(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupts = "import os, signal; os.kill(os.getppid(), signal.SIGINT)\nsignal.pause()"
    stages = (
        Stage("first", LIMIT_SECONDS, (job("good", "pass"),)),
        Stage("second", LIMIT_SECONDS, (job("good", "pass"), job("interrupts", interrupts))),
        Stage("third", LIMIT_SECONDS, (job("never", "pass"),)),
    )
    run.run_all(stages)
    assert [(each.stage, each.name, each.end) for each in run.outcomes] == [
        ("first", "good", PASSED),
        ("second", "good", PASSED),
        ("second", "interrupts", STOPPED),
    ]
    assert len(lines_in(tmp_path / "all.zip", "second")) == 2
    assert capsys.readouterr().out.splitlines()[-1] == "interrupted"


def test_the_table_is_short_and_says_why() -> None:
    outcomes = [Outcome("tests", f"test_{i}", FAILED, 1.0, "w" * 500) for i in range(200)]
    lines = [*table([*outcomes, Outcome("smoke", "list", PASSED, 1.0)])]
    assert lines[0] == "1 passed, 200 failed, 0 stopped, 0 skipped:"
    assert lines[1].startswith("  tests | test_0 | www")
    assert lines[-1] == "  and 160 more, in the archive's folder lines"
    assert len("\n".join(lines)) < 10_000


TESTS = """
import pytest
def test_good(): pass
def test_bad():
    assert 1 == 2
@pytest.mark.skip(reason="elsewhere")
def test_skipped(): pass
@pytest.fixture
def broken(): raise OSError("no disk")
def test_broken(broken): pass
def test_by_another():
    try:
        {}["key"]
    except KeyError:
        raise LookupError("no key\\nof that name")
"""
CRASHES = "import os\ndef test_crashes(): os._exit(1)\n"


# Without the settings of this project, but that warnings are errors.
ALONE = ("--rootdir", ".", "-o", "addopts=", "-W", "error")
# This test may itself run in a process of xdist's, which that one is not.
RUNS_TESTS = (
    "import os, runpy; os.environ.pop('PYTEST_XDIST_WORKER', None); "
    f"runpy.run_path({run_tests!r}, run_name='__main__')"
)


def outcomes_of(tests: str, folder: Path) -> list[Outcome]:
    """What is written of tests of which some fail."""
    (folder / "test_some.py").write_text(tests)
    lines = folder / "lines"
    # The last line is of the interpreter, which returns 0 whatever pytest did.
    with pytest.raises(AssertionError):
        run_python(
            *("-c", RUNS_TESTS, "60", str(folder / "test_some.py"), *ALONE),
            **{LINES: str(lines), STAGE: "tests", "PYTHONPATH": str(ROOT / "scripts")},
        )
    return read(lines)


@pytest.mark.slow
def test_each_test_is_a_line(tmp_path: Path) -> None:
    outcomes = outcomes_of(TESTS, tmp_path)
    found = {each.name.partition("::")[2]: (each.end, each.said) for each in outcomes}
    assert found == {
        "test_good": (PASSED, ""),
        "test_bad": (FAILED, "assert 1 == 2"),
        "test_skipped": (SKIPPED, "Skipped: elsewhere"),
        "test_broken (setup)": (FAILED, "OSError: no disk"),
        "test_by_another": (FAILED, "LookupError: no key"),
    }


@pytest.mark.slow
def test_a_test_whose_process_dies_says_so(tmp_path: Path) -> None:
    pytest.importorskip("xdist", reason="else the process is that of all tests")
    (outcome,) = outcomes_of(CRASHES, tmp_path)
    assert outcome.end == FAILED
    assert re.match(r"worker 'gw\d' crashed while running .*::test_crashes", outcome.said)


HANGS = """
import asyncio, signal
async def wait_for_ever():
    while True:
        signal.sigwait([signal.SIGUSR1])
def test_good(): pass
def test_hangs(): asyncio.run(wait_for_ever())
"""


@pytest.mark.slow
def test_a_test_that_hangs_shows_where_before_its_job_is_over(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(HANGS)
    program = Program(
        [sys.executable, "-c", RUNS_TESTS, "1", "test_some.py", *ALONE],
        tmp_path / "log",
        seconds=LIMIT_SECONDS,
        folder=tmp_path,
        environment={
            **os.environ,
            **{LINES: str(tmp_path / "lines"), STAGE: "tests"},
            "PYTHONPATH": str(ROOT / "scripts"),
        },
    )
    try:
        until(lambda: "line 5 in wait_for_ever" in (tmp_path / "log").read_text())
    finally:
        program.kill()
