"""What became of each thing that was tried: a line of JSON, on disk as soon as it is known.

As a plugin of pytest it writes a line for each test.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # else what runs without pytest could not use this
    import pytest

#: What may become of it; what took too long was stopped.
End = Literal["passed", "failed", "stopped", "skipped"]
PASSED: End = "passed"
FAILED: End = "failed"
STOPPED: End = "stopped"
SKIPPED: End = "skipped"
#: In the order of the columns of tables.
ENDS = (PASSED, FAILED, STOPPED, SKIPPED)
#: Environment variables that name the stage under way, and the file of its lines.
STAGE, LINES = "HOGSTREAM_GPU_STAGE", "HOGSTREAM_GPU_LINES"
_LONGEST = 200
_TOLD_BYTES = 16 << 10
_DUMPED = "(most recent call first):"


@dataclass(frozen=True)
class Outcome:
    """What became of a job, or of a test that is part of one.

    Attributes:
        stage: Of which it is a part.
        name: Of the job or the test.
        end: How it ended.
        seconds: How long it took.
        said: Why it did not pass; the last line that it printed, if it told no more.
    """

    stage: str
    name: str
    end: End
    seconds: float
    said: str = ""


def append(outcome: Outcome, lines: Path) -> None:
    """Adds a line to a file, which has it from then on whatever becomes of this process."""
    with lines.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def read(lines: Path) -> list[Outcome]:
    """The outcomes of a file, in its order; none if there is no such file."""
    if not lines.exists():
        return []
    return [Outcome(**json.loads(line)) for line in lines.read_text("utf-8").splitlines()]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Adds a line for a test, in the process that is told of all tests."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.passed and report.when != "call"):
        return
    elsewhere = report.failed and report.when != "call"
    name = f"{report.nodeid} ({report.when})" if elsewhere else report.nodeid
    outcome = Outcome(
        os.environ[STAGE], name, report.outcome, report.duration, _said(report)[:_LONGEST]
    )
    append(outcome, Path(os.environ[LINES]))


def _said(report: pytest.TestReport) -> str:
    """Why a test did not pass, in a line."""
    if isinstance(report.longrepr, tuple):  # where it was skipped, and why
        return report.longrepr[2]
    # Of exceptions that led to others the last; that a process of xdist's has died is only a text.
    raised = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr or "") if raised is None else raised.message
    return next(iter(text.splitlines()), "")


def reason(log: Path) -> str:
    """Why a program failed, in a line, as its output tells.

    Its last line; of a dump of its stacks, where the last thread is: the main one, as a rule.
    """
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TOLD_BYTES))
        text = file.read().decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    dumped = [index for index, line in enumerate(lines) if line.endswith(_DUMPED)]
    if dumped and dumped[-1] + 1 < len(lines):
        return f"it was in {lines[dumped[-1] + 1]}"[:_LONGEST]
    return lines[-1][:_LONGEST] if lines else "it printed nothing"
