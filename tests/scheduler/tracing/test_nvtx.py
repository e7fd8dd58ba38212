"""What an NVTX tool sees of runs: a tool of our own, attached to a program."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hogstream.scheduler.tracing import nvtx
from process_testing import run_python

pytestmark = pytest.mark.slow
SUPPORT = Path(__file__).parents[2] / "support"
INT64 = 2  # nvtxPayloadType_t
POLICIES = ["awaited", "locked", "ordered", "lock-free", "bounded:1", "bounded:2"]

# Which range of its lane, or which run, a range lies in.
PARENTS = {
    "iteration": {"run"},
    "submit": {"iteration"},
    "update": {"submit"},
    "snapshot": {"wait snapshot"},
    "wait snapshot": {"iteration"},
    "wait landing": {"submit"},
    "wait lock": {"iteration", "submit", "wait snapshot"},
    "wait bound": {"iteration", "submit"},
}


@dataclass
class Seen:
    """A range: its lane, or None, and the lines of the tool's log that began and ended it."""

    text: str
    category: str | None
    lane: int | None
    start: int
    end: int = -1

    def holds(self, other: Seen) -> bool:
        return self.start < other.start and 0 <= other.end < self.end


@dataclass
class Log:
    """What the tool was told."""

    domains: list[str]
    ranges: list[Seen]
    stacked: int
    made: dict[str, list[int]]  # by the program's own account

    def of(self, category: str | None) -> Iterator[Seen]:
        return (each for each in self.ranges if each.category == category)


def read_log(path: Path, made: dict[str, list[int]]) -> Log:
    log = Log([], [], 0, made)
    categories: dict[str, str | None] = {"0": None}
    ranges: dict[str, Seen] = {}
    for number, line in enumerate(path.read_text().splitlines()):
        kind, *words = line.split(" ")
        if kind == "create":
            log.domains.append(words[1])
        elif kind == "category":
            categories[words[1]] = words[2]
        elif kind == "start":
            key, domain, category, kind_of_payload, payload = words[:5]
            assert domain == "1"
            lane = int(payload) if int(kind_of_payload) == INT64 else None
            ranges[key] = Seen(" ".join(words[5:]), categories[category], lane, number)
        elif kind == "end":
            assert ranges[words[0]].end == -1
            ranges[words[0]].end = number
        else:
            log.stacked += 1
    log.ranges = list(ranges.values())
    return log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or not find_spec("nvtx"):
        pytest.skip("needs nvtx, and a C compiler to build a tool for it")
    folder = tmp_path_factory.mktemp("nvtx")
    tool, path = folder / "tool.so", folder / "log"
    source = SUPPORT / "nvtx_tool.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tool, source], check=True)
    environment = {"NVTX_INJECTION64_PATH": str(tool), "NVTX_LOG": str(path)}
    made = json.loads(run_python(str(SUPPORT / "nvtx_program.py"), **environment))
    return read_log(path, made)


def test_has_a_domain_of_its_own_and_leaves_the_stack_alone(log):
    assert log.domains == ["hogstream"]
    assert log.stacked == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_is_named_by_its_policy_and_ends_after_all_that_it_did(log, policy):
    (run,) = [each for each in log.ranges if each.text == f"run {policy}"]
    assert (run.category, run.lane) == (policy, None)
    others = [each for each in log.of(policy) if each is not run]
    assert others
    assert all(run.holds(each) for each in others)
    assert not any(run.holds(each) for each in log.ranges if each.category != policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_ranges_of_a_lane_nest(log, policy):
    lanes = {each.lane for each in log.of(policy)} - {None}
    assert lanes == {0, 1}
    for inner in log.of(policy):
        if inner.lane is None:
            continue
        around = [each for each in log.of(policy) if each.holds(inner)]
        around = [each for each in around if each.lane in (inner.lane, None)]
        parent = max(around, key=lambda each: each.start)
        assert parent.text.partition(f" {policy}")[0] in PARENTS[inner.text], (parent, inner)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_update_is_enqueued_on_its_lane(log, policy):
    seen = Counter(each.lane for each in log.of(policy) if each.text == "update")
    assert [seen[0], seen[1]] == log.made[policy]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("awaited", {"wait lock", "wait landing"}),
        ("locked", {"wait landing"}),
        ("ordered", {"wait snapshot", "wait landing"}),
        ("lock-free", {"wait landing"}),
        ("bounded:1", {"wait bound", "wait landing"}),
    ],
)
def test_waits_are_named_by_their_reason(log, policy, expected):
    assert {each.text for each in log.of(policy) if each.text.startswith("wait")} == expected


def test_a_failed_iteration_ends_without_an_update(log):
    iterations = [each for each in log.of("bounded:1") if each.text == "iteration"]
    made = sum(log.made["bounded:1"])
    assert len(iterations) > made
    assert made < 6


def test_without_a_tool_nvtx_is_not_even_loaded():
    code = "import sys, runpy; runpy.run_path(sys.argv[1])['main'](); print('nvtx' in sys.modules)"
    program = str(SUPPORT / "nvtx_program.py")
    assert run_python("-c", code, program, NVTX_INJECTION64_PATH="").split()[-1] == "False"


@pytest.mark.parametrize(
    ("tool", "reason"),
    [("", "no NVTX tool is attached"), ("/a/tool.so", "/a/tool.so.*pip install nvtx")],
)
def test_says_why_there_are_no_ranges(monkeypatch, tool, reason):
    monkeypatch.setenv("NVTX_INJECTION64_PATH", tool)
    monkeypatch.setitem(sys.modules, "nvtx", None)  # which then cannot be imported
    monkeypatch.delattr(torch.cuda.nvtx, "range_start")  # nor has torch any, built for CUDA or not
    anew = runpy.run_path(nvtx.__file__)  # it looks once only
    assert re.search(reason, anew["why_no_ranges"]())
    assert anew["open_ranges"]("locked") is None
