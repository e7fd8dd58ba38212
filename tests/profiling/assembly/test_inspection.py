"""Which kernels can be inspected, and what they are called."""

from __future__ import annotations

from hogstream.profiling.assembly.inspection import VARIANTS


def test_names_tell_variants_apart():
    updates, watched, finite = 2 * 4 * 2 * 2 * 2, 2 * 4, 2 * 4
    assert len({variant.name for variant in VARIANTS}) == updates + watched + finite
