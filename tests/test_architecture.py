"""Which modules may import which; the order of the folders is a contract in pyproject.toml."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [init.parent for init in ROOT.glob("*/__init__.py")]


def name_of(path: Path) -> str:
    """Of a module or folder of ours, as it is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("hogstream", *parts)).removesuffix(".__init__")


MODULES = {name_of(path): path for folder in FOLDERS for path in folder.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Our modules that a file imports, wherever it does so; type checkers' imports count too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: modules are imported by full name"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names.add(name if name in MODULES else str(node.module))
    return names & MODULES.keys()


def test_no_modules_import_each_other() -> None:
    imports = {name: imported(path) for name, path in MODULES.items()}
    assert "hogstream.kernels.rmsprop" in imports["hogstream.kernels"]
    TopologicalSorter(imports).prepare()


def test_a_wheel_holds_every_folder_that_has_modules() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    (listed,) = re.findall(r"^packages = (\[.*?^\])", pyproject, re.MULTILINE | re.DOTALL)
    assert {name_of(path.parent) for path in MODULES.values()} == {*ast.literal_eval(listed)}
