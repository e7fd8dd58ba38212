"""One file of all that a run has made, which is no larger than may be brought back."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

#: What may be brought back in one file, with some room.
MOST_BYTES = 15 << 20
#: In an archive: what did not fit.
LEFT_OUT = "left-out.txt"
# Of a log, the beginning and the end tell what went wrong.
_LONGEST_LOG = 256 << 10


def write(folder: Path, archive: Path, most_bytes: int = MOST_BYTES) -> list[str]:
    """Writes a zip of a folder in place of an older one; who looks sees the one or the other.

    Args:
        folder: Of what is taken, with all that is in it.
        archive: The file.
        most_bytes: How large it may be, roughly; the largest files that do not fit are left out.

    Returns:
        What was left out, as paths in the folder. The archive names it too.
    """
    unfinished = archive.with_name(f".{archive.name}.unfinished")
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=_size)
    left_out: list[str] = []
    room = most_bytes
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as made:
        for path in files:
            content, name = _content(path), path.relative_to(folder).as_posix()
            room -= len(zlib.compress(content))
            if room < 0:
                left_out.append(name)
            else:
                made.writestr(name, content)
        if left_out:
            made.writestr(LEFT_OUT, "\n".join(left_out) + "\n")
    os.replace(unfinished, archive)
    return left_out


def _size(path: Path) -> tuple[int, Path]:
    return path.stat().st_size, path


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".log" or len(content) <= _LONGEST_LOG:
        return content
    half = _LONGEST_LOG // 2
    return content[:half] + b"\n\n... left out ...\n\n" + content[-half:]
