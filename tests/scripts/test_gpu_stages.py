"""What ``make gpu`` runs, and what travels with it."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path

import pytest

from gpu.packages import provide
from gpu.stages import MACHINE_SECONDS, ROOT, Stage, chosen, early, late
from process_testing import run_python

TOO_LARGE = {"matplotlib", "scikit-learn"}


@pytest.mark.parametrize(("stages", "most"), [(early("cuda"), 300), (late("cuda"), 540)])
def test_early_stages_take_five_minutes_and_late_ones_nine(
    stages: tuple[Stage, ...], most: float
) -> None:
    assert MACHINE_SECONDS + sum(stage.seconds for stage in stages) <= most
    for stage in stages:  # its jobs fit, side by side or one after the other
        seconds = [job.seconds for job in stage.jobs]
        assert (max(seconds) if stage.beside > 1 else sum(seconds)) <= stage.seconds


def test_files_of_results_do_not_overwrite_each_other() -> None:
    names = [job.name for stage in chosen("all", "cuda") for job in stage.jobs if job.suffix]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)


@pytest.mark.parametrize(
    ("names", "stages"),
    [
        ("early", [stage.name for stage in early("cuda")]),
        ("late", [stage.name for stage in late("cuda")]),
        ("lanes,smoke", ["smoke", "lanes"]),
        ("smoke,late", ["smoke", *(stage.name for stage in late("cuda"))]),
        ("all", [stage.name for stage in (*early("cuda"), *late("cuda"))]),
    ],
)
def test_stages_are_chosen_by_name_and_keep_their_order(names: str, stages: list[str]) -> None:
    assert [stage.name for stage in chosen(names, "cuda")] == stages


@pytest.mark.parametrize("names", ["", "smoke,", "none"])
def test_an_unknown_stage_is_refused(names: str) -> None:
    with pytest.raises(ValueError, match=r"STAGES must name some of smoke, .*, got "):
        chosen(names, "cuda")


def test_all_tests_of_a_gpu_are_run_once() -> None:
    run = [
        (name, "hundred_million" in job.arguments)
        for stage in chosen("all", "cuda")
        for job in stage.jobs
        for name in job.arguments
        if name.startswith(str(ROOT))
    ]
    assert len(run) == len(set(run))
    marked = {
        str(path)
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"pytest\.mark\.gpu$|marks=pytest\.mark\.gpu", path.read_text(), re.MULTILINE)
    }
    assert marked
    assert marked <= {name for name, _ in run}


def test_wheels_are_pinned_and_all_that_is_needed_is_there_or_too_large() -> None:
    named = set(_names((ROOT / "scripts" / "gpu" / "wheels.txt").read_text()))
    pinned = set(_names((ROOT / "constraints.txt").read_text()))
    assert named <= pinned
    settings = (ROOT / "pyproject.toml").read_text()
    needed: set[str] = set()
    for extra in ("bench", "test"):
        (listed,) = re.findall(rf"^{extra} = \[(.*?)^\]", settings, re.MULTILINE | re.DOTALL)
        needed |= set(re.findall(r'"([a-z-]+)[>\[]', listed)) - {"hogstream"}
    assert needed - named == TOO_LARGE


def _names(requirements: str) -> list[str]:
    return re.findall(r"^([a-z][\w-]*)", requirements, re.MULTILINE)


@pytest.mark.slow
def test_hogstream_is_imported_from_links_and_installed_packages_stay(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "pytest-1.0-py3-none-any.whl").touch()  # which is here, if not this version
    assert provide(tmp_path / "site", wheels) == ""
    path = "import hogstream.kernels as kernels; print(kernels.__file__)"
    found = run_python("-c", path, PYTHONPATH=str(tmp_path / "site"))
    assert Path(found.strip()).is_relative_to(tmp_path / "site")
    assert not (tmp_path / "site" / "pytest").exists()

    (wheels / "no_such-1.0-py3-none-any.whl").touch()
    assert "no_such" in provide(tmp_path / "other", wheels)


COUNTS = """
import importlib.metadata, torch
from counting import counted_calls, opcodes
from hogstream.kernels import rmsprop_
update = lambda: rmsprop_(torch.ones(5), torch.ones(5), torch.zeros(5), backend="numpy")
with counted_calls() as counts:
    update()
print(importlib.metadata.version("hogstream"), counts["kernels.rmsprop.rmsprop_"], opcodes(update))
"""


@pytest.mark.slow
def test_imported_from_links_it_tells_its_version_and_its_calls_are_counted(tmp_path: Path) -> None:
    assert provide(tmp_path / "site", tmp_path) == ""
    (described,) = metadata.distributions(path=[str(tmp_path / "site")])
    paths = os.pathsep.join(map(str, (tmp_path / "site", ROOT / "tests" / "support")))
    version, calls, instructions = run_python("-c", COUNTS, PYTHONPATH=paths).split()
    assert (version, calls) == (described.version, "1")
    assert (described.name, version) == ("hogstream", metadata.version("hogstream"))
    assert int(instructions) > 0


def test_the_page_tells_the_limits() -> None:
    told = re.findall(r"\| `([\w-]+)` \| (\d+) \|", (ROOT / "docs" / "gpu-run.md").read_text())
    assert told == [(stage.name, str(stage.seconds)) for stage in chosen("all", "cuda")]
