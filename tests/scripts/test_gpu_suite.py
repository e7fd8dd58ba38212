"""``make gpu``: what it leaves behind of jobs that succeed, fail, or take too long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpu_suite import JOBS, Job, run
from hogstream.profiling.nsight.tools import Tool

TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="elsewhere")
def test_skipped(): pass
@pytest.fixture
def broken(): raise OSError
def test_broken(broken): pass
"""


@pytest.mark.slow
def test_the_outcome_of_tests_is_written_as_json(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    arguments = ("-m", "pytest", "-q", str(tmp_path), "--rootdir", str(tmp_path), "-o", "addopts=")
    job = Job("tests", (*arguments, "--junit-xml={file}"), 60, ".xml")
    assert not run(job, tmp_path / "device-tests.xml")
    result = json.loads((tmp_path / "device-tests.json").read_text())
    assert result["passed"] == 1
    assert result["failed"] == ["test_some::test_bad", "test_some::test_broken"]
    assert result["skipped"] == ["test_some::test_skipped"]
    assert {"versions", "commit"} <= result["environment"].keys()


@pytest.mark.parametrize(
    ("code", "outcome", "said"),
    [
        ("open(r'{file}', 'w').close()", True, "exit 0"),
        ("pass", False, "exit 0"),  # and no result
        ("import sys; open(r'{file}', 'w').close(); sys.exit(3)", False, "exit 3"),
        ("import time; time.sleep(60)", False, "stopped after 1 s"),
    ],
    ids=["good", "no_result", "failed", "too_long"],
)
def test_a_job_succeeds_if_it_ends_well_in_time_with_a_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, outcome: bool, said: str
) -> None:
    (tmp_path / "some.json").write_text("of an earlier run")
    limit = 1 if "sleep" in code else 60
    assert run(Job("some", ("-c", code), limit), tmp_path / "some.json") is outcome
    assert f"== some: {said}" in capsys.readouterr().out


def test_a_job_without_its_tool_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = Tool("no-such-tool", "No Such Tool", (1, 0), (), "no export")
    assert run(Job("some", ("-c", "1 / 0"), 60, tool=tool), tmp_path / "some.json")
    assert "== some: left out: no-such-tool was not found" in capsys.readouterr().out


def test_all_jobs_come_to_nine_minutes() -> None:
    assert sum(job.seconds for job in JOBS) == 9 * 60
