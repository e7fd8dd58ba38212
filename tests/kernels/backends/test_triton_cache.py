"""Triton compiles where its own cache folder cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from process_testing import run_python

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# For each folder in a child of its own, of one parent that has imported torch. Also in a child of
# that, whose end must not take the folder away.
CODE = """
import os, sys, torch
for folder in sys.argv[1:]:
    os.environ["TRITON_CACHE_DIR"] = folder
    child = os.fork()
    if child == 0:
        from hogstream.kernels.backends.triton_cache import ensure_folder
        ensure_folder()
        import triton
        if not os.fork():
            sys.exit()
        os.wait()
        print(triton.knobs.cache.dir, os.path.isdir(triton.knobs.cache.dir))
        sys.exit()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, folder
assert "triton" not in sys.modules
"""


def test_has_a_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    good = tmp_path / "good"
    caches = ["/proc/none", str(tmp_path / "file"), str(good)]
    said = run_python("-c", CODE, *caches, TMPDIR=str(tmp_path / "tmp")).splitlines()
    for cache, line in zip(caches, said, strict=True):
        folder, is_there = line.split()
        assert is_there == "True"
        assert (folder == cache) == (cache == str(good))
        assert Path(folder).exists() == (folder == cache)  # a temporary one is deleted at the end
    assert not list((tmp_path / "tmp").iterdir())
