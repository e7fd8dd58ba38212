"""Numbers and names as one says them, in tables, sentences and pages alike."""

from __future__ import annotations


def counted(count: int, thing: str) -> str:
    """A number and its noun, such as ``1 worker`` and ``2 workers``."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def size_name(elements: int) -> str:
    """A number of elements as one says it: 2^20 rather than 1048576."""
    power = elements.bit_length() - 1
    return f"2^{power}" if elements == 1 << power and power >= 10 else f"{elements:,}"


def number_text(value: float | None, digits: int = 0, unit: str = "") -> str:
    """A number, with thousands separated; a dash for one that was not measured."""
    return "-" if value is None else f"{value:,.{digits}f}{unit}"


def rounded_text(value: float) -> str:
    """A number in about four digits."""
    return number_text(value, 0 if value >= 1000 else 1 if value >= 100 else 3)
