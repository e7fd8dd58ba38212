"""The table of ``hogstream inspect``."""

from __future__ import annotations

from itertools import groupby

from rich.table import Table

from hogstream.cli.console import new_table
from hogstream.profiling.assembly.inspection import Variant
from hogstream.profiling.assembly.parse import Findings, Widths

COLUMNS = (
    "kernel",
    "dtype",
    "registers",
    "spills",
    "loads",
    "stores",
    "masked",
    "fma",
    "approx",
)


def inspection_table(target: str, inspected: dict[Variant, Findings]) -> Table:
    """What the variants of each kernel and dtype take and do: the most of any of them.

    Registers, loads and stores are ranges.
    """
    table = new_table(f"Kernels for {target}", *COLUMNS, text_columns=2)
    for key, group in groupby(inspected, lambda variant: (variant.kernel, variant.dtype)):
        found = [inspected[variant] for variant in group]
        masked = {bits for each in found for bits in (*each.masked_loads, *each.masked_stores)}
        table.add_row(
            *key,
            _range([findings.registers for findings in found]),
            str(max(findings.spills for findings in found)),
            _counts([findings.loads for findings in found]) or "-",
            _counts([findings.stores for findings in found]) or "-",
            ",".join(map(str, sorted(masked))) or "-",
            str(max(findings.fused for findings in found)),
            str(max(findings.approximate for findings in found)),
        )
    return table


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _counts(widths: list[Widths]) -> str:
    """Such as ``0-2x64 4x128``: of 64 bits two accesses or fewer, of 128 always four."""
    every = sorted({bits for each in widths for bits in each})
    return " ".join(f"{_range([each.get(bits, 0) for each in widths])}x{bits}" for bits in every)
