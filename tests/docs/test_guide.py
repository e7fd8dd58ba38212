"""Every block of code in the documentation: Python runs, and commands are such as are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch

from documents import PAGES, README, ROOT, blocks, page_text
from hogstream.cli.commands import cli
from process_testing import run_python

# README's Python is run by test_readme.py, what examples.md includes by test_examples.py, and what
# ptx.md does below, where Triton does not interpret.
PYTHON_PAGES = (
    *("docs/guide/asynchronous.md", "docs/guide/decide.md", "docs/guide/migrate.md"),
    *("docs/guide/pytorch.md", "docs/guide/rows.md"),
    *("docs/guide/tune.md", "docs/lanes.md", "docs/profiling.md"),
    "docs/scheduler.md",
)
SHELL_PAGES = (
    *(README, "docs/examples.md", "docs/guide/decide.md", "docs/guide/rows.md"),
    "docs/guide/tune.md",
    *("docs/gpu-run.md", "docs/guide/a3c.md", "docs/profiling.md"),
)
COMMANDS = [
    (page, line)
    for page in SHELL_PAGES
    for block in blocks(page, "shell")
    for line in block.code.splitlines()
]


def test_every_page_with_code_is_tested() -> None:
    assert {page for page in PAGES if blocks(page, "python")} == {
        *(README, "docs/examples.md", "docs/ptx.md"),
        *PYTHON_PAGES,
    }
    assert {page for page in PAGES if blocks(page, "shell")} == set(SHELL_PAGES)
    assert {block.language for page in PAGES for block in blocks(page)} == {"python", "shell"}


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, and torch's settings as before."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_runs_from_top_to_bottom(page: str, in_folder: Path) -> None:
    found = blocks(page, "python")
    assert found
    names: dict[str, object] = {"__name__": "page"}
    for block in found:
        code = "\n" * (block.line - 1) + block.code  # so that errors name the page's line
        if "__main__" in block.code:  # a program, which its processes import
            program = in_folder / "program.py"
            program.write_text(code, encoding="utf-8")
            assert run_python(str(program)).strip()
        else:
            exec(compile(code, ROOT / page, "exec", dont_inherit=True), names)


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_command_is_there(page: str, line: str, in_folder: Path) -> None:
    words = shlex.split(line, comments=True)
    program, *arguments = words
    if program == "hogstream":
        check_hogstream(arguments)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text("utf-8")
        assert re.search(rf"^{arguments[0]}:", makefile, flags=re.MULTILINE)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    else:
        assert program == "pip"
        (extras,) = re.findall(r"^\.\[([\w,]+)\]$", arguments[-1])
        settings = (ROOT / "pyproject.toml").read_text("utf-8")
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", settings, flags=re.MULTILINE)


def command_of(group: click.Group, name: str) -> click.Command:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    return command


def check_hogstream(arguments: list[str]) -> None:
    """Has the command parse its options, and those of a command of its own that it would run."""
    command: click.Command = cli
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command_of(command, name)
    before, program = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        before, program = arguments[:at], arguments[at + 1 :]
    for file in before:
        if Path(file).suffix in (".nsys-rep", ".ncu-rep"):
            Path(file).touch()
    # A command keeps the names of its help from when it is first run: those of the whole.
    command.make_context(name, list(before), **cli.context_settings)
    if program and program[0] in cli.list_commands(click.Context(cli)):
        check_hogstream(program)


def test_options_that_are_not_there_are_found(in_folder: Path) -> None:
    for line in ("bench --no-such", "train digits --policy none", "profile nsys -- bench --nope"):
        with pytest.raises(click.UsageError):
            check_hogstream(line.split())


def test_the_table_of_options_names_real_ones() -> None:
    _, _, rest = page_text("docs/profiling.md").partition("| option | of | is |")
    table, _, _ = rest.partition("\n\n")
    params = [
        param for name in ("bench", "compare", "train") for param in command_of(cli, name).params
    ]
    known = {option for each in params for option in (*each.opts, *each.secondary_opts)}
    named = set(re.findall(r"`(--[\w-]+)", table))
    assert "--json" in named
    assert named <= known


@pytest.mark.slow
def test_somebody_elses_kernel_is_raced(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (block,) = blocks("docs/ptx.md", "python")
    assert block.code == '--8<-- "tests/support/ptx_example.py"\n'
    program = ROOT / "tests" / "support" / "ptx_example.py"
    said = run_python(str(program), TRITON_CACHE_DIR=str(tmp_path))
    assert re.fullmatch(r"[1-9]\d* of 8000 updates were lost\n", said)
