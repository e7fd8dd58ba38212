"""Running NVIDIA's profilers, with programs that stand in for them."""

from __future__ import annotations

import fcntl
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hogstream.cli.main import main
from hogstream.profiling.capture import captured
from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.nsight.compute import METRICS
from hogstream.profiling.nsight.tools import NCU, NSYS, Tool, find_tool, run_tool
from nsight_testing import raw_csv, stand_in, write_export

Command = Callable[..., tuple[int, str, str]]

NSYS_VERSION = "NVIDIA Nsight Systems version 2025.3.1.90-253135822126v0"
NCU_VERSION = "NVIDIA (R) Nsight Compute Command Line Profiler\\nVersion 2025.2.0.0 (build 3)"

# Writes down how it was called, and does as nsys does.
NSYS_BODY = """
import json, shutil
if arguments == ["--version"]:
    print("{version}")
elif "--help" in arguments:
    print("{options}")
else:
    with open("{calls}", "a") as file:
        print(json.dumps(arguments), file=file)
    target = [each.partition("=")[2] for each in arguments if each.startswith("--output=")][0]
    if arguments[0] == "export":
        shutil.copy("{export}", target)
    else:
        print("the program prints this")
        open(target, "w").write("report")
        sys.exit({status})
"""
NCU_BODY = """
import json
if arguments == ["--version"]:
    print("{version}")
else:
    with open("{calls}", "a") as file:
        print(json.dumps([*arguments, os.environ.get("LC_ALL")]), file=file)
    if "--import" in arguments:
        print(open("{export}").read(), end="")
    else:
        open(arguments[arguments.index("--log-file") + 1], "w").write("{log}")
        print("the program prints this")
        if {wrote}:
            open(arguments[arguments.index("--export") + 1], "w").write("NVR")
        sys.exit({status})
"""


class Tools:
    """Puts stand-ins for nsys and ncu on the PATH, and tells how they were called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch
        self._calls = folder / "calls"

    def nsys(self, *, status: int = 0, version: str = NSYS_VERSION, options: str = "") -> Path:
        export = write_export(self._folder / "prepared", kernels=[{"start": 5, "end": 9}])
        return self._put(
            "nsys", NSYS_BODY, version=version, options=options, export=export, status=status
        )

    def ncu(self, *, status: int = 0, log: str = "", wrote: bool = True) -> Path:
        export = self._folder / "prepared.csv"
        export.write_text(raw_csv({"gpu__time_duration.sum": "2,000"}), "utf-8")
        return self._put(
            "ncu", NCU_BODY, version=NCU_VERSION, export=export, status=status, log=log, wrote=wrote
        )

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self._calls.read_text().splitlines()]

    def _put(self, name: str, body: str, **values: object) -> Path:
        text = body.format(calls=self._calls, **values)
        return stand_in(self._folder / "bin", name, text, self._monkeypatch)


@pytest.fixture
def hogstream(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command; what it returns holds what its child processes print, too."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hogstream", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capfd.readouterr()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, captured.out, captured.err

    return run


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    monkeypatch.chdir(tmp_path)
    return Tools(tmp_path, monkeypatch)


@pytest.mark.parametrize("options", ["", "--cuda-event-trace=<true|false>"])
def test_nsys_command_line(tools: Tools, hogstream: Command, tmp_path: Path, options: str) -> None:
    tools.nsys(options=options)
    report = tmp_path / "mine.nsys-rep"
    status, out, err = hogstream("profile", "nsys", "--output", report, "--json", "x.json")
    assert (status, err) == (0, "")
    assert f"wrote {report}\nwrote x.json\n" in out
    profiled, exported = tools.calls()
    assert profiled == [
        *("profile", "--trace=cuda,nvtx", "--sample=none", "--cpuctxsw=none"),
        "--cuda-graph-trace=node",
        *(["--cuda-event-trace=false"] if options else []),
        *("--capture-range=cudaProfilerApi", "--capture-range-end=stop"),
        *("--force-overwrite=true", f"--output={report}"),
        *(sys.executable, "-m", "hogstream.cli.main"),
        *("bench", "--elements", "2^16", "--workers", "16", "--seconds", "0.5"),
    ]
    temporary = exported[3].partition("=")[2]
    assert exported == [
        *("export", "--type=sqlite", "--force-overwrite=true", f"--output={temporary}"),
        str(report),
    ]
    assert not Path(temporary).parent.exists()
    result = json.loads(Path("x.json").read_text())
    assert (result["kind"], result["profiler_version"]) == ("profile nsys", "2025.3.1.90")
    assert result["results"][0]["kernels"] == 1


@pytest.mark.parametrize(
    ("given", "marked"),
    [
        (["--", "bench", "--elements", "5", "--json", "b.json"], True),
        (["train", "--json", "t.json"], True),
        (["--", "python", "train.py", "--json", "-x"], False),
    ],
)
def test_programs_are_passed_on(
    tools: Tools, hogstream: Command, given: list[str], marked: bool
) -> None:
    tools.nsys()
    tools.ncu()
    for tool in ("nsys", "ncu"):
        assert hogstream("profile", tool, *given)[0] == 0
    nsys, _, (*ncu, _), _ = tools.calls()
    program = [each for each in given if each != "--"]
    expected = [sys.executable, "-m", "hogstream.cli.main", *program] if marked else program
    for arguments in (nsys, ncu):
        assert arguments[-len(expected) :] == expected
    assert ("--capture-range=cudaProfilerApi" in nsys) == marked
    assert ("--profile-from-start" in ncu) == marked


def test_ncu_command_line(tools: Tools, hogstream: Command) -> None:
    tools.ncu()
    status, out, err = hogstream(
        *("profile", "ncu", "--elements", "2^10", "--launches", "5", "--json", "x.json")
    )
    assert (status, err) == (0, "")
    profiled, imported = tools.calls()
    report, log = (profiled[profiled.index(name) + 1] for name in ("--export", "--log-file"))
    assert profiled[:-1] == [
        *("--target-processes", "all", "--clock-control", "none", "--profile-from-start", "off"),
        *("--kernel-name", "regex:rmsprop_kernel", "--launch-count", "5"),
        *("--metrics", ",".join(METRICS), "--log-file", log),
        *("--force-overwrite", "--export", report),
        *(sys.executable, "-m", "hogstream.profiling.nsight.workload", "1024"),
    ]
    assert report.startswith("hogstream-")
    assert report.endswith(".ncu-rep")
    assert f"wrote {report}" in out
    assert not Path(log).exists()
    assert imported == ["--import", report, "--page", "raw", "--csv", "--print-units", "base", "C"]
    (entry,) = json.loads(Path("x.json").read_text())["results"]
    assert (entry["elements"], entry["time_us"]["median"]) == (1024, 2)


def test_elements_of_a_program_are_known_if_given(tools: Tools, hogstream: Command) -> None:
    tools.ncu()
    for options, elements in (((), None), (("--elements", "500"), 500)):
        arguments = (*options, "--kernels", "mine|his", "--json", "x.json", "./train")
        assert hogstream("profile", "ncu", *arguments)[0] == 0
        assert json.loads(Path("x.json").read_text())["results"][0]["elements"] == elements
    assert "regex:mine|his" in tools.calls()[0]


def test_reports_are_read_with_the_tool_that_wrote_them(
    tools: Tools, hogstream: Command, tmp_path: Path
) -> None:
    tools.nsys()
    tools.ncu()
    systems, compute = tmp_path / "a.nsys-rep", tmp_path / "b.of-any-name"
    systems.write_bytes(b"anything")
    compute.write_bytes(b"NVR\0anything")
    assert "Timeline" in hogstream("profile", "read", systems)[1]
    assert "Counters" in hogstream("profile", "read", compute)[1]
    exported, imported = tools.calls()
    assert (exported[0], exported[-1]) == ("export", str(systems))
    assert imported[:2] == ["--import", str(compute)]


@pytest.mark.parametrize(
    ("tool", "start", "instead"),
    [
        (NSYS, b"anything", "nsys export --type sqlite"),
        (NCU, b"NVR\0", "ncu --page raw --csv --import"),
    ],
)
def test_a_report_without_its_tool_is_refused_with_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hogstream: Command,
    tool: Tool,
    start: bytes,
    instead: str,
) -> None:
    absent = replace(tool, places=())
    monkeypatch.setattr(f"hogstream.cli.profile_nsight.{tool.name.upper()}", absent)
    monkeypatch.setenv("PATH", "/bin-without-tools")
    report = tmp_path / f"kept.{tool.name}-rep"
    report.write_bytes(start)
    status, out, err = hogstream("profile", "read", report)
    assert (status, out, err.count("\n")) == (1, "", 1)
    for part in (str(report), f"{tool.name} was not found", "install Nsight", instead):
        assert part in err


def test_elements_are_refused_of_a_timeline(tools: Tools, hogstream: Command) -> None:
    tools.nsys()
    status, _, err = hogstream("profile", "read", "prepared", "--elements", "5")
    assert (status, err.count("\n")) == (2, 1)
    assert "--elements is for Nsight Compute, and 'prepared' is not from it" in err


def test_what_the_tool_says_of_a_bad_report_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hogstream: Command
) -> None:
    body = f"""
if arguments == ["--version"]:
    print("{NSYS_VERSION}")
else:
    print("Processing [=====]")
    print("Failed to open it: not a report\\n", file=sys.stderr)
    sys.exit(3)
"""
    stand_in(tmp_path / "bin", "nsys", body, monkeypatch)
    report = tmp_path / "bad.nsys-rep"
    report.write_bytes(b"torn")
    status, _, err = hogstream("profile", "read", report)
    said = "nsys ended with status 3 and says: Failed to open it: not a report"
    assert (status, err) == (1, f"hogstream: {report}: {said}\n")


@pytest.mark.parametrize("status", [1, 3, 139])
@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_a_failing_program_gives_its_status_and_shows_its_output(
    tools: Tools, hogstream: Command, tool: str, status: int
) -> None:
    getattr(tools, tool)(status=status)
    got, out, err = hogstream("profile", tool, "--output", f"kept.{tool}-rep", "./train")
    assert (got, out) == (status, "the program prints this\n")
    assert err.splitlines() == [
        f"hogstream: what was captured: hogstream profile read kept.{tool}-rep",
        f"hogstream: {tool} ended with status {status}",
    ]


def test_a_tool_ended_by_a_signal_gives_128_and_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = stand_in(tmp_path, "tool", "os.kill(os.getpid(), 9)", monkeypatch)
    assert run_tool([str(program)], {}) == 128 + 9


@pytest.mark.parametrize("status", [0, 1])
def test_counters_that_are_not_permitted(tools: Tools, hogstream: Command, status: int) -> None:
    said = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU"
    tools.ncu(log=said, status=status, wrote=False)
    got, out, err = hogstream("profile", "ncu")
    assert (got, out, err.count("\n")) == (1, "the program prints this\n", 1)
    assert "run it as root" in err
    assert "NVreg_RestrictProfilingToAdminUsers=0" in err


def test_what_ncu_says_is_passed_on(tools: Tools, hogstream: Command) -> None:
    log = "==PROF== Connected\\n==WARNING== No kernels were profiled.\\nAvailable Kernels:"
    tools.ncu(log=log, wrote=False)
    status, _, err = hogstream("profile", "ncu")
    assert (status, err.splitlines()) == (
        1,
        [
            "==WARNING== No kernels were profiled.",
            "hogstream: ncu wrote no report: no CUDA device was measured",
        ],
    )


def test_an_old_report_is_not_taken_for_a_new_one(tools: Tools, hogstream: Command) -> None:
    tools.ncu(wrote=False)
    Path("old.ncu-rep").write_bytes(b"NVR")
    status, _, err = hogstream("profile", "ncu", "--output", "old.ncu-rep", "./train")
    assert (status, err) == (1, "hogstream: ncu wrote no report: it captured nothing\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nsys", "--output", "x.sqlite"), "must end in .nsys-rep, got 'x.sqlite'"),
        (("nsys", "--output", "no/x.nsys-rep"), "cannot write"),
        (("nsys", "--output", "x%p.nsys-rep"), "must hold no %, which the tool would replace"),
        (("ncu", "--output", "x.ncu-rep", "--json", "x.ncu-rep"), "must be different files"),
        (("ncu", "--elements", "1,2"), "must be one number of elements, got '1,2'"),
        (("ncu", "--elements", "0"), "each must be a number of elements"),
        (("ncu", "--launches", "0"), "0 is not in the range"),
        (("read", "missing.sqlite"), "does not exist"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    tools: Tools, hogstream: Command, arguments: tuple[str, ...], said: str
) -> None:
    tools.nsys()
    tools.ncu()
    status, out, err = hogstream("profile", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert not Path("calls").exists()


def tool_in(*places: Path) -> Tool:
    return Tool("nsight-stand-in", "Nsight Stand In", (2022, 1), tuple(map(str, places)), "export")


def versioned(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    return stand_in(folder, "nsight-stand-in", f"print({version!r})", monkeypatch)


def test_the_newest_in_the_usual_places_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in ("2023.4", "2025.10", "2025.9"):
        versioned(tmp_path / number, f"Version {number}.1", monkeypatch)
    monkeypatch.setenv("PATH", "/usr/bin")
    found = find_tool(tool_in(tmp_path / "*" / "nsight-stand-in"))
    assert (found.path, found.version) == (
        str(tmp_path / "2025.10" / "nsight-stand-in"),
        "2025.10.1",
    )
    # What is on the PATH comes first, unless it is too old.
    monkeypatch.setenv("PATH", str(tmp_path / "2023.4"))
    assert find_tool(tool_in(tmp_path / "2025.10" / "nsight-stand-in")).version == "2023.4.1"
    versioned(tmp_path / "2023.4", "Version 2021.5.1", monkeypatch)
    assert find_tool(tool_in(tmp_path / "2025.9" / "nsight-stand-in")).version == "2025.9.1"


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "nsight-stand-in was not found: install"),
        ("NVIDIA Nsight Systems version 2021.5.2.53-28d0e6e", "is 2021.5.2.53, which is too old"),
        ("ERROR: nothing is installed here", "does not tell its version"),
    ],
)
def test_a_tool_that_will_not_do_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, said: str
) -> None:
    if version:
        versioned(tmp_path, version, monkeypatch)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MeasurementError) as refused:
        find_tool(tool_in())
    assert said in str(refused.value)
    assert "install Nsight Stand In 2022.1 or newer from https://" in str(refused.value)
    assert "\n" not in str(refused.value)


# Starts a process of its own; both hold a lock for as long as they live. Then interrupts us.
INTERRUPTING = """
import fcntl, signal, subprocess, time
if "--version" in arguments:
    print("{version}")
    sys.exit()
if "--help" in arguments:
    sys.exit()
lock = open("{lock}", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
os.set_inheritable(lock.fileno(), True)
def leave(number, frame):
    open([each for each in arguments if each.startswith("--output=")][0][9:], "w").write("part")
    {then}
signal.signal(signal.SIGINT, leave)
subprocess.Popen(["sh", "-c", "trap '' INT; sleep 1000"], close_fds=False)
os.kill(os.getppid(), signal.{signal})
while True:
    time.sleep(1000)
"""


def all_have_ended(lock: Path) -> bool:
    """Whether nobody holds the lock any more; waits for it."""
    limit = time.monotonic() + 20
    with lock.open() as file:
        while time.monotonic() < limit:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.01)
            else:
                return True
    return False


@pytest.mark.parametrize(
    ("sent", "then", "status", "last"),
    [
        ("SIGINT", "sys.exit(130)", 130, "hogstream: interrupted"),
        ("SIGTERM", "sys.exit(130)", 143, "hogstream: what was captured"),
        # Writes what it has, and stays: a second Ctrl-C ends it.
        ("SIGINT", "os.kill(os.getppid(), signal.SIGINT)", 130, "hogstream: interrupted"),
    ],
)
def test_an_interrupted_profile_leaves_its_report_and_no_process(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hogstream: Command,
    sent: str,
    then: str,
    status: int,
    last: str,
) -> None:
    lock, report = tmp_path / "lock", tmp_path / "part.nsys-rep"
    body = INTERRUPTING.format(version=NSYS_VERSION, lock=lock, signal=sent, then=then)
    stand_in(tmp_path / "bin", "nsys", body, monkeypatch)
    got, _, err = hogstream("profile", "nsys", "--output", report, "./train")
    assert all_have_ended(lock)
    assert got == status
    said = [line for line in err.splitlines() if line]
    assert said[0] == f"hogstream: what was captured: hogstream profile read {report}"
    assert said[-1].startswith(last)
    assert report.read_text() == "part"


def test_an_interruption_without_a_report_says_only_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hogstream: Command
) -> None:
    body = f"""
import signal
if arguments == ["--version"]:
    print("{NSYS_VERSION}")
elif "--help" not in arguments:
    os.kill(os.getppid(), signal.SIGINT)
"""
    stand_in(tmp_path / "bin", "nsys", body, monkeypatch)
    monkeypatch.chdir(tmp_path)
    status, _, err = hogstream("profile", "nsys", "./train")
    assert (status, err.split("\n", 1)[-1].strip()) == (130, "hogstream: interrupted")


def test_the_group_alone_lists_its_commands(hogstream: Command) -> None:
    status, out, err = hogstream("profile")
    assert (status, err) == (0, "")
    assert all(f"\n  {name} " in out for name in ("nsys", "ncu", "read"))


def test_capturing_costs_nothing_on_the_cpu() -> None:
    with captured(torch.device("cpu")):
        pass
    if not torch.cuda.is_available():
        assert not torch.cuda.is_initialized()


@pytest.mark.gpu
def test_capturing_without_a_profiler_does_no_harm() -> None:
    device = torch.device("cuda", 0)
    total = torch.zeros(4, device=device)
    for _ in range(2):
        with captured(device):
            total += 1
    with pytest.raises(ZeroDivisionError), captured(device):
        raise ZeroDivisionError
    assert total.tolist() == [2.0] * 4
