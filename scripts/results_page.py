"""Writes the measured parts of README.md and docs/ from committed results: ``make results``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import epsilon
from hogstream.profiling.report import (
    answers,
    embedding,
    factorizing,
    plots,
    row_bench,
    rows,
    sentences,
)
from hogstream.profiling.results.embedding_schema import Embedding
from hogstream.profiling.results.files import AnyResult, decoded
from hogstream.profiling.results.movielens_schema import MovieLens
from hogstream.profiling.results.profile_schema import GpuRun, NcuProfile
from hogstream.profiling.results.records import Ratio
from hogstream.profiling.results.rows_schema import RowBench
from hogstream.profiling.results.schema import (
    Bench,
    Compare,
    MachineCeilings,
    ModelRate,
    ModelRates,
    Train,
)
from hogstream.profiling.wording import counted, number_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PICTURE = "gain.png"
_ONE_OF = {"threads": "thread", "processes": "process"}

R = TypeVar("R", bound=AnyResult)


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
    marks = re.compile(rf"(<!-- {part}: [^\n]*-->\n).*?(<!-- end of {part} -->\n)", re.DOTALL)
    if not marks.search(text):
        raise ValueError(f"{name} must hold a mark <!-- {part}: ... --> and <!-- end of {part} -->")
    made = "\n\n".join(measure(folder))
    return marks.sub(lambda found: f"{found[1]}\n{made}\n\n{found[2]}", text)


def main() -> None:
    """Rewrites the documents in place, and draws their pictures."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(updated(name, path.read_text("utf-8"), RESULTS), encoding="utf-8")
    for _, sweep in _last_sweep(RESULTS):
        plots.write_gain(sweep, RESULTS / PICTURE)
    for name, train in _read(RESULTS, "train-*", Train):
        plots.write_training(train, (RESULTS / name).with_suffix(".png"))
    epsilon.draw(RESULTS / epsilon.PICTURE)


def result(folder: Path) -> list[str]:
    """What README shows: a picture and a sentence on the last ``*-sweep.json``, and a link."""
    told = []
    for _, sweep in _last_sweep(folder):
        told += [
            f"![Gain of lock-free over the stronger of locked and ordered](docs/results/{PICTURE})",
            f"On {rows.machine_text(sweep)}: {answers.answer(sweep).verdict}",
        ]
    link = "[All results](docs/results.md), with 95 % intervals and the commands that made them."
    return [*told, link]


def results(folder: Path) -> list[str]:
    """What ``docs/results.md`` shows: each kind of result, each made by a command."""
    parts = []
    for name, bench in _read(folder, "bench", Bench):
        parts += _section(name, bench, sentences.of_bench(bench), rows.results(bench))
        parts += [_table(rows.kernels(bench))]
    for name, machine in _read(folder, "ceilings", MachineCeilings):
        tables = [rows.levels(machine.ceilings), rows.rates(machine.ceilings)]
        parts += _section(name, machine, [], tables)
    for name, sweep in _read(folder, "sweep", Bench):
        parts += _section(name, sweep, sentences.of_bench(sweep), rows.gains(sweep))
    for name, compare in _read(folder, "compare", Compare):
        skipped = rows.skipped(compare)
        tables = [rows.peers(compare), *([skipped] if skipped else [])]
        parts += _section(name, compare, sentences.of_compare(compare), tables)
    for name, train in _read(folder, "train-*", Train):
        parts += _section(name, train, sentences.of_train(train), [rows.training(train)])
        shown = f"Loss and {train.settings.metric} of {train.settings.workload} against time"
        parts += [f"![{shown}](results/{Path(name).with_suffix('.png')})"]
    for name, profile in _read(folder, "profile-ncu", NcuProfile):
        parts += _section(name, profile, [], [_counters(profile)])
    for name, run in _read(folder, "gpu", GpuRun):
        parts += _section(name, run, _bad_on_gpu(run), [_outcomes(run)])
    return [*parts, *_missing_on_gpu(folder)]


def races(folder: Path) -> list[str]:
    """What ``docs/lock-free.md`` shows of ``*-races.json``, made by ``bench --telemetry``."""
    parts = []
    for name, bench in _read(folder, "races", Bench):
        table = rows.races(bench)
        parts += _section(name, bench, sentences.of_bench(bench), [table] if table else [])
    return parts or ["Nothing was measured yet."]


def models(folder: Path) -> list[str]:
    """What ``docs/guide/asynchronous.md`` shows of ``*-models.json``."""
    parts = []
    for name, measured in _read(folder, "models", ModelRates):
        command = f"`{measured.command}` on {measured.environment.device_name}"
        parts += [f"{command} ([JSON](../results/{name})):", _table(_models(measured))]
    return parts or ["Nothing was measured yet."]


def rows_of_tables(folder: Path) -> list[str]:
    """What ``docs/guide/rows.md`` shows of ``*-movielens``, ``*-embedding`` and ``*-rows.json``."""
    parts = []
    for name, factors in _read(folder, "movielens", MovieLens):
        said = factorizing.said(factors)
        parts += _section(name, factors, said, [factorizing.table(factors)], "../results")
    for name, words in _read(folder, "embedding", Embedding):
        parts += _section(
            name, words, embedding.said(words), [embedding.table(words)], "../results"
        )
    for name, bench in _read(folder, "rows", RowBench):
        tables = [row_bench.kernels(bench), row_bench.policies(bench)]
        parts += _section(name, bench, row_bench.said(bench), tables, "../results")
    return parts or ["Nothing was measured yet."]


def _models(measured: ModelRates) -> rows.Table:
    """A row for each model and setup: our updates/s, and over those of each other way."""
    ways = list(dict.fromkeys(each.way for each in measured.results))
    ours, *others = ways
    columns = "model", "workers", f"updates/s of {ours}", *(f"over {way}" for way in others)
    places: dict[tuple[str, str], dict[str, ModelRate]] = {}
    for each in measured.results:
        one = _ONE_OF[each.spread_over]
        workers = f"1 {one}" if each.workers == 1 else f"{each.workers} {each.spread_over}"
        places.setdefault((each.model, workers), {})[each.way] = each
    lines = [
        (
            *place,
            number_text(each[ours].updates_per_second.median),
            *(_ratio_text(each[way].hogstream_ratio) for way in others),
        )
        for place, each in places.items()
    ]
    return rows.Table("Updates/s, and their ratios with 95 % intervals", columns, lines, 2, 1)


def _ratio_text(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio.median:.2f}x ({rows.range_text(ratio.estimate, 2)})"


def _read(folder: Path, job: str, type_: type[R]) -> Iterator[tuple[str, R]]:
    """Results of a job in the order of their names, each with its file's."""
    for path in sorted(folder.glob(f"*-{job}.json")):
        yield path.name, decoded(path.read_bytes(), type_)


def _last_sweep(folder: Path) -> list[tuple[str, Bench]]:
    return [*_read(folder, "sweep", Bench)][-1:]


def _section(
    name: str, result: R, said: list[str], tables: list[rows.Table], folder: str = "results"
) -> list[str]:
    """The command that made a result, what it says, and its tables.

    Args:
        name: Of the result's file.
        result: What is in it.
        said: Of it, in sentences.
        tables: Of it.
        folder: Of results, as the document's folder has it.
    """
    where = f" on {rows.machine_text(result)}" if isinstance(result, (Compare, Train)) else ""
    parts = [f"`{result.command}`{where} ([JSON]({folder}/{name})):"]
    parts += ["\n".join(f"- {sentence}" for sentence in said)] if said else []
    return [*parts, *map(_table, tables)]


def _counters(profile: NcuProfile) -> rows.Table:
    """What Nsight Compute counted of each kernel."""
    columns = ("kernel", "elements", "us", "DRAM %", "GB/s", "bytes an element", "registers")
    lines = [
        (
            each.kernel,
            number_text(each.elements),
            number_text(each.time_us.median if each.time_us else None, 1),
            number_text(each.dram_percent, 1),
            number_text(each.gigabytes_per_second),
            number_text(each.bytes_per_element, 2),
            number_text(each.registers),
        )
        for each in profile.results
    ]
    where = f", on {profile.environment.device_name}" if profile.environment else ""
    return rows.Table(f"Nsight Compute's counters{where}", columns, lines)


def _outcomes(run: GpuRun) -> rows.Table:
    """How many things came to which end in each stage of a run on a GPU."""
    ends = ("passed", "failed", "stopped", "skipped")
    counts: dict[str, Counter[str]] = {}
    for each in run.outcomes:
        counts.setdefault(each.stage, Counter())[each.end] += 1
    lines = [(stage, *(str(count[end]) for end in ends)) for stage, count in counts.items()]
    return rows.Table("Programs and tests", ("stage", *ends), lines)


def _bad_on_gpu(run: GpuRun) -> list[str]:
    """The machine, and what did not pass there though it ran."""
    where, versions = run.environment, run.environment.versions
    on = f"On {where.device_name}, with torch {versions['torch']} and Triton {versions['triton']}"
    tests = {each.stage for each in run.outcomes if "::" in each.name and each.end == "failed"}
    bad = [
        each
        for each in run.outcomes
        if each.end == "stopped"
        # A program that runs tests fails with any of them, which is told.
        or (each.end == "failed" and not (each.name == each.stage and each.stage in tests))
    ]
    return [
        f"{on}: {counted(len(bad), 'failure')}.",
        *(f"`{each.stage}` {each.name} {each.end}: {each.said}" for each in bad),
    ]


def _missing_on_gpu(folder: Path) -> list[str]:
    missing = [
        what
        for what, job in (("policies", "bench"), ("optimizers", "compare"))
        if not any(folder.glob(f"nvidia*-{job}.json"))
    ]
    if len(missing) == 2:
        return ["Nothing was measured on a GPU yet."]
    return [f"The {what} were not compared on a GPU yet." for what in missing]


def _table(table: rows.Table) -> str:
    count = len(table.columns)
    rule = ["---" if index < table.text_columns else "---:" for index in range(count)]
    lines = [" | ".join(cells) for cells in (table.columns, rule, *table.rows)]
    return "\n".join([f"{table.title}:", "", *(f"| {line} |" for line in lines)])


#: Each document, what its marks call the measured part, and the paragraphs of that.
DOCUMENTS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "README.md": ("result", result),
    "docs/results.md": ("results", results),
    "docs/lock-free.md": ("races", races),
    "docs/guide/asynchronous.md": ("models", models),
    "docs/guide/migrate.md": ("epsilon", epsilon.told),
    "docs/guide/rows.md": ("rows", rows_of_tables),
}


if __name__ == "__main__":
    main()
