"""``hogstream inspect``: its table, the assembly that it prints, and what it refuses."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hogstream.cli.main import main

Command = Callable[..., tuple[int, str, str]]

ONE_KERNEL = ("--kernel", "float32 rmsprop inside coupled uncentered plain host-lr")


@pytest.fixture
def hogstream(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``hogstream inspect``; returns exit status, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hogstream", "inspect", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, captured.out, captured.err

    return run


@pytest.mark.slow
def test_inspect_prints_a_table_and_writes_what_it_says(hogstream: Command, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    json_file = tmp_path / "inspect.json"
    status, out, err = hogstream(
        "--target", "gfx942", "--kernel", "float64 coupled inside", "--json", json_file
    )
    assert (status, err) == (0, "")
    assert f"wrote {json_file}" in out
    results = json.loads(json_file.read_text())["results"]
    assert len(results) == 2 * 2 * 3 * 2 + 2 * 4
    for kernel in ("rmsprop", "multi_tensor"):
        found = [result for result in results if result["kernel"] == kernel]
        low, high = (pick(result["registers"] for result in found) for pick in (min, max))
        assert re.search(rf"{kernel} +float64 +{low}(-{high})? +0 ", out)
        assert all(result["loads"] for result in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "emit", "pattern"),
    [
        ("sm_90", "ptx", r"\.target sm_90"),
        ("sm_90", "sass", r"MUFU\.RSQ"),
        ("gfx942", "amdgcn", r"v_add_f32"),
    ],
)
def test_inspect_emits_assembly(hogstream: Command, target: str, emit: str, pattern: str) -> None:
    pytest.importorskip("triton")
    status, out, _ = hogstream("--target", target, "--emit", emit, *ONE_KERNEL)
    assert status == 0
    assert re.findall("^// (.*host-lr)$", out, re.MULTILINE) == [
        "rmsprop float32 inside coupled uncentered plain host-lr"
    ]
    assert re.search(pattern, out)
    assert "Kernels for" not in out


def test_inspect_needs_triton(hogstream: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # it cannot be found
    message = "hogstream: Triton is not installed; pip install triton (Linux only)\n"
    assert hogstream("--target", "sm_90") == (2, "", message)


@pytest.mark.slow
def test_inspect_tells_which_tool_failed(
    hogstream: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    tool = tmp_path / "cuobjdump"
    tool.write_text("#!/bin/sh\necho release 13.1, V13.1.0\n[ $1 = --version ]\n")
    tool.chmod(0o755)
    monkeypatch.setenv("TRITON_CUOBJDUMP_PATH", str(tool))
    status, out, err = hogstream("--target", "sm_90", *ONE_KERNEL)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(f"cannot compile for sm_90: .*{tool}.* non-zero exit status 1", err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--target'. Choose from: sm_80, sm_90, sm_100, gfx942"),
        (["--target", "sm_1"], "'--target': 'sm_1' is not one of"),
        (["--target", "sm_90", "--emit", "llir"], "'--emit': 'llir' is not one of"),
        (
            ["--target", "sm_90", "--emit", "amdgcn"],
            "'--emit': sm_90 has ptx and sass, got 'amdgcn'",
        ),
        (["--target", "gfx942", "--emit", "sass"], "'--emit': gfx942 has amdgcn, got 'sass'"),
        (["--target", "sm_90", "--kernel", "zap"], "'--kernel': must be words of .* got 'zap'"),
        (["--target", "sm_90", "--kernel", "coupled uncoupled"], "'--kernel': must be words"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(
    hogstream: Command, arguments: list[str], message: str
) -> None:
    status, out, err = hogstream(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err), err
