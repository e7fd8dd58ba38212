"""Everything that only a GPU can tell, in one run: ``make gpu``.

Runs the tests marked ``gpu``, ``hogstream compare``, ``bench`` and ``profile``, each in a process
of its own with a limit on its time, and leaves one JSON of each in a folder. It needs no network
and no package but torch, Triton, pytest and what the ``bench`` extra names. Nsight's tools are used
if they are there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from hogstream.profiling.environment import (
    best_device,
    cuda_devices,
    describe_environment,
    device_name,
)
from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.nsight.tools import NCU, NSYS, Tool, find_tool
from hogstream.profiling.results.files import write_result
from hogstream.profiling.results.profile_schema import OutcomesOnGpu

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """One tool to run.

    Attributes:
        name: As in the names of its files.
        arguments: What follows the interpreter; ``{file}`` is where its result goes.
        seconds: Limit on its time. Those of all jobs come to nine minutes.
        suffix: Of the file that it writes.
        tool: Without which it is left out.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: int
    suffix: str = ".json"
    tool: Tool | None = None


_PYTEST = ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--junit-xml={file}")
_HOGSTREAM = ("-m", "hogstream.cli.main")
_PROFILE = (*_HOGSTREAM, "profile")
_TO_FILE = ("--json", "{file}")
JOBS = (
    Job("tests", _PYTEST, 170, ".xml"),
    Job("ceilings", (*_HOGSTREAM, "ceilings", "--fresh", *_TO_FILE), 20),
    Job("compare", (*_HOGSTREAM, "compare", "--seconds", "3", *_TO_FILE), 145),
    Job(
        "bench",
        (*_HOGSTREAM, "bench", "--workers", "1,4,16", "--seconds", "1.5", *_TO_FILE),
        85,
    ),
    Job(
        "graphs-bench",  # updates too small for a launch each
        (
            *_HOGSTREAM, "bench", "--elements", "2^16", "--workers", "16", "--batch", "16",
            "--batch-of", "lanes", "--seconds", "2", *_TO_FILE,
        ),
        40,
    ),
    Job("torch-trace", (*_PROFILE, "torch", *_TO_FILE, "--trace", "{file}.trace"), 20),
    Job("nsys", (*_PROFILE, "nsys", *_TO_FILE, "--output", "{file}.nsys-rep"), 30, tool=NSYS),
    Job("ncu", (*_PROFILE, "ncu", *_TO_FILE, "--output", "{file}.ncu-rep"), 30, tool=NCU),
)  # fmt: skip


def main() -> None:
    """Runs all jobs into the folder named on the command line; exits with 1 if one fails."""
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/gpu_suite.py FOLDER")
    if not cuda_devices():
        sys.exit("hogstream: make gpu needs a CUDA device, and torch finds none")
    device = torch.device("cuda", 0)
    prefix = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = [run(job, folder / f"{prefix}-{job.name}{job.suffix}") for job in JOBS]
    if not all(outcomes):
        sys.exit(1)


def run(job: Job, file: Path) -> bool:
    """Runs one job, shows what it prints, and says whether it succeeded and wrote its result.

    One whose tool is not here is left out, which is no failure.
    """
    print(f"== {job.name}", flush=True)
    if job.tool is not None:
        try:
            find_tool(job.tool)
        except MeasurementError as missing:
            print(f"== {job.name}: left out: {missing}", flush=True)
            return True
    for old in (file, file.with_suffix(".json")):
        old.unlink(missing_ok=True)
    start = time.monotonic()
    command = [sys.executable, *(part.format(file=file) for part in job.arguments)]
    # Else -m would put the root, and so our folders' bare names, where modules are looked for.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    try:
        ended = subprocess.run(command, cwd=ROOT, env=environment, timeout=job.seconds, check=False)
        status = f"exit {ended.returncode}"
    except subprocess.TimeoutExpired:
        status = f"stopped after {job.seconds} s"
    if job.suffix == ".xml" and file.exists():
        write_tests_json(file)
    succeeded = status == "exit 0" and file.exists()
    print(f"== {job.name}: {status}, {time.monotonic() - start:.0f} s, {file}", flush=True)
    return succeeded


def write_tests_json(xml: Path) -> None:
    """Writes pytest's JUnit file again as JSON beside it: counts, and the tests that failed."""
    cases = ElementTree.parse(xml).getroot().findall(".//testcase")
    named = {f"{case.get('classname')}::{case.get('name')}": case for case in cases}
    outcomes = {
        kind: [name for name, case in named.items() if case.find(kind) is not None]
        for kind in ("failure", "error", "skipped")
    }
    failed = outcomes["failure"] + outcomes["error"]
    result = OutcomesOnGpu(
        command="make gpu",
        environment=describe_environment(best_device(), "triton"),
        passed=len(named) - len(failed) - len(outcomes["skipped"]),
        failed=failed,
        skipped=outcomes["skipped"],
        seconds=sum(float(case.get("time", 0)) for case in cases),
    )
    write_result(result, xml.with_suffix(".json"))


if __name__ == "__main__":
    main()
