"""Writes the measured part of README.md from committed results: ``make readme``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hogstream.profiling import summary
from hogstream.profiling.gains import gain_columns, gain_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "profiling" / "results"
_BEGIN = "<!-- results: made by `make readme` from profiling/results/, not by hand -->\n"
_END = "<!-- end of results -->\n"


def updated_readme(readme: str, results: Path) -> str:
    """The README with its measured part made anew.

    Args:
        readme: Its text, with the two marks.
        results: Folder of ``*-bench.json``, ``*-sweep.json``, ``*-compare.json`` and
            ``*-train-digits.json`` files.

    Raises:
        ValueError: If a mark is missing.
    """
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"readme must hold the marks {_BEGIN!r} and {_END!r}")
    return before + begin + "\n" + _measured(results) + "\n" + end + after


def main() -> None:
    """Rewrites README.md in place."""
    path = ROOT / "README.md"
    path.write_text(updated_readme(path.read_text("utf-8"), RESULTS), encoding="utf-8")


def _measured(results: Path) -> str:
    parts = []
    for path in sorted(results.glob("*-bench.json")):
        bench = json.loads(path.read_text("utf-8"))
        parts += [f"`{bench['command']}` ([JSON](profiling/results/{path.name})):"]
        parts += ["\n".join(f"- {sentence}" for sentence in summary.sentences(bench))]
        parts += [_table(summary.COLUMNS, map(summary.result_row, bench["results"]), 3)]
        if races := summary.race_rows(bench):
            parts += ["What the races cost:", _table(summary.RACE_COLUMNS, races, 3)]
        parts += ["The kernels alone, all cores:"]
        parts += [_table(summary.KERNEL_COLUMNS, map(summary.kernel_row, bench["kernels"]), 1)]
    for path in sorted(results.glob("*-sweep.json")):
        sweep = json.loads(path.read_text("utf-8"))
        parts += [f"`{sweep['command']}` ([JSON](profiling/results/{path.name})):"]
        parts += ["\n".join(f"- {sentence}" for sentence in summary.sentences(sweep))]
        for title, gains in gain_tables(sweep).items():
            parts += [f"{title}:", _table(gain_columns(sweep), gains, 1)]
    for path in sorted(results.glob("*-compare.json")):
        compare = json.loads(path.read_text("utf-8"))
        name = compare["environment"]["device_name"]
        parts += [f"`{compare['command']}` on {name} ([JSON](profiling/results/{path.name})):"]
        said = summary.compare_sentences(compare) + summary.skipped_sentences(compare)
        parts += ["\n".join(f"- {sentence}" for sentence in said)]
        rows = map(summary.compare_readme_row, compare["results"])
        parts += [_table(summary.COMPARE_README_COLUMNS, rows, 2)]
    for path in sorted(results.glob("*-train-digits.json")):
        train = json.loads(path.read_text("utf-8"))
        name = train["environment"]["device_name"]
        parts += [f"`{train['command']}` on {name} ([JSON](profiling/results/{path.name})):"]
        rows = map(summary.training_row, train["results"])
        parts += [_table(summary.TRAINING_COLUMNS, rows, 1)]
    parts += _missing_on_gpu(results)
    return "\n\n".join(parts) + "\n"


def _missing_on_gpu(results: Path) -> list[str]:
    missing = [
        what
        for what, job in (("policies", "bench"), ("optimizers", "compare"))
        if not any(results.glob(f"nvidia*-{job}.json"))
    ]
    if len(missing) == 2:
        return ["Nothing was measured on a GPU yet."]
    return [f"The {what} were not compared on a GPU yet." for what in missing]


def _table(columns: tuple[str, ...], rows: Any, text_columns: int) -> str:
    rule = ["---" if index < text_columns else "---:" for index in range(len(columns))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


if __name__ == "__main__":
    main()
