"""What may stand where a file of ours was: it is told, and it holds nobody up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flanneld_py.daemon import identity, oldfiles
from flanneld_py.daemon.identity import node_id_of
from flanneld_py.daemon.oldfiles import read_regular
from flanneld_py.errors import HostError, UsageError


def make(kind: str, path: Path) -> None:
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
        case "device":
            path.symlink_to("/dev/zero")


ODD = ("directory", "fifo", "loop", "device")


@pytest.mark.parametrize("kind", ODD)
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    make(kind, tmp_path / "file")
    with pytest.raises(OSError, match=r".") as caught:
        read_regular(tmp_path / "file")
    assert caught.value.strerror


def test_text_and_none(tmp_path: Path) -> None:
    assert read_regular(tmp_path / "absent") is None
    (tmp_path / "file").write_bytes(b"a\xff\n")
    assert read_regular(tmp_path / "file") == "a\\xff\n"
    assert read_regular(tmp_path / "file" / "deeper") is None


def test_no_file_is_read_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oldfiles, "LONGEST", 3)
    (tmp_path / "file").write_text("1234")
    with pytest.raises(OSError, match="longer than"):
        read_regular(tmp_path / "file")


@pytest.mark.parametrize("kind", ODD)
def test_a_node_id_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    make(kind, tmp_path / "node-id")
    with pytest.raises(HostError, match=f"{tmp_path}/node-id: cannot read the node id: ") as caught:
        node_id_of("", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_garbage_node_id_is_cut_and_its_file_named(tmp_path: Path) -> None:
    (tmp_path / "node-id").write_bytes(b"\x00\xff garbage\n" * 100_000)
    with pytest.raises(HostError, match=f"{tmp_path}/node-id holds") as caught:
        node_id_of("", tmp_path)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert "--node-id '" not in str(caught.value)


def test_where_the_node_id_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "MACHINE_ID", tmp_path / "machine-id")
    fresh = node_id_of("", tmp_path)
    assert node_id_of("", tmp_path) == fresh, "it is kept"
    (tmp_path / "node-id").write_text("kept\n")
    assert node_id_of("", tmp_path) == "kept"
    assert node_id_of("given", tmp_path) == "given"
    with pytest.raises(UsageError, match="--node-id 'a b'"):
        node_id_of("a b", tmp_path)
