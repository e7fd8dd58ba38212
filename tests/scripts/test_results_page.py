"""The pages of results: their measured parts are made from result files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hogstream.profiling.report import answers, sentences
from hogstream.profiling.results.files import write_result
from hogstream.profiling.results.profile_schema import GpuOutcome, GpuRun
from hogstream.profiling.results.schema import Bench, Compare, MachineCeilings, Train
from report_testing import committed
from results_page import RESULTS, races, result, results, updated

MARKS = "before\n<!-- {0}: made by `make results` -->\nold\n<!-- end of {0} -->\nafter\n"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("README.md", "result"),
        ("docs/results.md", "results"),
        ("docs/lock-free.md", "races"),
        ("docs/guide/asynchronous.md", "models"),
    ],
)
def test_only_what_is_between_the_marks_is_made_anew(name: str, part: str) -> None:
    text = MARKS.format(part)
    made = updated(name, text, RESULTS)
    assert made.startswith(text.partition("old")[0])
    assert made.endswith(text.partition("old")[2])
    assert "old" not in made.split("\n")
    assert updated(name, made, RESULTS) == made


def test_without_marks_a_document_is_left_alone() -> None:
    with pytest.raises(ValueError, match=r"README.md must hold a mark <!-- result: ... -->"):
        updated("README.md", "no marks", RESULTS)


def test_sweep_is_told_as_gains(tmp_path: Path) -> None:
    sweep = committed("sweep", Bench)
    write_result(sweep, tmp_path / "some-sweep.json")
    page = "\n\n".join(results(tmp_path))
    assert f"`{sweep.command}` ([JSON](results/some-sweep.json)):" in page
    for sentence in sentences.gains(sweep):
        assert f"- {sentence}\n" in page
    assert (
        "over the stronger of locked and ordered:\n\n| elements | 2 workers | 4 workers |" in page
    )
    assert "Lock-free against" not in page  # too many, in a sweep


def test_readme_has_a_picture_and_a_sentence_of_the_last_sweep(tmp_path: Path) -> None:
    assert len(result(tmp_path)) == 1  # the link alone
    for name, verdict in (("amd", "slow"), ("nvidia", "fast")):
        sweep = committed("sweep", Bench)
        sweep.environment.device_name = verdict
        write_result(sweep, tmp_path / f"{name}-sweep.json")
    picture, sentence, _ = result(tmp_path)
    assert picture.endswith("(docs/results/gain.png)")
    assert sentence.startswith("On fast (cpu, 2 cores)")
    assert answers.answer(sweep).verdict in sentence


def test_all_optimizers_are_told_and_those_skipped_with_their_reason(tmp_path: Path) -> None:
    compare = committed("compare", Compare)
    write_result(compare, tmp_path / "cpu-compare.json")
    page = "\n\n".join(results(tmp_path))
    assert f"`{compare.command}` on {compare.environment.device_name}" in page
    assert "(results/cpu-compare.json)" in page
    for time in compare.results:
        assert f"| {time.shape} | {time.peer} | " in page
    assert compare.skipped
    for entry in compare.skipped:
        assert f"| {entry.peer} | " in page
        assert f"| {entry.reason} |" in page
    assert "Nothing was measured on a GPU yet." in page
    write_result(compare, tmp_path / "nvidia-h100-compare.json")
    assert "The policies were not compared on a GPU yet." in "\n".join(results(tmp_path))


def test_counters_of_nsight_compute_are_told(tmp_path: Path) -> None:
    (profiled,) = RESULTS.glob("*-profile-ncu.json")
    shutil.copy(profiled, tmp_path)
    page = "\n\n".join(results(tmp_path))
    assert "Nsight Compute's counters, on NVIDIA H200:" in page
    assert "| rmsprop_kernel | 67,108,864 | 310.1 | 88.2 | 4,238 | 19.58 | 48 |" in page


def test_a_program_that_fails_with_its_tests_is_not_told_beside_them(tmp_path: Path) -> None:
    ends: list[tuple[str, str, Any]] = [
        ("tests", "tests/a.py::test_a", "failed"),
        ("tests", "tests", "failed"),
        ("lanes", "lanes", "failed"),
        ("sizes", "sizes", "stopped"),
    ]
    outcomes = [GpuOutcome(stage, name, end, 1.0, "why") for stage, name, end in ends]
    environment = committed("compare", Compare).environment
    run = GpuRun(command="make gpu", environment=environment, outcomes=outcomes)
    write_result(run, tmp_path / "nvidia-h100-tests-gpu.json")
    page = "\n\n".join(results(tmp_path))
    assert ": 3 failures.\n- `tests` tests/a.py::test_a failed: why\n- `lanes` lanes" in page


def test_every_kind_of_committed_result_is_on_a_page() -> None:
    page = "\n\n".join([*results(RESULTS), *races(RESULTS)])
    for job, type_ in (
        ("bench", Bench),
        ("small-bench", Bench),
        ("processes-bench", Bench),
        ("sweep", Bench),
        ("races", Bench),
        ("ceilings", MachineCeilings),
        ("compare", Compare),
        ("train-digits", Train),
    ):
        assert f"`{committed(job, type_).command}`" in page
