"""The HTML report: one file that opens offline."""

from __future__ import annotations

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from hogstream.profiling import plots, summary
from hogstream.profiling.gains import gain_columns, gain_tables
from hogstream.profiling.heat_map import gain_heat_map


def render_report(bench: dict[str, Any]) -> str:
    """The report of a run of ``hogstream bench``, as self-contained HTML.

    Args:
        bench: The JSON output.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = files("hogstream.profiling").joinpath("report.html.jinja").read_text("utf-8")
    results = bench["results"]
    ceiling = bench["ceilings"]["update_shaped_gigabytes_per_second"]
    gains = gain_tables(bench)
    figures = [
        ("Updates per second", plots.throughput(results), "Updates per second against workers."),
        ("Latency", plots.latency(results), "Median and 99th percentile against workers."),
        ("Staleness", plots.staleness(results), "Mean staleness against workers."),
        (
            "Kernels alone",
            plots.kernel_bandwidth(bench["kernels"], ceiling),
            "Bandwidth of one large update, against the ceiling of memory.",
        ),
    ]
    if gains:
        text = "Lock-free's updates per second over the baseline's, for sizes and worker counts."
        figures.insert(0, ("Gain", plots.to_svg(gain_heat_map(bench)), text))
    return environment.from_string(template).render(
        sentences=summary.interruption(bench) + summary.sentences(bench),
        figures=[
            {"title": title, "source": _as_data_url(svg), "text": text}
            for title, svg, text in figures
        ],
        gain_columns=gain_columns(bench),
        gain_tables=gains,
        columns=summary.COLUMNS,
        rows=[summary.result_row(result) for result in results],
        race_columns=summary.RACE_COLUMNS,
        race_rows=summary.race_rows(bench),
        kernel_columns=summary.KERNEL_COLUMNS,
        kernel_rows=[summary.kernel_row(kernel) for kernel in bench["kernels"]],
        environment=_flat(bench["environment"] | bench["settings"]),
        command=bench["command"],
    )


def write_report(bench: dict[str, Any], path: Path) -> None:
    """Writes the report of a run of ``hogstream bench``."""
    path.write_text(render_report(bench), encoding="utf-8")


def _as_data_url(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    """Nested entries under their own names, in order."""
    flat: dict[str, Any] = {}
    for name, value in environment.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return {name: "-" if value is None else value for name, value in flat.items()}
