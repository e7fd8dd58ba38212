"""Where tests keep what Numba compiles."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def keep_by_source() -> None:
    """Keeps it by what all files say that it comes from, so that no code of before is run.

    Numba itself keeps it by the file of the function alone. Call this before Numba is imported.
    """
    files = (
        *sorted(_ROOT.glob("kernels/**/*.py")),
        _ROOT / "scheduler" / "lanes" / "native_loop.py",
        _ROOT / "profiling" / "ceilings" / "numba_passes.py",
    )
    source = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    os.environ["NUMBA_CACHE_DIR"] = str(_ROOT / ".pytest_cache" / f"numba-{source[:16]}")
