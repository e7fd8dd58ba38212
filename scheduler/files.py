"""Writing files so that a crash leaves the old one or the new one, never a part."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a new file that takes the place of ``path`` when the ``with`` block ends.

    It is written beside ``path`` and renamed over it once it is on the disk, so whoever opens
    ``path``, at whatever moment the process or the machine stops, finds all of the old file or all
    of the new one. If the block fails, the old one stays and nothing else is left. A process that
    is killed in the block leaves a ``.hogstream-<random>.tmp``, which may be deleted.

    The new file has the old one's permissions, group and owner; where they may not be given away,
    it is the user's own, and a group that the old one did not have gets no rights. Access control
    lists and other attributes are not kept, and other hard links still lead to the old file.

    Args:
        path: A regular file, or none yet. A symbolic link is followed, and stays.

    Yields:
        The new file, open for writing bytes.

    Raises:
        OSError: If it cannot be written, or ``path`` is something else, such as a folder.
    """
    target = Path(os.path.realpath(path))
    try:
        old = target.stat()
    except FileNotFoundError:
        old = None
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise OSError(f"{path} must be a regular file, or none yet, to be replaced")
    # Of a length of its own: the longest of names leaves no room for more.
    temporary = target.with_name(f".hogstream-{secrets.token_hex(4)}.tmp")
    try:
        with open(
            temporary, "xb", opener=partial(os.open, mode=0o666 if old is None else 0o600)
        ) as file:
            yield file
            file.flush()
            if old is not None:
                _give_rights_of(old, file.fileno())
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
    _sync_folder(target.parent)


def _give_rights_of(old: os.stat_result, file: int) -> None:
    """Gives an open file the owner, group and permissions of another, as far as that is allowed."""
    mode = old.st_mode & 0o777
    with suppress(OSError):
        os.fchown(file, -1, old.st_gid)
    if os.fstat(file).st_gid != old.st_gid:
        mode &= ~stat.S_IRWXG
    with suppress(OSError):  # of a file system that knows none, or of a user who is not root
        os.fchmod(file, mode)
        os.fchown(file, old.st_uid, -1)


def _sync_folder(folder: Path) -> None:
    """Makes a rename last: until then it is in memory only."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
