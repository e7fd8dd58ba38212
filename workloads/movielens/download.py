"""MovieLens-100K, taken from a wheel of another project, into the user's cache folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hogstream.profiling.results.last import cache_folder
from hogstream.scheduler.files import replace_file

LICENCE = """\
MovieLens data by GroupLens, University of Minnesota. The data may be used for research. Without
permission of GroupLens it may not be redistributed, nor used for any commercial purpose.
Publications cite: F. M. Harper and J. A. Konstan. 2015. The MovieLens Datasets: History and
Context. ACM Transactions on Interactive Intelligent Systems (TiiS) 5(4)."""

REQUIREMENT = "recbole==1.2.1"
MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"
SHA256 = "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
_LINES_OF_PIP = 5


def download_ml_100k() -> Path:
    """Downloads MovieLens-100K, unless it is there: 100,000 ratings, 943 users, 1,682 items.

    It comes in the wheel of recbole 1.2.1, which pip downloads as the user has set it up, with its
    index and its proxy. Nothing is installed. The file stays in the folder ``hogstream`` of the
    user's cache folder. A file there that is damaged is replaced.

    Licence: MovieLens data by GroupLens, University of Minnesota. The data may be used for
    research. Without permission of GroupLens it may not be redistributed, nor used for any
    commercial purpose. Publications cite F. M. Harper and J. A. Konstan 2015, "The MovieLens
    Datasets: History and Context", ACM TiiS 5(4). ``LICENCE`` says so too, for commands to print.

    Returns:
        The file, which ``read_ratings`` reads.

    Raises:
        RuntimeError: If there is no cache folder, pip is missing or fails, or what it downloads is
            not the file that is expected.
        OSError: If the file cannot be written.
    """
    folder = cache_folder()
    if folder is None:
        raise RuntimeError("there is no home folder to keep MovieLens-100K in: set XDG_CACHE_HOME")
    path = folder / "ml-100k.inter"
    download_file(path, SHA256)
    return path


def download_file(path: Path, sha256: str) -> None:
    """Downloads the wheel and puts its ``MEMBER`` at ``path``, unless it is there.

    Args:
        path: Of the file. Its folder is made.
        sha256: What the file must have, in hexadecimal.

    Raises:
        RuntimeError: If pip is missing or fails, or what it downloads is not the file that is
            expected.
        OSError: If the file cannot be written.
    """
    if path.exists() and _sha256(path.read_bytes()) == sha256:
        return
    data = _downloaded_member()
    found = _sha256(data)
    if found != sha256:
        raise RuntimeError(f"{MEMBER} of {REQUIREMENT} must have SHA-256 {sha256}, got {found}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write(data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _downloaded_member() -> bytes:
    """What ``MEMBER`` holds in the wheel that pip downloads."""
    with tempfile.TemporaryDirectory(prefix="hogstream-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--dest", folder, REQUIREMENT]
        command += ["--no-deps", "--only-binary", ":all:", "--no-input"]
        command += ["--disable-pip-version-check"]  # whose notice would be the last of stderr
        run = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
        if run.returncode:
            last = "\n".join(run.stderr.strip().splitlines()[-_LINES_OF_PIP:])
            raise RuntimeError(
                f"pip could not download {REQUIREMENT}, exit status {run.returncode}:\n{last}"
            )
        (wheel,) = Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            if MEMBER not in archive.namelist():
                raise RuntimeError(f"{wheel.name} must hold {MEMBER}, which it lacks")
            return archive.read(MEMBER)
