"""Triton compiles where its own cache folder cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from process_testing import run_python

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# Also in a child, whose end must not take the folder away.
CODE = """
import os, sys
from hogstream.kernels.backends.triton_cache import ensure_folder
ensure_folder()
import triton
if not os.fork():
    sys.exit()
os.wait()
print(triton.knobs.cache.dir, os.path.isdir(triton.knobs.cache.dir))
"""


@pytest.mark.parametrize("own", ["none", "file", "good"])
def test_has_a_folder(tmp_path, own):
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    cache = {"none": "/proc/none", "file": tmp_path / "file", "good": tmp_path / "good"}[own]
    said = run_python("-c", CODE, TRITON_CACHE_DIR=str(cache), TMPDIR=str(tmp_path / "tmp"))
    folder, is_there = said.split()
    assert is_there == "True"
    assert (Path(folder) == cache) == (own == "good")
    assert Path(folder).exists() == (own == "good")  # a temporary one is deleted at the end
    assert not list((tmp_path / "tmp").iterdir())
