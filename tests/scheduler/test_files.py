from __future__ import annotations

import os
import stat
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from hogstream.scheduler.files import replace_file
from process_testing import may_fork_with_threads


def test_the_old_file_stays_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replace_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_old_file_alone(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail_halfway() -> None:
        with replace_file(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)) as raised:
        fail_halfway()
    assert raised.value is error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_new_file_has_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with replace_file(tmp_path / "file"):
        pass
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o666, 0o755], ids=oct)
def test_permissions_stay(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    with replace_file(path) as file:
        (new,) = tmp_path.glob(".*.tmp")
        assert stat.S_IMODE(new.stat().st_mode) & ~0o600 == 0  # nobody else may read it meanwhile
        file.write(b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_owner_and_group_stay(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o640)
    os.chown(path, 1234, 2345)
    with replace_file(path) as file:
        file.write(b"new")
    status = path.stat()
    assert (status.st_uid, status.st_gid) == (1234, 2345)
    assert stat.S_IMODE(status.st_mode) == 0o640


@may_fork_with_threads
@pytest.mark.skipif(os.getuid() != 0, reason="only root may become others")
def test_a_group_that_is_lost_hands_on_no_rights() -> None:
    with TemporaryDirectory() as folder:  # not one of pytest's, which none but its user may enter
        os.chmod(folder, 0o777)
        path = Path(folder, "file")
        path.touch()
        path.chmod(0o664)
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                with replace_file(path) as file:
                    file.write(b"new")
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        status = path.stat()
        assert path.read_bytes() == b"new"
    assert (status.st_uid, status.st_gid) == (65534, 65534)
    assert stat.S_IMODE(status.st_mode) == 0o604


@pytest.mark.parametrize("name", ["n" * 255, "\u00fc" * 127, "a b'\"c\n"], ids=ascii)
def test_names_may_be_as_long_as_the_file_system_has_them(tmp_path: Path, name: str) -> None:
    for text in (b"first", b"second"):
        with replace_file(tmp_path / name) as file:
            file.write(text)
    assert (tmp_path / name).read_bytes() == b"second"


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "file")
    for text in (b"first", b"second"):
        with replace_file(link) as file:
            file.write(text)
        assert link.is_symlink()
        assert (tmp_path / "elsewhere" / "file").read_bytes() == text
    assert os.listdir(tmp_path / "elsewhere") == ["file"]


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with (
            pytest.raises(OSError, match="must be a regular file, or none yet"),
            replace_file(path),
        ):
            pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "file"
    with pytest.raises(FileNotFoundError) as raised, replace_file(path):
        pytest.fail("the block must not run")
    assert raised.value.filename == str(path)


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "file"
    with pytest.raises(NotADirectoryError) as raised, replace_file(path):
        pytest.fail("the block must not run")
    assert raised.value.filename == str(path)
