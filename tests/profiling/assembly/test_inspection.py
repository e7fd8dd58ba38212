"""Which kernels can be inspected, what they are called, and that none is compiled in vain."""

from __future__ import annotations

import psutil
import pytest

from hogstream.profiling.assembly.inspection import VARIANTS, compile_kernels


def test_names_tell_variants_apart():
    updates, watched, finite = 2 * 4 * 24 * 2, 2 * 4 * 4, 2 * 4
    assert len({variant.name for variant in VARIANTS}) == updates + watched + finite


@pytest.mark.slow
def test_nothing_is_compiled_for_whoever_was_interrupted():
    pytest.importorskip("triton")
    me = psutil.Process()
    before = {*me.children(recursive=True)}
    kernels = compile_kernels("sm_90")
    next(kernels)
    compilers = {*me.children(recursive=True)} - before
    assert len(compilers) > 1
    kernels.close()
    assert psutil.wait_procs(compilers, timeout=60)[1] == []
