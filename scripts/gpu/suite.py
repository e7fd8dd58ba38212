"""Everything that only a GPU can tell, for one chance of some minutes: ``make gpu``.

Runs stages, each program of which is a process of its own with a limit on its time. Whatever
happens, one archive is left of what was found out until then: it is written anew after each stage.
This program itself needs nothing but Python, so that nothing but the system can end it early.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu import archive, packages
from gpu.outcomes import (
    ENDS,
    FAILED,
    LINES,
    PASSED,
    SKIPPED,
    STAGE,
    STOPPED,
    Outcome,
    append,
    read,
    reason,
)
from gpu.processes import Program
from gpu.stages import MACHINE_SECONDS, ROOT, Job, Stage, chosen

#: Read by what tells results of which commit they are, where there is no git.
COMMIT = "HOGSTREAM_COMMIT"
# Torch may be read from a cold disk; what that takes is not there for what comes last.
_MOST_MACHINE_SECONDS = 60
_POLL_SECONDS = 0.05
_MOST_TOLD = 40


def main() -> None:
    """Runs the stages asked for; exits with 1 if anything failed or was stopped."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the archive goes")
    parser.add_argument("--stages", default="all", help="early, late, all, or names")
    parser.add_argument("--commit", default="", help="of the tree, where it has no .git")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses")
    asked = parser.parse_args()
    try:
        stages = chosen(asked.stages, asked.device)
    except ValueError as error:
        parser.error(str(error))
    asked.folder.mkdir(parents=True, exist_ok=True)
    file = asked.folder.resolve() / f"gpu-{asked.stages.replace(',', '-')}.zip"
    work = TemporaryDirectory(prefix="hogstream-gpu-", ignore_cleanup_errors=True)
    with work as folder, _ending_as_by_ctrl_c():
        run = Run(Path(folder).resolve(), asked.device, asked.commit, file)
        if problem := run.prepare(f"make gpu STAGES={asked.stages}"):
            sys.exit(f"make gpu: {problem}")
        run.run_all(stages)
    outcomes = run.outcomes
    print("\n".join(table(outcomes)), flush=True)
    print(f"All of it, with logs: {file}")
    sys.exit(any(each.end in (FAILED, STOPPED) for each in outcomes))


class Run:
    """A run of stages, and the folder that it fills.

    Attributes:
        folder: Of what goes into the archive: ``run.json``, and the folders ``results``, ``lines``
            and ``logs``.
        outcomes: What became of all that was tried until now.
        machine: Its name in those of files, its ``environment`` as in results, and where its
            ``tools`` are.
    """

    def __init__(self, work: Path, device: str, commit: str, to: Path) -> None:
        """Makes folders; starts nothing.

        Args:
            work: An empty folder.
            device: What is measured: ``cuda`` or ``cpu``.
            commit: Of the tree, where it has no ``.git``; may be empty.
            to: The archive.
        """
        self._start = time.monotonic()
        self.folder = work / "archive"
        self.outcomes: list[Outcome] = []
        self._site, self._device, self._archive = work / "site", device, to
        self.machine: dict[str, Any] = {"name": "unknown", "environment": None, "tools": {}}
        for name in ("results", "lines", "logs"):
            (self.folder / name).mkdir(parents=True)
        scripts, support = ROOT / "scripts", ROOT / "tests" / "support"
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (self._site, scripts, support))),
            "PYTHONUNBUFFERED": "1",
            "XDG_CACHE_HOME": str(work / "cache"),  # ceilings are measured once for all
            **({COMMIT: commit} if commit else {}),
            **({"TRITON_INTERPRET": "1"} if device == "cpu" else {}),
        }

    def prepare(self, command: str) -> str:
        """Finds packages, and asks what the machine is; returns why it cannot be used, if so.

        Args:
            command: That repeats the run.
        """
        if said := packages.provide(self._site):
            print(f"Packages that may be missing: {said}", flush=True)
        file = self.folder / "machine.json"
        arguments = ("-m", "gpu.machine", str(file), "{device}")
        job = Job("machine", arguments, _MOST_MACHINE_SECONDS)
        self._run(Stage("machine", _MOST_MACHINE_SECONDS, (job,)))
        if file.exists():
            self.machine |= json.loads(file.read_text("utf-8"))
            file.unlink()
        about = {"command": command, **self.machine}
        (self.folder / "run.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        if self.machine["environment"] and not self.machine["environment"]["commit"]:
            print("Results will name no commit: there is no .git, and no COMMIT= was given")
        (machine,) = self.outcomes
        return machine.said if machine.said == "torch finds no CUDA device" else ""

    def run_all(self, stages: Sequence[Stage]) -> None:
        """Runs stages, and writes the archive after each; none runs past what all may take."""
        until = self._start + MACHINE_SECONDS + sum(stage.seconds for stage in stages)
        try:
            for stage in stages:
                self._run(stage, until)
                self._write_archive()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            self._write_archive()

    def _run(self, stage: Stage, until: float = float("inf")) -> None:
        start = time.monotonic()
        lines = self.folder / "lines" / f"{stage.name}.jsonl"
        until = min(until, start + stage.seconds)
        waiting, running = deque(stage.jobs), list[tuple[Job, Program]]()
        try:
            while waiting or running:
                while waiting and len(running) < min(stage.beside, os.cpu_count() or 1):
                    job = waiting.popleft()
                    begun = self._begin(job, stage, lines, until)
                    if isinstance(begun, Program):
                        running.append((job, begun))
                    else:
                        append(begun, lines)
                for job, program in [*running]:
                    if program.has_ended():
                        running.remove((job, program))
                        append(self._outcome(job, program, stage), lines)
                time.sleep(_POLL_SECONDS)
        finally:
            for job, program in running:
                program.kill()
                said = "the run was interrupted"
                append(Outcome(stage.name, job.name, STOPPED, program.seconds, said), lines)
            found = read(lines)
            self.outcomes += found
            count = Counter(each.end for each in found)
            counted = ", ".join(f"{count[end]} {end}" for end in ENDS if count[end])
            print(f"{stage.name}: {counted}, {time.monotonic() - start:.0f} s", flush=True)

    def _begin(self, job: Job, stage: Stage, lines: Path, until: float) -> Program | Outcome:
        """Starts a job; what became of it if it cannot be run, or there is no time."""
        tool = self.machine["tools"].get(job.tool)
        if job.tool and tool is None:
            return Outcome(stage.name, job.name, SKIPPED, 0.0, f"{job.tool} was not found")
        if time.monotonic() >= until:
            return Outcome(stage.name, job.name, STOPPED, 0.0, "no time was left for it")
        words = {"file": self._file(job).name, "device": self._device, "seconds": job.seconds}
        arguments = [each.format(**words) for each in job.arguments]
        environment = {**self._environment, **job.environment, STAGE: stage.name, LINES: str(lines)}
        try:
            return Program(
                [*([tool, *job.under] if job.under else []), sys.executable, *arguments],
                self._log(stage, job),
                seconds=min(job.seconds, until - time.monotonic()),
                folder=self.folder / "results",
                environment=environment,
            )
        except OSError as error:
            return Outcome(stage.name, job.name, FAILED, 0.0, f"it cannot be started: {error}")

    def _outcome(self, job: Job, program: Program, stage: Stage) -> Outcome:
        said = reason(self._log(stage, job))
        if program.stopped:
            return Outcome(stage.name, job.name, STOPPED, program.seconds, said)
        if program.status == 0 and job.suffix and not self._file(job).exists():
            said = f"it wrote no result: {said}"
        elif program.status == 0:
            return Outcome(stage.name, job.name, PASSED, program.seconds)
        return Outcome(stage.name, job.name, FAILED, program.seconds, said)

    def _file(self, job: Job) -> Path:
        return self.folder / "results" / f"{self.machine['name']}-{job.name}{job.suffix}"

    def _log(self, stage: Stage, job: Job) -> Path:
        return self.folder / "logs" / f"{stage.name}-{job.name}.log"

    def _write_archive(self) -> None:
        if left_out := archive.write(self.folder, self._archive):
            print(f"too large for the archive: {', '.join(left_out)}", flush=True)


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What failed or was stopped, in short lines; the first of them if there are many."""
    bad = [each for each in outcomes if each.end in (FAILED, STOPPED)]
    count = Counter(each.end for each in outcomes)
    yield ", ".join(f"{count[end]} {end}" for end in ENDS) + (":" if bad else "")
    for each in bad[:_MOST_TOLD]:
        yield f"  {each.stage} | {each.name[-90:]} | {each.said[:120]}"
    if len(bad) > _MOST_TOLD:
        yield f"  and {len(bad) - _MOST_TOLD} more, in the archive's folder lines"


@contextmanager
def _ending_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does; SIGINT is not ignored, not by what is started either."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
