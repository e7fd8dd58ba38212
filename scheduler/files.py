"""Writing files so that a crash leaves the old one or the new one, never a part."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a new file that takes the place of ``path`` when the ``with`` block ends.

    It is written beside ``path`` and renamed over it once it is on the disk, so whoever opens
    ``path``, at whatever moment the process or the machine stops, finds all of the old file or all
    of the new one. If the block fails, the old one stays and nothing else is left. A process that
    is killed in the block leaves a ``.<name>.<random>.tmp``, which may be deleted.

    Args:
        path: A regular file, or none yet. A symbolic link is followed, and stays.

    Yields:
        The new file, open for writing bytes.

    Raises:
        OSError: If it cannot be written, or ``path`` is something else, such as a folder.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"{path} must be a regular file, or none yet, to be replaced")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename last: until then it is in memory only."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
