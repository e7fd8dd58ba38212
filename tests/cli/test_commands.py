"""The commands as a user runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from html import escape
from pathlib import Path
from typing import Any

import click
import pytest

from hogstream.cli.commands import Group, cli
from hogstream.profiling.interruption import End, gather_until_interrupted
from hogstream.scheduler import WorkerError
from process_testing import HOGSTREAM, run_python

Command = Callable[..., tuple[int, str, str]]

#: One policy, for a moment.
BRIEF_TRAINING = ("--policy", "lock-free", "--no-beside", "--updates", "45")


@pytest.mark.slow
def test_bench_measures_every_policy_and_writes_what_it_says(
    hogstream: Command, tmp_path: Path
) -> None:
    json_file, report = tmp_path / "bench.json", tmp_path / "report.html"
    status, out, err = hogstream(
        *("bench", "--device", "cpu", "--workers", "1,3", "--elements", "1000,2^11"),
        *("--seconds", "0.05", "--dtype", "bfloat16", "--think-time", "0.0001"),
        *("--think-spread", "1", "--json", json_file, "--report", report),
    )
    assert (status, err.count("\n")) == (0, 2 + 2 * 2 * 7)  # a line a step
    assert f"wrote {json_file}" in out
    assert f"wrote {report}" in out
    bench = json.loads(json_file.read_text())
    check_bench(bench)
    assert "Lock-free takes, of this machine's ceilings: at 1,000 elements" in " ".join(out.split())
    check_report(report.read_text("utf-8"), bench)


def check_bench(bench: dict[str, Any]) -> None:
    assert (bench["kind"], bench["schema"]) == ("bench", 2)
    assert (bench["partial"], bench["error"], bench["telemetry_cost"]) == (False, None, None)
    assert bench["command"].startswith("hogstream bench --device cpu --workers 1,3")
    assert {"device", "backend", "versions", "cores", "commit"} <= bench["environment"].keys()
    memory = bench["ceilings"]["levels"][-1]
    assert memory["level"] == "memory"
    assert memory["copy_gigabytes_per_second"]["median"] > 0
    assert memory["update_shaped_gigabytes_per_second"]["median"] > 0
    assert {kernel["name"]: kernel["differing_bits"] for kernel in bench["kernels"]} == {
        "hogstream, numba": 0,
        "hogstream, numpy": 0,
        "NumPy expression": None,
        "torch RMSprop (foreach)": None,
    }
    policies = ["lock-free", "locked", "ordered", "awaited"]
    assert [(r["elements"], r["workers"], r["policy"]) for r in bench["results"]] == [
        (elements, workers, policy)
        for elements in (1000, 2048)
        for workers in (1, 3)
        for policy in policies
    ]
    for result in bench["results"]:
        assert (result["dtype"], result["backend"], result["device"]) == (
            "bfloat16",
            "numba",
            "cpu",
        )
        speed, rounds = median_and_samples(result["updates_per_second"])
        assert sorted(rounds)[3] == speed
        low, high = result["updates_per_second"]["interval"]
        assert min(rounds) <= low <= speed <= high <= max(rounds)
        traffic = speed * result["elements"] * 14 / 1e9
        assert result["gigabytes_per_second"] == pytest.approx(traffic)
        assert 0 < result["latency_us"]["p50"] <= result["latency_us"]["p99"]
        assert result["staleness"]["max"] >= result["staleness"]["mean"] >= 0
        assert result["lost_updates_fraction"] is None
        assert result["share_of_ceilings"]["launch_rate"] > 0
        assert sum(result["staleness"]["histogram"].values()) == result["updates"]
        assert sum(result["latency_us"]["histogram"]["counts"]) == result["updates"]
        peers = {
            other["policy"]: other["updates_per_second"]["median"]
            for other in bench["results"]
            if (other["elements"], other["workers"]) == (result["elements"], result["workers"])
        }
        assert result["gains"].keys() == {*policies} - {result["policy"]}
        for other, gain in result["gains"].items():
            assert gain["median"] == pytest.approx(speed / peers[other])
            assert gain["interval"][0] <= gain["median"] <= gain["interval"][1]


def median_and_samples(spread: dict[str, Any]) -> tuple[float, list[float]]:
    return spread["median"], spread["samples"]


def check_report(html: str, bench: dict[str, Any]) -> None:
    assert len(re.findall('<svg (?![^>]*"swatch")', html)) >= 9
    assert escape(bench["command"]) in html.replace("&#39;", "&#x27;")


@pytest.mark.slow
def test_sweep_has_other_defaults_and_tells_gains(hogstream: Command, tmp_path: Path) -> None:
    json_file, plot = tmp_path / "sweep.json", tmp_path / "gain.svg"
    status, out, _ = hogstream(
        *("bench", "--device", "cpu", "--elements", "64,2^10", "--seconds", "0.07", "--sweep"),
        *("--json", json_file, "--plot", plot),
    )
    assert status == 0
    sweep = json.loads(json_file.read_text())
    assert sweep["settings"]["seconds"] == 0.07  # given, so no default
    assert [(r["elements"], r["workers"], r["policy"]) for r in sweep["results"]] == [
        (elements, workers, policy)
        for elements in (64, 1024)
        for workers in (1, 2, 4, 8, 16)
        for policy in ("lock-free", "locked", "ordered", "awaited")
    ]
    picture = plot.read_text("utf-8")
    over = "the stronger of locked and ordered"
    assert f"Lock-free over {over}" in out
    assert f"Lock-free clearly gains over {over}" in " ".join(out.split())
    assert f"over those of {over}" in picture
    for result in sweep["results"]:
        if result["policy"] == "lock-free" and result["workers"] > 1:
            gains = [result["gains"][name]["median"] for name in ("locked", "ordered")]
            assert f"{min(gains):.2f}x" in out
            assert f"{min(gains):.2f}x" in picture
    for label in ("elements", "workers", "one alone, of ceiling", "the difference may be noise"):
        assert label in picture


@pytest.mark.slow
def test_bench_runs_the_scheduler_as_it_is_told(hogstream: Command, tmp_path: Path) -> None:
    json_file, report = tmp_path / "bench.json", tmp_path / "report.html"
    status, out, _ = hogstream(
        *("bench", "--device", "cpu", "--workers", "1,4", "--elements", "2^10,2^17"),
        *("--policies", "lock-free,awaited,bounded:007", "--seconds", "0.2", "--telemetry"),
        *("--batch", "11", "--batch-of", "lane", "--state", "per-worker", "--read", "snapshot"),
        *("--buffers", "average"),
        *("--staleness-aware", "--on-error", "restart", "--on-nonfinite", "skip"),
        *("--deadline", "60", "--json", json_file, "--report", report),
    )
    assert status == 0
    bench = json.loads(json_file.read_text())
    assert bench["settings"]["scheduling"] == {
        "depth": 11,  # as many as a batch
        "batch": 11,
        "batch_of": "lane",
        "state": "per-worker",
        "read": "snapshot",
        "buffers": "average",
        "staleness_aware": True,
        "telemetry": True,
        "on_error": "restart",
        "on_nonfinite": "skip",
        "deadline": 60.0,
    }
    assert [(result["policy"], result["batch"]) for result in bench["results"]] == [
        *(("lock-free", 11), ("awaited", 1), ("bounded:7", 1))
    ] * 4
    assert max(each["staleness"]["max"] for each in bench["results"][2::3]) <= 7
    for result in bench["results"]:
        if result["policy"] == "awaited" or result["workers"] == 1:
            assert result["lost_updates_fraction"] == result["overwrites_per_update"] == 0
        else:
            assert 0 <= result["lost_updates_fraction"] <= result["overwrites_per_update"]
    costs = [(cost["elements"], cost["workers"]) for cost in bench["telemetry_cost"]]
    assert costs == [(2**10, 4), (2**17, 4)]
    for cost in bench["telemetry_cost"]:
        assert len(cost["with_telemetry"]["samples"]) == len(cost["without_telemetry"]["samples"])
        low, high = cost["ratio"]["interval"]
        assert 0 < low <= cost["ratio"]["median"] <= high
    said = " ".join(out.split())
    assert "batches of 11 of one worker; with awaited and bounded:7, one by one." in said
    for text in (said, report.read_text("utf-8")):
        assert "Lost with lock-free of the updates, block by block, at most: at 2^10" in text
        assert "Telemetry costs lock-free, of its updates/s: at 2^10 elements" in text
        assert "Races" in text
    told = [line for line in out.splitlines() if not line.startswith(f"wrote {tmp_path}")]
    assert max(map(len, told)) <= 84  # paths are as long as they are


@pytest.mark.slow
def test_trace_shows_every_update_of_every_policy(hogstream: Command, tmp_path: Path) -> None:
    json_file, trace = tmp_path / "train.json", tmp_path / "trace.json"
    status, out, _ = hogstream(
        *("train", "digits", "--device", "cpu", "--workers", "2", "--policy", "all"),
        *("--no-beside", "--updates", "45", "--rounds", "2", "--telemetry"),
        *("--json", json_file, "--trace", trace),
    )
    assert status == 0
    assert f"wrote {trace}" in out
    results = json.loads(json_file.read_text())["results"]
    events = json.loads(trace.read_text())["traceEvents"]
    updates = [event for event in events if event.get("cat") == "update"]
    assert len(updates) == sum(result["updates"] for result in results) == 4 * 2 * 45
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"lane 0", "lane 1", "worker 0", "worker 1"} <= tracks
    for result in results:
        assert f"Lost with {result['policy']} of the updates" in " ".join(out.split())


@pytest.mark.slow
def test_bench_measures_what_people_run_today(tmp_path: Path) -> None:
    json_file, report = tmp_path / "bench.json", tmp_path / "report.html"
    out = run_python(
        *(str(HOGSTREAM), "bench", "--device", "cpu", "--today", "--dtype", "bfloat16"),
        *("--workers", "2", "--elements", "2^10", "--policies", "lock-free,locked"),
        *("--seconds", "0.35", "--json", str(json_file), "--report", str(report)),
    )
    bench = json.loads(json_file.read_text())
    setups = [(run["spread_over"], run["update"], run["lock"]) for run in bench["today"]]
    assert setups == [
        ("threads", "torch.optim.RMSprop", False),
        ("threads", "torch.optim.RMSprop", True),
        ("processes", "torch.optim.RMSprop", False),
        ("processes", "torch.optim.RMSprop", True),
        ("threads", "rmsprop_", True),
    ]
    (mine,) = [run for run in bench["results"] if run["policy"] == "lock-free"]
    lock_free, _ = median_and_samples(mine["updates_per_second"])
    for run in bench["today"]:
        assert (run["workers"], run["elements"]) == (2, 1024)
        speed, rounds = median_and_samples(run["updates_per_second"])
        assert len(rounds) == 7
        assert min(rounds) > 0
        assert run["lock_free_ratio"]["median"] == pytest.approx(lock_free / speed)
    told = " ".join(out.split())
    assert "What people run today" in told
    (first,) = re.findall(
        r"At best lock-free makes .* those of the fastest of what people run today, "
        r"[a-z]+ with torch\.optim\.RMSprop[a-z ]*\.",
        told,
    )
    assert f"<h1>{first}" in report.read_text("utf-8")


# Spawned processes import what runs as main, which in pytest would be that.
OVER_PROCESSES = ("--device", "cpu", "--processes", "2", "--json")


@pytest.mark.slow
def test_bench_spreads_workers_over_processes(tmp_path: Path) -> None:
    json_file = tmp_path / "bench.json"
    out = run_python(
        *(str(HOGSTREAM), "bench", *OVER_PROCESSES, str(json_file)),
        *("--workers", "2", "--elements", "2^10", "--seconds", "0.2"),
        *("--policies", "lock-free,locked"),
    )
    bench = json.loads(json_file.read_text())
    assert bench["settings"]["processes"] == 2
    assert bench["environment"]["event_loop"] == "asyncio"  # that of the processes
    results = bench["results"]
    assert [result["policy"] for result in results] == ["lock-free", "locked"]
    for result in results:
        assert (result["processes"], result["workers"]) == (2, 4)
        assert min(result["updates_by_worker"]) > 0
        assert len(result["updates_by_worker"]) == 4
    assert "Workers were spread over 2 processes." in " ".join(out.split())


@pytest.mark.slow
def test_training_of_a_workload_of_ones_own_over_processes_beside_one_by_hand(
    tmp_path: Path,
) -> None:
    json_file, plot, trace = (tmp_path / name for name in ("train.json", "loss.svg", "trace.json"))
    out = run_python(
        *(str(HOGSTREAM), "train", "tiny_workload:TINY", *OVER_PROCESSES, str(json_file)),
        *("--workers", "1", "--policy", "lock-free", "--rounds", "1"),
        *("--plot", str(plot), "--trace", str(trace)),
    )
    result = json.loads(json_file.read_text())
    assert result["settings"]["workload"] == "tiny"
    mine, alone, by_hand = result["results"]
    assert [each["policy"] for each in result["results"]] == ["lock-free", "one alone", "by hand"]
    for run, workers, processes in ((mine, 2, 2), (alone, 1, 1), (by_hand, 2, 2)):
        assert (run["workers"], run["processes"]) == (workers, processes)
        assert run["reached"] == [True]
        assert run["metrics"][-1][1] <= 1e-3 < run["metrics"][0][1]
        assert len(run["updates_by_worker"]) == workers
        assert run["losses"]
        assert run["policy"] in out
        assert f"{run['policy']}: {run['seconds_to_target']['median']:.2f} s" in plot.read_text()
    assert mine["gains"].keys() == {"one alone", "by hand"}
    assert (by_hand["backend"], by_hand["staleness"]["mean"]) == ("torch", None)
    events = json.loads(trace.read_text())["traceEvents"]
    updates = sum(event.get("cat") == "update" for event in events)
    assert updates == mine["updates"] + alone["updates"]


@pytest.mark.slow
def test_failed_workers_end_a_measurement_in_one_line(hogstream: Command, tmp_path: Path) -> None:
    json_file = tmp_path / "bench.json"
    bench = ("bench", "--device", "cpu", "--workers", "1", "--elements", "64", "--json", json_file)
    late = ("--policies", "lock-free", "--think-time", "0.2", "--deadline", "0.01")
    status, out, err = hogstream(*bench, *late, "--seconds", "0.5")
    assert (status, out) == (1, "")
    failed = (
        "hogstream: worker 0 failed: TimeoutError: iteration 0 took longer than deadline=0.01 s"
    )
    assert err.splitlines()[-1] == failed
    assert not json_file.exists()


def test_what_was_measured_before_workers_failed_is_kept() -> None:
    async def measure() -> AsyncIterator[int]:
        yield 1
        raise WorkerError({3: LookupError("no data")})

    error = "worker 3 failed: LookupError: no data"
    assert gather_until_interrupted(measure()) == ([1], End(partial=True, error=error))


@pytest.mark.slow
def test_train_digits_learns_under_every_policy(hogstream: Command, tmp_path: Path) -> None:
    json_file = tmp_path / "train.json"
    status, out, _ = hogstream(
        *("train", "digits", "--device", "cpu", "--workers", "3", "--no-beside"),
        *("--updates", "400", "--rounds", "2", "--json", json_file),
    )
    assert status == 0
    results = json.loads(json_file.read_text())["results"]
    policies = ["lock-free", "locked", "ordered", "awaited"]
    assert [result["policy"] for result in results] == policies
    for result in results:
        assert result["workers"] == 3
        assert result["updates"] == 2 * 400
        assert result["metric"]["median"] > 0.85
        assert result["losses"][-1][1] < result["losses"][0][1]
        for name in ("seconds_to_target", "updates_to_target", "metric", "updates_per_second"):
            median, rounds = median_and_samples(result[name])
            assert len(rounds) == 2
            assert median == pytest.approx(sum(rounds) / 2)  # the median of two
            assert result[name]["interval"] is None  # two rounds bound nothing
        assert result["policy"] in out
    said = " ".join(out.split())
    assert "Lock-free reached test accuracy 0.97 in 0 of 2 rounds only." in said
    assert "the seconds of lock-free (fewer than 5 rounds)" in said


@pytest.mark.slow
def test_results_are_written_before_a_closed_pipe_ends_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hogstream.cli.main", "train", "digits"]
    options = [
        "--device",
        "cpu",
        *BRIEF_TRAINING,
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "train.json"),
    ]
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([*command, *options], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert process.stderr.count("Traceback") == 0
    assert len(json.loads((tmp_path / "train.json").read_text())["results"]) == 1


@pytest.mark.slow
def test_doctor_tells_what_works_and_why_the_rest_does_not(hogstream: Command) -> None:
    status, out, _ = hogstream("doctor")
    assert status == 0
    assert re.search(r"numba +works", out)
    assert re.search(r"numpy +works", out)
    assert re.search(r"torch +2\.", out)
    assert re.search(r"cpu +\d+\.\d +\d+\.\d", out)


@pytest.mark.slow
def test_a_file_that_cannot_be_written_keeps_nothing_else_from_being_told(
    hogstream: Command, tmp_path: Path
) -> None:
    trace, plot = tmp_path / "trace.json", tmp_path / "loss.svg"
    status, out, err = hogstream(
        *("train", "digits", "--device", "cpu", *BRIEF_TRAINING, "--rounds", "1"),
        *("--json", "/dev/full", "--trace", trace, "--plot", plot),
    )
    assert status == 1
    assert err.splitlines()[1:] == ["hogstream: cannot write /dev/full: No space left on device"]
    assert "lock-free" in out
    assert "wrote /dev/full" not in out
    for path in (trace, plot):
        assert f"wrote {path}" in out
        assert path.stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["closed", "full"])
def test_results_are_written_where_nothing_can_be_printed(tmp_path: Path, closed: str) -> None:
    json_file = tmp_path / "train.json"
    words = f"train digits --device cpu {' '.join(BRIEF_TRAINING)} --rounds 1 --json {json_file}"
    to = {"closed": ">&-", "full": "> /dev/full"}[closed]
    command = f"exec {sys.executable} -m hogstream.cli.main {words} {to}"
    ended = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    said = ended.stderr.splitlines()[1:]
    if closed == "full":
        assert said == ["hogstream: cannot write to standard output: No space left on device"]
        assert ended.returncode == 1
    else:
        assert (said, ended.returncode) == ([], 0)
    assert len(json.loads(json_file.read_text())["results"]) == 1


LOADS = """
import sys
from hogstream.cli.main import main
sys.argv[1:] = {arguments!r}
try:
    main()
except SystemExit:
    print(*sys.modules)
"""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["profile", "-h"]])
def test_help_waits_for_nothing_large(arguments: list[str]) -> None:
    loaded = run_python("-c", LOADS.format(arguments=arguments)).splitlines()[-1].split()
    assert "click" in loaded
    assert not {"torch", "numpy", "matplotlib", "rich", "msgspec", "asyncio"} & {*loaded}


def test_help_says_of_commands_what_they_say_themselves() -> None:
    context, told = click.Context(cli), 0
    for group in (cli, *cli.commands.values()):
        assert isinstance(group, Group)
        for name, later in group.later.items():
            command = group.get_command(context, name)
            assert command is not None
            assert later.help.rstrip(".") == command.get_short_help_str(limit=1000).rstrip(".")
            assert name == command.name
            told += 1
    assert told == 14


def test_commands_explain_themselves(hogstream: Command) -> None:
    for arguments in (
        [],
        ["--help"],
        ["bench", "--help"],
        ["compare", "-h"],
        ["train", "-h"],
    ):
        status, out, err = hogstream(*arguments)
        assert (status, err) == (0, "")
        assert out.startswith("Usage: hogstream")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--workers", "0"], "'--workers': each must be .* 1 to 1024, got '0'"),
        (["bench", "--workers", "2,x"], "'--workers': each must be .* 1 to 1024, got 'x'"),
        (["bench", "--elements", "2^x"], "'--elements': each must be a number .* got '2\\^x'"),
        (["bench", "--elements", "0"], "'--elements': each must be a number .* got '0'"),
        (["bench", "--policies", "zap"], "'--policies': must be one of lock-free.* got 'zap'"),
        (
            ["bench", "--policies", "bounded:x"],
            "'--policies': must be .* or bounded:K with",
        ),
        (
            ["bench", "--policies", "locked,row-locked"],
            "'--policies': each must be one of lock-free, locked, ordered, awaited, or bounded:K",
        ),
        (["bench", "--batch", "0"], "'--batch': 0 is not in the range"),
        (["bench", "--batch", "3", "--depth", "2"], "'--batch': must be an integer <= 2, as many"),
        (["bench", "--batch", "9", "--batch-of", "lanes"], "'--batch': must be an integer <= 8"),
        (
            ["bench", "--batch", "2", "--policies", "awaited,bounded:1"],
            "'--batch': must be 1 with awaited, bounded:1, which waits for each update, got 2",
        ),
        (["bench", "--telemetry", "--backend", "numpy"], "'--telemetry': needs a backend that"),
        (["bench", "--deadline", "0"], "'--deadline': must be a finite number > 0, got '0'"),
        (["bench", "--read", "zap"], "'--read': 'zap' is not one of"),
        (["bench", "--trace", "trace.json"], "--trace needs one policy, one worker count and one"),
        (["bench", "--processes", "0"], "'--processes': 0 is not in the range"),
        (
            ["bench", "--processes", "2", "--policies", "ordered"],
            "'--processes': must be 1 with policies other than lock-free, locked, awaited, got 2",
        ),
        (["bench", "--trace", "x", "--json", "x"], "--json and --trace must be different files"),
        (["bench", "--device", "tpu"], "'--device': must be best, cpu, cuda.* got 'tpu'"),
        (["bench", "--device", "cuda:99"], "'--device': .*CUDA devices, got 'cuda:99'"),
        (["bench", "--backend", "zap"], "'--backend': 'zap' is not one of"),
        (["bench", "--dtype", "int8"], "'--dtype': 'int8' is not one of"),
        (["bench", "--depth", "0"], "'--depth': 0 is not in the range"),
        (["bench", "--elements", "2^39"], "'--elements': must fit the memory of cpu, of which"),
        (["bench", "--json", "x", "--report", "./x"], "--json and --report must be different"),
        (
            ["bench", "--plot", "x.svg", "--report", "x.svg"],
            "--report and --plot must be different",
        ),
        (["bench", "--plot", "x.txt"], "'--plot': must end in .png, .svg or .pdf"),
        (
            ["bench", "--sweep", "--policies", "lock-free"],
            "'--policies': --sweep and --plot need lock-free and locked or ordered, got",
        ),
        (["bench", "--plot", "x.svg", "--policies", "locked,ordered"], "need lock-free and locked"),
        (
            ["bench", "--plot", "x.svg", "--workers", "1"],
            "'--workers': --sweep and --plot show what several workers gain, got 1",
        ),
        (["bench", "--seconds", "nan"], "'--seconds': must be a finite number > 0, got 'nan'"),
        (["bench", "--think-time", "-1"], "'--think-time': must be a finite number >= 0"),
        (["bench", "--seed", "-1"], "'--seed': -1 is not in the range"),
        (["bench", "--json", "/no/such/folder/x"], "'--json': cannot write '/no/such/folder/x'"),
        (["bench", "--report", "/"], "'--report': cannot write '/'"),
        (["compare", "--shapes", "0"], "'--shapes': each must be resnet50, gpt2, .* got '0'"),
        (["compare", "--shapes", "3x"], "'--shapes': each must be resnet50, gpt2, .* got '3x'"),
        (
            ["compare", "--shapes", "10001x1"],
            "'--shapes': each .* 10,000 tensors .* '10001x1'",
        ),
        (["compare", "--shapes", "2^39"], "'--shapes': must fit the memory of cpu, .* got 2\\^39"),
        (["compare", "--peers", "zap"], "'--peers': each must be one of hogstream, .* got 'zap'"),
        (["compare", "--seconds", "0"], "'--seconds': must be a finite number > 0, got '0'"),
        (["compare", "--plot", "bars.zap"], "'--plot': must end in .png, .svg or .pdf"),
        (["compare", "--json", "x.png", "--plot", "x.png"], "--json and --plot must be different"),
        (["train", "digits", "--workers", "0"], "'--workers': 0 is not in the range"),
        (
            ["train", "digits", "--policy", "zap"],
            "'--policy': must be one of .* got 'zap'",
        ),
        (
            ["train", "digits", "--policy", "awaited", "--batch", "2"],
            "'--batch': must be 1 with",
        ),
        (["train", "digits", "--updates", "0"], "'--updates': 0 is not in the range"),
        (["train", "digits", "--seconds", "0"], "'--seconds': must be a finite number > 0, got"),
        (["train", "digits", "--rounds", "0"], "'--rounds': 0 is not in the range"),
        (
            ["train", "digits", "--processes", "2", "--policy", "ordered"],
            "'--processes': must be 1 with policies other than lock-free, locked, awaited, got 2",
        ),
        (["train"], "Missing argument 'WORKLOAD'"),
        (
            ["train", "zap"],
            "'WORKLOAD': must be cartpole, digits, pong, or MODULE:NAME such as .*, got 'zap'",
        ),
        (["train", "x y:z"], "'WORKLOAD': must be MODULE:NAME, such as .*, got 'x y:z'"),
        (["train", "no_such:mine"], "'WORKLOAD': cannot import no_such: ModuleNotFoundError"),
        (["train", "tiny_workload:ZAP"], "'WORKLOAD': tiny_workload has no ZAP"),
        (
            ["train", "tiny_workload:NOTHING"],
            "'WORKLOAD': tiny_workload:NOTHING: must be a Workload, with name, target, .* got 3",
        ),
        (
            ["train", "tiny_workload:BOUND_TO_ITS_PROCESS"],
            "'WORKLOAD': tiny must be something that can be pickled for other processes",
        ),
        (["train", "digits", "--plot", "loss.zap"], "'--plot': must end in .png, .svg or .pdf"),
        (["bench", "--zap"], "No such option"),
        (["zap"], "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(
    hogstream: Command,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = hogstream(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err), err
    assert list(tmp_path.iterdir()) == []  # checking a path leaves nothing
