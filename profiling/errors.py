"""What a command cannot do, told in a line; this module loads nothing."""

from __future__ import annotations


class MeasurementError(Exception):
    """A measurement failed; says why."""
