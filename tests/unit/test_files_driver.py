"""Files are replaced whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flanneld_py.drivers.files import HostFiles, read_text, write_atomically
from flanneld_py.model import Op, Outcome, Scope, State

ROOT = Path(__file__).parents[2]
TOO_LARGE = """
import resource, signal, sys
from pathlib import Path
from flanneld_py.drivers.files import HostFiles
from flanneld_py.model import Op
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
print(HostFiles().apply([Op("set", "files", sys.argv[1], "x" * 100_000)])[0].error)
"""


@pytest.fixture(autouse=True)
def strict_umask() -> object:
    before = os.umask(0o077)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def scope(*paths: Path) -> Scope:
    return Scope("/p", (), files=frozenset(map(str, paths)))


def test_files_come_and_go(tmp_path: Path) -> None:
    files = HostFiles()
    path = tmp_path / "subnet.env"
    other = tmp_path / "other"
    other.write_text("not asked for")
    assert files.observe(scope(path)) == State()
    for text in ("FLANNEL_MTU=1450\n", "", "näher\r\n"):
        op = Op("set", "files", str(path), text)
        assert files.apply([op]) == [Outcome(op)]
        assert path.read_bytes() == text.encode()
        assert files.observe(scope(path, tmp_path / "absent")) == State(files={str(path): text})
    delete = Op("del", "files", str(path))
    assert files.apply([delete, delete]) == [Outcome(delete), Outcome(delete)]
    assert names(tmp_path) == ["other"]


def test_folders_are_made_and_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "run" / "flannel" / "subnet.env"
    write_atomically(path, "new")
    assert (mode_of(path), mode_of(path.parent), mode_of(path.parent.parent)) == (0o644, 0o755, 0o755)
    private = tmp_path / "state.json"
    write_atomically(private, "new", mode=0o600)
    assert mode_of(private) == 0o600


def test_a_standing_file_keeps_its_mode_and_folders_theirs(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_text("old")
    path.chmod(0o640)
    tmp_path.chmod(0o711)
    write_atomically(path, "new")
    assert (mode_of(path), mode_of(tmp_path), path.read_text()) == (0o640, 0o711, "new")


def test_a_symlink_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    target, path = tmp_path / "passwd", tmp_path / "subnet.env"
    target.write_text("root")
    path.symlink_to(target)
    write_atomically(path, "new")
    assert not path.is_symlink()
    assert (target.read_text(), path.read_text(), mode_of(path)) == ("root", "new", 0o644)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_text("old")
    shown = subprocess.run(
        [sys.executable, "-c", TOO_LARGE, str(path)], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert shown == f"cannot write {path}: File too large (EFBIG)\n"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["subnet.env"]


def test_what_stands_in_the_way_is_named(tmp_path: Path) -> None:
    files = HostFiles()
    folder, plain = tmp_path / "folder", tmp_path / "plain"
    folder.mkdir()
    plain.write_text("")
    below = plain / "subnet.env"
    write, lower = Op("set", "files", str(folder), "x"), Op("set", "files", str(below), "x")
    assert [outcome.error for outcome in files.apply([write, lower, Op("del", "files", str(folder))])] == [
        f"cannot write {folder}: Is a directory (EISDIR)",
        f"cannot write {below}: Not a directory (ENOTDIR)",
        f"cannot delete {folder}: Is a directory (EISDIR)",
    ]
    assert files.observe(scope(folder, below)) == State()
    assert names(tmp_path) == ["folder", "plain"]


def test_read_text(tmp_path: Path) -> None:
    assert read_text(tmp_path / "absent") is None
    assert read_text(tmp_path / "absent" / "deeper") is None
    (tmp_path / "odd").write_bytes(b"a\xff\r\n")
    assert read_text(tmp_path / "odd") == "a\\xff\r\n"
    with pytest.raises(IsADirectoryError):
        read_text(tmp_path)


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    texts = {letter * 100_000 for letter in "ab"}
    write_atomically(path, "a" * 100_000)
    seen: set[str] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(50):
            for text in sorted(texts):
                write_atomically(path, text)
    finally:
        done.set()
        reader.join()
    assert seen <= texts
