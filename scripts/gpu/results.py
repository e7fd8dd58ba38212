"""Brings archives of ``make gpu`` home: their results go into ``docs/results``, each checked."""

from __future__ import annotations

import json
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu.outcomes import Outcome, read
from gpu.stages import ROOT, chosen
from gpu.suite import table
from hogstream.profiling.results.files import AnyResult, BadResultError, decoded, write_result
from hogstream.profiling.results.profile_schema import GpuRun


def main() -> None:
    """Unpacks the archives named on the command line, and shows what failed."""
    if not sys.argv[1:]:
        sys.exit("usage: make gpu-results ARCHIVES='early.zip late.zip'")
    for name in sys.argv[1:]:
        try:
            files, outcomes = unpack(Path(name), ROOT / "docs" / "results")
        except BadResultError as error:
            sys.exit(f"make gpu-results: {name}: {error}")
        print(f"{name}: {len(files)} files", *table(outcomes), sep="\n")


def unpack(archive: Path, folder: Path) -> tuple[list[Path], list[Outcome]]:
    """Writes the results of an archive, once all have been read.

    Args:
        archive: The file.
        folder: Where results go: those of measurements under their own names, and what became of
            everything as ``DEVICE-STAGES-gpu.json``.

    Returns:
        The files, and the outcomes.

    Raises:
        BadResultError: If a file of it is no result; the message names it.
    """
    with TemporaryDirectory() as unpacked:
        root = Path(unpacked)
        with zipfile.ZipFile(archive) as made:
            made.extractall(root)
        about = json.loads((root / "run.json").read_text("utf-8"))
        results = {path.name: _read(path) for path in sorted((root / "results").glob("*.json"))}
        stages = ("machine", *(stage.name for stage in chosen("all", "cuda")))
        outcomes = [each for name in stages for each in read(root / "lines" / f"{name}.jsonl")]
    ran = about["command"].partition("STAGES=")[2].replace(",", "-")
    run = {"kind": "gpu", "command": about["command"], "environment": about["environment"]}
    text = json.dumps({**run, "outcomes": [asdict(each) for each in outcomes]})
    results[f"{about['name']}-{ran}-gpu.json"] = decoded(text, GpuRun)
    for name, result in results.items():
        write_result(result, folder / name)
    return [folder / name for name in results], outcomes


def _read(path: Path) -> AnyResult:
    any_result: Any = AnyResult
    try:
        result: AnyResult = decoded(path.read_bytes(), any_result)
    except BadResultError as error:
        raise BadResultError(f"{path.name}: {error}") from None
    return result


if __name__ == "__main__":
    main()
