"""The HTML report: one file that opens offline, of one run or of two compared."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hogstream.profiling.report import charts, figures, summary, verdict
from hogstream.profiling.report.figures import Figure, range_text
from hogstream.profiling.report.verdict import Headline
from hogstream.profiling.results.comparison import (
    CHANGE_COLUMNS,
    FASTER,
    SLOWER,
    UNKNOWN,
    Comparison,
    cautions,
    change_rows,
    compare_runs,
    comparison_sentences,
    described,
    false_alarms,
)
from hogstream.profiling.results.gains import gain_columns, gain_tables
from hogstream.profiling.results.result_files import ResultFile, parse_result

Result = dict[str, Any]

_NUMBER = re.compile(r"[(<]*(\d[\d,]*(?:\.\d+)?)(?:\^(\d+))?")
_DRAWN_CHANGES, _ROWS = 36, 12  # of a comparison, and of a plot of it; its table holds all


@dataclass(frozen=True)
class Cell:
    """A cell: what it shows, and the number by which it is sorted, if it is one."""

    text: str
    value: float | None


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by each column."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numeric: Sequence[bool]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: Its id.
        title: Its heading.
        paragraphs: Running text.
        figure: Plots, if it has some.
        tables: Under them.
        commands: What repeats the measurement.
    """

    anchor: str
    title: str
    paragraphs: Sequence[str] = ()
    figure: Figure | None = None
    tables: Sequence[Table] = ()
    commands: Sequence[str] = ()


def render_report(results: Sequence[ResultFile]) -> str:
    """A report as self-contained HTML.

    Args:
        results: Of ``bench``, ``train`` and ``compare``. Two of a kind are compared, the second
            against the first, and the second is shown in full.
    """
    latest = {file.kind: file for file in results}
    comparisons = [
        compare_runs(file, latest[file.kind]) for file in results if file is not latest[file.kind]
    ]
    sections = [section for each in comparisons for section in _comparison_sections(each)]
    bench, train, compare = (latest.get(kind) for kind in ("bench", "train", "compare"))
    if bench is not None:
        sections += _bench_sections(bench.result)
    if train is not None:
        sections += _train_sections(train.result)
    if compare is not None:
        sections += _compare_sections(compare.result)
    sections += [_origin(file, len(latest) > 1) for file in latest.values()]
    style, script = _package_text("page.css"), _package_text("page.js")
    return _template().render(
        title=_title(list(latest.values()), comparisons),
        subtitle=_subtitle(list(latest.values())),
        headlines=_headlines(comparisons, bench),
        warnings=[said for each in comparisons for said in cautions(each)]
        + [said for file in results for said in _warnings(file, len(results) > 1)],
        sections=sections,
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
    )


def write_report(bench: Result, path: Path) -> None:
    """Writes the report of a run of ``hogstream bench``.

    Args:
        bench: The JSON output.
        path: Where to.
    """
    write_page(render_report([parse_result(json.dumps(bench), "bench")]), path)


def write_page(page: str, path: Path) -> None:
    """Writes a report, with a mark in place of what is no character."""
    path.write_text(page, encoding="utf-8", errors="replace")


def sort_value(text: str) -> float | None:
    """The number that a cell begins with: of ``2^10`` 1024, of ``(1.10x)`` 1.1, of ``-`` None."""
    match = _NUMBER.match(text)
    if match is None:
        return None
    value = float(match[1].replace(",", ""))
    if match[2]:
        value **= int(match[2])
    return math.nextafter(value, 0) if text.startswith("<") else value


def _title(latest: list[ResultFile], comparisons: list[Comparison]) -> str:
    if comparisons:
        return f"{Path(comparisons[0].second).name} against {Path(comparisons[0].first).name}"
    titles = {
        "bench": "Lock-free against locked",
        "train": "Training without a lock",
        "compare": "hogstream against other optimizers",
    }
    return titles[min((file.kind for file in latest), key=list(titles).index)]


def _subtitle(latest: list[ResultFile]) -> str:
    """Where it was measured."""
    told = []
    for file in latest:
        where = file.result["environment"]
        name = f"{where['device_name']} ({where['device']}, {where['cores']} cores)"
        told.append(f"{name}, {where['backend']} backend")
    return "; ".join(dict.fromkeys(told))


def _headlines(comparisons: list[Comparison], bench: ResultFile | None) -> list[Headline]:
    """The figures to be read first: of comparisons, and of a run of bench if it is in none."""
    told = []
    for each in comparisons:
        verdicts = [change.verdict for change in each.changes]
        count = sum(found != UNKNOWN for found in verdicts)
        of = f"of {count} configurations of {each.kind}"
        chance = f"{of}; up to {false_alarms(count)} may seem changed by chance"
        told += [
            Headline(str(verdicts.count(FASTER)), "faster beyond noise", chance),
            Headline(str(verdicts.count(SLOWER)), "slower beyond noise", of),
        ]
        clear = [change for change in each.changes if change.verdict in (FASTER, SLOWER)]
        if clear and (speed := clear[0].speed):
            what = f"{clear[0].verdict}, the most"
            told.append(Headline(f"{speed.median:.2f}x", what, clear[0].name))
    if bench is not None and bench.name not in [each.second for each in comparisons]:
        told += verdict.headlines(bench.result)
    return told


def _warnings(file: ResultFile, several: bool) -> list[str]:
    said = summary.interruption(file.result) + summary.warnings(file.result)
    return [f"{file.name}: {each}" for each in said] if several else said


def _but_warnings(sentences: list[str], result: Result) -> list[str]:
    """What is said, but for the warnings, which the page begins with."""
    return [said for said in sentences if said not in summary.warnings(result)]


def _bench_sections(bench: Result) -> list[Section]:
    drawn = {each.anchor: each for each in figures.bench_figures(bench)}
    by_size = _table("The fastest at each size", verdict.SIZE_COLUMNS, verdict.size_rows(bench), 2)
    tables: dict[str, list[Table]] = {
        "gain": [
            _table(f"{title}, in numbers", gain_columns(bench), rows)
            for title, rows in gain_tables(bench).items()
        ],
        "kernels": [
            _table(
                "Kernels alone, in numbers",
                summary.KERNEL_COLUMNS,
                [summary.kernel_row(kernel) for kernel in bench["kernels"]],
            )
        ],
    }
    said = verdict.verdict(bench)
    sections = [Section("summary", "Summary", said, None, [by_size])]
    sections += [
        Section(anchor, each.title, [], each, tables.get(anchor, []))
        for anchor, each in drawn.items()
    ]
    races = summary.race_rows(bench)
    sections.append(
        Section(
            "results",
            "All results",
            [each for each in _but_warnings(summary.sentences(bench), bench) if each not in said],
            None,
            [
                _table("Updates", *_results(bench), 1),
                *([_table("Races", summary.RACE_COLUMNS, races, 1)] if races else []),
            ],
        )
    )
    return [*sections, _ceilings(bench["ceilings"])]


def _results(bench: Result) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of all results, with the interval of updates/s."""
    columns = (*summary.COLUMNS[:4], "95 % interval", *summary.COLUMNS[4:])
    rows = []
    for result in bench["results"]:
        row = summary.result_row(result)
        interval = range_text(figures.spread(result), 0)
        rows.append((*row[:4], interval, *row[4:]))
    return columns, rows


def _ceilings(ceilings: Result) -> Section:
    """What the machine can do, with its spread."""
    rows, rates = summary.level_rows(ceilings), summary.rate_rows(ceilings)
    said = [
        f"In this run, beyond the caches: a copy moves {ceilings['copy_gigabytes_per_second']:.1f} "
        "GB/s, and the traffic of an update "
        f"{ceilings['update_shaped_gigabytes_per_second']:.1f} GB/s."
    ]
    if ceilings["measured"]:
        said.append(f"Those of this machine, below, were measured on {ceilings['measured']}.")
    if not rows:
        said.append("The caches' bandwidth was not measured.")
    tables = [_table("Memory, level by level", summary.LEVEL_COLUMNS, rows)] if rows else []
    if rates:
        tables.append(_table("Rates", summary.RATE_COLUMNS, rates))
    return Section("ceilings", "Ceilings", said, None, tables)


def _train_sections(train: Result) -> list[Section]:
    rows = [summary.training_row(result) for result in train["results"]]
    table = _table("What each policy's training came to", summary.TRAINING_COLUMNS, rows)
    said = _but_warnings(summary.training_sentences(train), train)
    return [Section("training", "Training", said, figures.training(train), [table])]


def _compare_sections(compare: Result) -> list[Section]:
    rows = [(result["shape"], *summary.compare_row(result)) for result in compare["results"]]
    table = _table("Optimizers, in numbers", ("shape", *summary.COMPARE_COLUMNS), rows, 2)
    said = _but_warnings(summary.compare_sentences(compare), compare)
    first, *others = figures.optimizers(compare)
    return [
        Section(first.anchor, first.title, said, first, [table]),
        *(Section(each.anchor, each.title, [], each) for each in others),
        *_skipped(compare),
    ]


def _skipped(compare: Result) -> list[Section]:
    said = summary.skipped_sentences(compare)
    return [Section("skipped", "Skipped", said)] if said else []


def _comparison_sections(comparison: Comparison) -> list[Section]:
    rows = [(name, *values) for name, *values in comparison.differences]
    what = ("what", "first", "second")
    tables = [_table("Changes", CHANGE_COLUMNS, change_rows(comparison))]
    if rows:
        tables.append(_table("What differs in environment and settings", what, rows, 3))
    if comparison.ceilings:
        ceilings = (*what, "second over first")
        tables.append(_table("Ceilings of the two runs", ceilings, comparison.ceilings))
    only = [(name, "first") for name in comparison.only_first]
    only += [(name, "second") for name in comparison.only_second]
    if only:
        tables.append(_table("Measured in one run only", ("what", "run"), only, 2))
    said = [f"First: {comparison.first}. Second: {comparison.second}."]
    said += comparison_sentences(comparison)
    title = f"What changed: {comparison.kind}"
    drawn = _changes_figure(comparison)
    return [Section(f"changes-{comparison.kind}", title, said, drawn, tables)]


def _changes_figure(comparison: Comparison) -> Figure:
    clear = (FASTER, SLOWER)
    drawn = [
        charts.Change(each.name, speed.median, (speed.low, speed.high), each.verdict in clear)
        for each in comparison.changes
        if each.verdict != UNKNOWN and (speed := each.speed) and speed.low > 0
    ][:_DRAWN_CHANGES]
    if not drawn:
        return Figure("", "", "", missing="There is nothing to draw.")
    changed = sum(each.clear for each in drawn)
    text = (
        f"Speed of the second run over the first with 95 % intervals, the {len(drawn)} greatest "
        f"effects: {changed} of them are beyond noise, from "
        f"{min(each.ratio for each in drawn):.2f}x to {max(each.ratio for each in drawn):.2f}x."
    )
    ends = [end for each in drawn for end in (*each.interval, 1.0)]
    axis = charts.log_axis("speed, second over first", ends)
    parts = [drawn[start : start + _ROWS] for start in range(0, len(drawn), _ROWS)]
    panels = [charts.forest(part, axis, text) for part in parts]
    hint = "Right of the dashed line the second run is faster. Hollow dots: no change beyond noise."
    return Figure("", "", hint, panels)


def _origin(file: ResultFile, several: bool) -> Section:
    """Where a result comes from and how to repeat it."""
    title = "Environment" + (f": {file.kind}" if several else "")
    table = _table("Environment and settings", ("what", "value"), described(file.result).items(), 2)
    return Section(f"origin-{file.kind}", title, [], None, [table], [file.result["command"]])


def _table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1
) -> Table:
    """A table whose columns sort as numbers where all that they hold begins with one."""
    lines = [list(row) for row in rows]
    values = [[sort_value(text) for text in line] for line in lines]
    numeric = [
        all(
            value[column] is not None or line[column] == "-"
            for line, value in zip(lines, values, strict=True)
        )
        and (column >= text_columns or bool(re.match("elements|workers", columns[column])))
        for column in range(len(columns))
    ]
    cells = [
        [
            Cell(text, value if is_number else None)
            for text, value, is_number in zip(line, line_values, numeric, strict=True)
        ]
        for line, line_values in zip(lines, values, strict=True)
    ]
    return Table(title, columns, cells, numeric)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_package_text("page.html.jinja"))


def _package_text(name: str) -> str:
    return files("hogstream.profiling.report").joinpath(name).read_text("utf-8")


def _csp_hash(text: str) -> str:
    """How a content security policy names a script or a style sheet that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
