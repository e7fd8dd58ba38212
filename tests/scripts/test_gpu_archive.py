"""What ``make gpu`` brings back, and the pages made from it."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path

import pytest

from gpu import archive
from gpu.outcomes import FAILED, PASSED
from gpu.results import unpack
from gpu.stages import Job, Stage
from gpu.suite import Run
from hogstream.profiling.results.files import BadResultError
from hogstream.profiling.results.schema import Compare
from report_testing import committed
from results_page import RESULTS, results


def test_what_does_not_fit_is_left_out_the_largest_first(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "logs").mkdir(parents=True)
    noise = random.Random(0).randbytes
    for name, size in (("small", 100), ("logs/middle", 5000), ("large", 50_000)):
        (folder / name).write_bytes(noise(size))
    made = tmp_path / "all.zip"
    assert archive.write(folder, made, most_bytes=10_000) == ["large"]
    with zipfile.ZipFile(made) as file:
        assert set(file.namelist()) == {"small", "logs/middle", archive.LEFT_OUT}
        assert file.read("logs/middle") == (folder / "logs" / "middle").read_bytes()
        assert file.read(archive.LEFT_OUT) == b"large\n"
    assert archive.write(folder, made) == []
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["all.zip"]


def test_of_a_long_log_the_beginning_and_the_end_are_kept(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.log").write_bytes(b"begins" + b"." * (1 << 20) + b"ends")
    archive.write(tmp_path / "folder", tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as file:
        log = file.read("a.log")
    assert log.startswith(b"begins.")
    assert log.endswith(b".ends")
    assert b"... left out ..." in log
    assert len(log) < 300 << 10


@pytest.mark.slow
def test_an_archive_is_brought_home_and_its_pages_are_made(tmp_path: Path) -> None:
    """Of a run of stages made for this test, on this machine."""
    compare = next(RESULTS.glob("*-compare.json"))
    copies = f"import shutil; shutil.copy({str(compare)!r}, r'{{file}}')"
    jobs = (
        Job("some-compare", ("-c", copies), 60, suffix=".json"),
        Job("broken", ("-c", "exit('no memory')"), 60),
    )
    run = Run(tmp_path / "work", "cpu", "", tmp_path / "all.zip")
    assert run.prepare("make gpu STAGES=tensors,lanes") == ""
    run.run_all([Stage("tensors", 60, jobs)])

    home = tmp_path / "results"
    home.mkdir()
    files, outcomes = unpack(tmp_path / "all.zip", home)
    assert [(each.stage, each.name, each.end) for each in outcomes] == [
        ("machine", "machine", PASSED),
        ("tensors", "some-compare", PASSED),
        ("tensors", "broken", FAILED),
    ]
    assert sorted(home.iterdir()) == sorted(files)
    (of_run,) = home.glob("*-tensors-lanes-gpu.json")
    assert json.loads(of_run.read_text())["environment"]["device"] == "cpu"
    page = "\n\n".join(results(home))
    assert f"`make gpu STAGES=tensors,lanes` ([JSON](results/{of_run.name})):" in page
    assert "| tensors | 1 | 1 | 0 | 0 |" in page
    assert "1 failure.\n- `tensors` broken failed: no memory" in page
    assert committed("compare", Compare).command in page


def test_an_archive_with_a_result_that_is_none_is_refused_whole(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as made:
        made.writestr("run.json", json.dumps({"command": "make gpu", "environment": None}))
        made.writestr("results/h100-compare.json", "{}")
    (tmp_path / "home").mkdir()
    with pytest.raises(BadResultError, match=r"^h100-compare\.json: "):
        unpack(tmp_path / "all.zip", tmp_path / "home")
    assert not any((tmp_path / "home").iterdir())
