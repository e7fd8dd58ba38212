"""Measurements, ceilings, results and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hogstream.profiling.measure.decision import decide

__all__ = ["decide"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: who needs another part does not wait for this."""
    if name in __all__:
        from hogstream.profiling.measure import decision

        return getattr(decision, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
