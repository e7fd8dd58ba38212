"""The package is one that could be copied elsewhere."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import ptx_machine

MODULES = {path.stem: path for path in Path(ptx_machine.__file__).parent.glob("*.py")}


def imported(path: Path) -> set[str]:
    """What a file imports, by full name."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}


def test_it_needs_nothing_but_numpy():
    roots = {name.partition(".")[0] for path in MODULES.values() for name in imported(path)}
    assert roots - sys.stdlib_module_names == {"ptx_machine", "numpy"}


def test_no_modules_import_each_other():
    inside = {
        name: {
            each.removeprefix("ptx_machine.")
            for each in imported(path)
            if each.startswith("ptx_machine.")
        }
        for name, path in MODULES.items()
    }
    assert "operations" in inside["program"]
    TopologicalSorter(inside).prepare()


def test_everything_public_is_there():
    assert all(hasattr(ptx_machine, name) for name in ptx_machine.__all__)
