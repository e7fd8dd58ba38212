"""The HTML page: one file that opens offline, of one run or of two set against each other."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from hogstream.profiling.ceilings.machine import when_measured
from hogstream.profiling.report import drawing, plots, rows, sentences
from hogstream.profiling.report.answers import answer, diff_answer
from hogstream.profiling.report.drawing import Group
from hogstream.profiling.report.rows import Table
from hogstream.profiling.results.diff import Diff, diff_runs
from hogstream.profiling.results.files import Reported, ResultFile
from hogstream.profiling.results.records import Ceilings
from hogstream.profiling.results.schema import Bench, Compare, Train

_NUMBER = re.compile(r"[(<>]*(\d[\d,]*(?:\.\d+)?)(?:\^(\d+))?")
_TITLES = {
    "bench": "Lock-free against locked",
    "train": "Training to a target",
    "compare": "hogstream against other optimizers",
}


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: Its id.
        title: Its heading.
        paragraphs: Running text.
        group: Plots, if it has some.
        tables: Under them.
        command: What repeats the measurement.
    """

    anchor: str
    title: str
    paragraphs: Sequence[str] = ()
    group: Group | None = None
    tables: Sequence[Table] = ()
    command: str = ""


def render_page(results: Sequence[ResultFile]) -> str:
    """Results as self-contained HTML: the answer first, and last what to be wary of.

    Args:
        results: Of ``bench``, ``train`` and ``compare``. Of two of a kind the second is set against
            the first, and the second is shown in full.
    """
    latest = {file.kind: file for file in results}
    diffs = [
        diff_runs(file, latest[file.kind]) for file in results if file is not latest[file.kind]
    ]
    shown = sorted(latest.values(), key=lambda file: list(_TITLES).index(file.kind))
    answers = [(_diff_title(diff), diff_answer(diff, latest[diff.kind].result)) for diff in diffs]
    answers += [
        (_TITLES[file.kind], answer(file.result))
        for file in shown
        if file.kind not in [diff.kind for diff in diffs]
    ]
    sections = [_diff_section(diff) for diff in diffs]
    sections += [section for file in shown for section in _sections(file.result)]
    sections += [_origin(file, len(shown) > 1) for file in shown]
    warnings = [said for diff in diffs for said in sentences.cautions(diff)]
    warnings += [said for file in results for said in _warnings(file, len(results) > 1)]
    return _template().render(
        title=answers[0][0],
        answers=answers,
        sections=[(section, _drawn(section)) for section in sections],
        warnings=warnings,
        colors=drawing.COLORS,
        style=Markup(_package_text("page.css")),
        script=Markup(_package_text("page.js")),
        sort_values=_sort_values,
    )


def write_page(results: Sequence[ResultFile], path: Path) -> None:
    """Writes results as a page, with a mark in place of what is no character.

    Args:
        results: As for ``render_page``.
        path: Where to.
    """
    path.write_text(render_page(results), encoding="utf-8", errors="replace")


def _diff_title(diff: Diff) -> str:
    return f"{Path(diff.second).name} against {Path(diff.first).name}"


def _warnings(file: ResultFile, several: bool) -> list[str]:
    said = sentences.interruption(file.result) + sentences.warnings(file.result)
    return [f"{file.name}: {each}" for each in said] if several else said


def _but_warnings(said: list[str], result: Reported) -> list[str]:
    """What is said, but for the warnings, which the page ends with."""
    return [each for each in said if each not in sentences.warnings(result)]


def _sections(result: Reported) -> list[Section]:
    if isinstance(result, Bench):
        return _bench_sections(result)
    if isinstance(result, Train):
        return _train_sections(result)
    return _compare_sections(result)


def _bench_sections(bench: Bench) -> list[Section]:
    tables = {"gain": rows.gains(bench), "kernels": [rows.kernels(bench)]}
    said = sentences.verdict(bench)
    sections = [Section("summary", "Summary", said, None, [rows.sizes(bench)])]
    sections += [
        Section(group.anchor, group.title, [], group, tables.get(group.anchor, ()))
        for group in plots.of_bench(bench)
    ]
    rest = [each for each in _but_warnings(sentences.of_bench(bench), bench) if each not in said]
    results = Section("results", "All results", rest, None, rows.results(bench, intervals=True))
    return [*sections, results, _ceilings(bench.ceilings)]


def _ceilings(ceilings: Ceilings) -> Section:
    """What the machine can do, with its spread."""
    said = [when_measured(ceilings)]
    tables = [rows.levels(ceilings), rows.rates(ceilings)]
    return Section("ceilings", "Ceilings", said, None, tables)


def _train_sections(train: Train) -> list[Section]:
    said = _but_warnings(sentences.of_train(train), train)
    group, table = plots.of_train(train), rows.training(train)
    return [Section("training", group.title, said, group, [table])]


def _compare_sections(compare: Compare) -> list[Section]:
    said = _but_warnings(sentences.of_compare(compare), compare)
    sections = [Section("shapes", "Optimizers, shape by shape", said, None, [rows.peers(compare)])]
    sections += [
        Section(group.anchor, group.title, [], group) for group in plots.of_compare(compare)
    ]
    skipped = rows.skipped(compare)
    return [*sections, *([Section("skipped", "Skipped", [], None, [skipped])] if skipped else [])]


def _diff_section(diff: Diff) -> Section:
    said = [f"First: {diff.first}. Second: {diff.second}."]
    said += [each for each in sentences.of_diff(diff)[1:] if each not in sentences.cautions(diff)]
    tables = [rows.changes(diff), *rows.around_changes(diff)]
    group = plots.of_diff(diff)
    return Section(group.anchor, f"What changed: {diff.kind}", said, group, tables)


def _origin(file: ResultFile, several: bool) -> Section:
    """Where a result comes from and how to repeat it."""
    title = "Environment" + (f": {file.kind}" if several else "")
    tables = [rows.origin(file.result)]
    return Section(f"origin-{file.kind}", title, [], None, tables, file.result.command)


def _drawn(section: Section) -> tuple[list[Markup], list[tuple[Markup, str]]]:
    """The plots of a section and their legend."""
    if section.group is None:
        return [], []
    drawn = [
        drawing.markup(plot, f"{section.anchor} {index}")
        for index, plot in enumerate(section.group.plots)
    ]
    legend = [
        (drawing.swatch(look, f"{section.anchor} legend {index}"), name)
        for index, (name, look) in enumerate(section.group.looks.items())
    ]
    return drawn, legend


def sort_value(text: str) -> float | None:
    """The number that a cell begins with: of ``2^10`` 1024, of ``(1.10x)`` 1.1, of ``-`` None."""
    match = _NUMBER.match(text)
    if match is None:
        return None
    value = float(match[1].replace(",", ""))
    if match[2]:
        value **= int(match[2])
    return math.nextafter(value, 0) if text.startswith("<") else value


def _sort_values(table: Table) -> list[list[float | None] | None]:
    """For each column the numbers by which it is sorted; None if it is sorted as text.

    Columns are numbers where all that they hold begins with one, but for those of words.
    """
    columns: list[list[float | None] | None] = []
    for index, name in enumerate(table.columns):
        texts = [row[index] for row in table.rows]
        values = [sort_value(text) for text in texts]
        numbers = all(
            value is not None or text == "-" for text, value in zip(texts, values, strict=True)
        )
        words = index < table.text_columns and name not in ("elements", "workers")
        columns.append(values if numbers and not words else None)
    return columns


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_package_text("page.html.jinja"))


def _package_text(name: str) -> str:
    return files("hogstream.profiling.report").joinpath(name).read_text("utf-8")
