"""What may stand where a file of ours was: it is told, and it holds nobody up."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from flanneld_py.daemon import identity, oldfiles
from flanneld_py.daemon.identity import identity_of
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
        identity_of("", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_garbage_node_id_is_cut_and_its_file_named(tmp_path: Path) -> None:
    (tmp_path / "node-id").write_bytes(b"\x00\xff garbage\n" * 100_000)
    with pytest.raises(HostError, match=f"{tmp_path}/node-id holds") as caught:
        identity_of("", tmp_path)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert "--node-id '" not in str(caught.value)


def test_where_the_node_id_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "MACHINE_ID", tmp_path / "machine-id")
    fresh = identity_of("", tmp_path)
    assert identity_of("", tmp_path).node_id == fresh.node_id, "it is kept"
    (tmp_path / "node-id").write_text("kept\n")
    assert identity_of("", tmp_path).node_id == "kept"
    assert (identity_of("given", tmp_path).node_id, identity_of("given", tmp_path).fixed) == ("given", True)
    with pytest.raises(UsageError, match="--node-id 'a b'"):
        identity_of("a b", tmp_path)


def test_another_node_id_is_kept_before_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "node-id").write_text("kept\n")
    here, told = identity_of("", tmp_path, "seed"), []
    here.changed = lambda: told.append(here.node_id)
    fresh = here.renew()
    assert told == [fresh] == [identity_of("", tmp_path).node_id]
    assert fresh != "kept"
    assert here.mac_seed != "seed", "it was cloned as well"


def test_a_node_id_that_cannot_be_kept_is_not_taken(tmp_path: Path) -> None:
    here = identity_of("", tmp_path / "state")
    before, told = here.node_id, []
    here.changed = lambda: told.append(here.node_id)
    shutil.rmtree(tmp_path / "state", ignore_errors=True)
    (tmp_path / "state").write_text("in the way")
    with pytest.raises(HostError, match="the node id cannot be kept"):
        here.renew()
    assert (here.node_id, told) == (before, [])
