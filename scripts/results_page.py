"""Writes the measured parts of README.md and docs/ from committed results: ``make results``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hogstream.profiling.report import summary
from hogstream.profiling.results.gains import gain_columns, gain_tables
from hogstream.profiling.wording import number_text, size_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
_BEGIN = "<!-- {}: made by `make results`, not by hand -->\n"
_END = "<!-- end of {} -->\n"
_RACE_COLUMNS = (
    "elements",
    "workers",
    "policy",
    "updates per s",
    "lost",
    "overwrites per update",
    "staleness mean",
    "p50",
    "p99",
    "max",
)


def updated(name: str, text: str, folder: Path) -> str:
    """A document with its measured part made anew.

    Args:
        name: Of the document, in ``DOCUMENTS``.
        text: The document, with two marks.
        folder: Of the results.

    Raises:
        ValueError: If a mark is missing.
    """
    part, measure = DOCUMENTS[name]
    begin_mark, end_mark = _BEGIN.format(part), _END.format(part)
    before, begin, rest = text.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise ValueError(f"text must hold the marks {begin_mark!r} and {end_mark!r}")
    return before + begin + "\n" + measure(folder) + "\n" + end + after


def main() -> None:
    """Rewrites the documents in place."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(updated(name, path.read_text("utf-8"), RESULTS), encoding="utf-8")


def races(folder: Path) -> str:
    """What ``docs/lock-free.md`` shows of ``*-races.json``, made by ``bench --telemetry``."""
    parts = []
    for path in sorted(folder.glob("*-races.json")):
        bench = json.loads(path.read_text("utf-8"))
        parts += [f"`{bench['command']}` ([JSON](results/{path.name})):"]
        parts += ["\n".join(f"- {sentence}" for sentence in summary.sentences(bench))]
        parts += [_table(_RACE_COLUMNS, map(_race_row, bench["results"]), 3)]
    return "\n\n".join(parts or ["Nothing was measured yet."]) + "\n"


def _race_row(result: dict[str, Any]) -> tuple[str, ...]:
    staleness, lost = result["staleness"], result["lost_updates_fraction"]
    return (
        size_name(result["elements"]),
        str(result["workers"]),
        result["policy"],
        number_text(result["updates_per_second"]),
        number_text(None if lost is None else 100 * lost, 2, " %"),
        number_text(result["overwrites_per_update"], 4),
        number_text(staleness["mean"], 1),
        *(number_text(staleness[name]) for name in ("p50", "p99", "max")),
    )


def result(folder: Path) -> str:
    """What README shows: the picture that was drawn beside the results, and where the rest is."""
    picture = "![Gain of lock-free over locked and ordered](docs/results/gain.png)\n\n"
    link = "[All results](docs/results.md), with 95 % intervals and the commands that made them.\n"
    return (picture if (folder / "gain.png").exists() else "") + link


def results(folder: Path) -> str:
    """What ``docs/results.md`` shows: ``*-bench.json`` and so on, each made by a command."""
    parts = []
    for path in sorted(folder.glob("*-bench.json")):
        bench = json.loads(path.read_text("utf-8"))
        parts += [f"`{bench['command']}` ([JSON](results/{path.name})):"]
        parts += ["\n".join(f"- {sentence}" for sentence in summary.sentences(bench))]
        parts += [_table(summary.COLUMNS, map(summary.result_row, bench["results"]), 3)]
        if races := summary.race_rows(bench):
            parts += ["What the races cost:", _table(summary.RACE_COLUMNS, races, 3)]
        parts += ["The kernels alone, all cores:"]
        parts += [_table(summary.KERNEL_COLUMNS, map(summary.kernel_row, bench["kernels"]), 1)]
    for path in sorted(folder.glob("*-ceilings.json")):
        ceilings = json.loads(path.read_text("utf-8"))
        parts += [f"`{ceilings['command']}` ([JSON](results/{path.name})):"]
        parts += [_table(summary.LEVEL_COLUMNS, summary.level_rows(ceilings["ceilings"]), 1)]
        parts += [_table(summary.RATE_COLUMNS, summary.rate_rows(ceilings["ceilings"]), 1)]
    for path in sorted(folder.glob("*-sweep.json")):
        sweep = json.loads(path.read_text("utf-8"))
        parts += [f"`{sweep['command']}` ([JSON](results/{path.name})):"]
        parts += ["\n".join(f"- {sentence}" for sentence in summary.sentences(sweep))]
        for title, gains in gain_tables(sweep).items():
            parts += [f"{title}:", _table(gain_columns(sweep), gains, 1)]
    for path in sorted(folder.glob("*-compare.json")):
        compare = json.loads(path.read_text("utf-8"))
        name = compare["environment"]["device_name"]
        parts += [f"`{compare['command']}` on {name} ([JSON](results/{path.name})):"]
        said = summary.compare_sentences(compare) + summary.skipped_sentences(compare)
        parts += ["\n".join(f"- {sentence}" for sentence in said)]
        rows = map(summary.compare_readme_row, compare["results"])
        parts += [_table(summary.COMPARE_README_COLUMNS, rows, 2)]
    for path in sorted(folder.glob("*-train-digits.json")):
        train = json.loads(path.read_text("utf-8"))
        name = train["environment"]["device_name"]
        parts += [f"`{train['command']}` on {name} ([JSON](results/{path.name})):"]
        said = summary.training_sentences(train)
        parts += ["\n".join(f"- {sentence}" for sentence in said)]
        rows = map(summary.training_row, train["results"])
        parts += [_table(summary.TRAINING_COLUMNS, rows, 1)]
    parts += _missing_on_gpu(folder)
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


#: Each document, what its marks call the measured part, and what makes that.
DOCUMENTS = {
    "README.md": ("result", result),
    "docs/results.md": ("results", results),
    "docs/lock-free.md": ("races", races),
}


if __name__ == "__main__":
    main()
