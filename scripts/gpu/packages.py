"""Where programs on another machine find hogstream, and what its Python lacks."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from gpu.stages import ROOT

#: What `make gpu-wheels` has downloaded.
WHEELS = ROOT / "wheels"
_SUBPACKAGES = ("kernels", "optim", "scheduler", "profiling", "workloads", "cli")


def provide(site: Path, wheels: Path = WHEELS) -> str:
    """Makes a folder from which hogstream is imported, and each package that is not installed.

    Nothing is installed where it stays, and what is installed already is left alone, of whatever
    version. hogstream is linked, not built: so an old setuptools does no harm. What tells versions
    finds its own there too.

    Args:
        site: The folder; made here.
        wheels: A folder of wheels.

    Returns:
        What went wrong; empty if nothing did.
    """
    (site / "hogstream").mkdir(parents=True)
    for name in _SUBPACKAGES:
        (site / "hogstream" / name).symlink_to(ROOT / name)
    _describe(site)
    missing = [wheel for wheel in sorted(wheels.glob("*.whl")) if not _is_installed(wheel)]
    if not missing:
        return ""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--target", str(site), *map(str, missing)],
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else done.stderr.strip()[-300:] or "pip failed"


def _describe(site: Path) -> None:
    """Writes what ``importlib.metadata`` reads of an installed hogstream."""
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', settings, re.MULTILINE)  # 3.10 has no tomllib
    folder = site / f"hogstream-{version}.dist-info"
    folder.mkdir()
    about = f"Metadata-Version: 2.1\nName: hogstream\nVersion: {version}\n"
    (folder / "METADATA").write_text(about, encoding="utf-8")


def _is_installed(wheel: Path) -> bool:
    try:
        metadata.version(wheel.name.partition("-")[0])
    except metadata.PackageNotFoundError:
        return False
    return True
