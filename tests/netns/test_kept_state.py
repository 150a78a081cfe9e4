"""What a host keeps for a start without etcd: when it is written, and when it is not gone by."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import wait_for
from tests.netns.observing import codes, events, start_pings, wait_answers, wait_status
from tests.netns.offline import (
    ASIDE,
    NAME,
    WRITE_EVERY,
    boot,
    kept,
    running_on,
    switch_off,
    wait_kept,
    wait_reached,
    wait_sync,
)
from tests.netns.oracle import actual, own_key, wait_in_order
from tests.netns.peers import change_peers, make_peers
from tests.netns.registry_history import revision
from tests.netns.scenes import overlay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flanneld_py.lab import Host, Lab

ROOT = Path(__file__).parents[2]
TOLD_WITHIN = 5.0
KNOWN_WITHIN = 15.0
"""Seconds until it is clear that an interface will not come."""


# --- a state that cannot be used ------------------------------------------------------------------


def sealed(path: Path, **fields: Any) -> None:
    """Change fields of its first line, and make its last one right again."""
    head, *rows, end = path.read_text().splitlines()
    lines = [json.dumps(json.loads(head) | fields), *rows]
    body = json.loads(end)
    body.pop("sha256")
    body["content"] = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text("".join(f"{line}\n" for line in (*lines, json.dumps({**body, "sha256": digest}))))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "corrupt": (flip_a_bit, "checksum differs|none of ours"),
    "truncated": (cut, "cut off"),
    "empty": (lambda path: path.write_text(""), "cut off"),
    "garbage": (lambda path: path.write_bytes(b"\xff\0" * 999), "none of ours"),
    "older version": (partial(sealed, format=0), "is of format 0, expected 1"),
    "later version": (partial(sealed, format=2), "is of format 2, expected 1"),
    "other prefix": (partial(sealed, prefix="/somebody/else"), "is of prefix /somebody/else, not "),
    "other node": (partial(sealed, node_id="somebody-else"), "is of node id somebody-else, not "),
    "other machine": (partial(sealed, mac="02:fe:00:00:00:01"), "another machine"),
    "other user": (lambda path: os.chown(path, 1234, -1), "belongs to user 1234"),
    "unsupported config": (
        partial(sealed, config='{"Network":"10.5.0.0/16","Backend":{"Type":"wireguard"}}'),
        "wireguard",
    ),
}
"""What happens to the file → and what is said of it."""


def wait_waiting(host: Host) -> None:
    """Until it waits for etcd as a host does that was never there before."""
    status = wait_status(host.daemon, "etcd to be missed", lambda s: codes(s) == ["registry-unreachable"])
    assert (status["state"], status["registry"]["running_on_state_of"]) == ("waiting", None)
    assert not host.subnet_file.exists()
    assert host.daemon.ready_after() is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_cannot_be_used_is_put_aside_with_one_warning(lab: Lab, damage: str) -> None:
    act, reason = DAMAGES[damage]
    (alpha,) = overlay(lab, "vxlan", "alpha")
    before = switch_off(alpha, backend="vxlan")[alpha.name]
    lab.etcd.stop()
    act(kept(alpha))
    content = kept(alpha).read_bytes()
    alpha.reboot()
    alpha.start_daemon()
    told = wait_for(lambda: events(alpha.daemon, "file_put_aside"), KNOWN_WITHIN, "a warning")
    wait_waiting(alpha)
    aside = kept(alpha).with_name(NAME + ASIDE)
    assert aside.read_bytes() == content
    assert not kept(alpha).exists()
    assert [(line["level"], line["path"], line["kept_as"]) for line in told] == [
        ("warning", str(kept(alpha)), str(aside))
    ]
    assert re.search(reason, told[0]["reason"])
    assert len(told[0]["reason"]) < 300
    lab.etcd.start()
    alpha.daemon.wait_ready()
    wait_sync(alpha)
    assert own_key(alpha) == before.key
    wait_kept(alpha, {before.key})
    assert len(events(alpha.daemon, "file_put_aside")) == 1


@pytest.mark.parametrize("damage", ["corrupt", "truncated", "empty", "older version"])
def test_a_damaged_lease_file_is_put_aside_and_the_rest_is_gone_by(lab: Lab, damage: str) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    before = switch_off(alpha, backend="vxlan")[alpha.name]
    lab.etcd.stop()
    path = alpha.state_directory / "state.json"
    if damage == "older version":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    else:
        DAMAGES[damage][0](path)
    began = boot(alpha)
    wait_reached(alpha, beta, began)
    assert actual(alpha, "vxlan") == before.rows
    (told,) = events(alpha.daemon, "file_put_aside")
    assert (told["path"], told["kept_as"]) == (str(path), str(path) + ASIDE)
    lab.etcd.start()
    wait_sync(alpha)
    assert own_key(alpha) == before.key


def test_a_clone_does_not_use_its_originals_state(lab: Lab) -> None:
    """A golden image: node id, state directory and all, and no etcd to tell the machines apart."""
    alpha, gamma = overlay(lab, "vxlan", "alpha", "gamma")
    wait_kept(alpha, set(lab.etcd.leases()))
    beta = lab.add_host("beta")
    shutil.copytree(alpha.state_directory, beta.state_directory, dirs_exist_ok=True)
    key, ping = own_key(alpha), start_pings(gamma, alpha)
    lab.etcd.stop()
    beta.start_daemon([f"--node-id={alpha.node_id}"])
    (told,) = wait_for(lambda: events(beta.daemon, "file_put_aside"), KNOWN_WITHIN, "a warning")
    assert "was written on another machine" in told["reason"]
    wait_waiting(beta)
    assert actual(beta, "vxlan") == {}
    lab.etcd.start()
    wait_status(beta.daemon, "the original to be seen", lambda s: s["lease"]["state"] == "conflict", 10)
    assert own_key(alpha) == key
    wait_answers(ping)
    assert ping.stop().lost == ()


# --- what is written ------------------------------------------------------------------------------


def inode(host: Host) -> int:
    return kept(host).stat().st_ino if kept(host).exists() else 0


def test_an_unchanged_registry_writes_nothing(lab: Lab) -> None:
    """Nor does a restart, nor what others store beside it."""
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    wait_kept(alpha, set(lab.etcd.leases()))
    first = inode(alpha), kept(alpha).stat().st_mtime_ns
    for _ in range(2):
        alpha.daemon.send_signal(signal.SIGHUP)  # all is looked at again
        lab.etcd.ctl("put", f"{lab.etcd.prefix}/something-else", "x")
        lab.etcd.ctl("put", "/elsewhere", "x")
        time.sleep(WRITE_EVERY / 2 + 0.5)
    assert alpha.daemon.terminate() == 0
    assert (inode(alpha), kept(alpha).stat().st_mtime_ns) == first
    alpha.start_daemon().wait_ready()
    wait_sync(alpha)
    time.sleep(1)
    alpha.daemon.kill()
    assert (inode(alpha), kept(alpha).stat().st_mtime_ns) == first
    assert beta.daemon.status()["ready"]


def test_constant_change_is_written_once_in_some_seconds_and_at_the_end(lab: Lab) -> None:
    (alpha,) = overlay(lab, "host-gw", "alpha")
    ghosts = make_peers(lab.etcd, 2)
    wait_kept(alpha, set(lab.etcd.leases()))
    seen, began = {inode(alpha)}, time.monotonic()
    while time.monotonic() - began < 2 * WRITE_EVERY:
        change_peers(lab.etcd, "host-gw", put=ghosts[:1], gone=ghosts[1:])
        seen.add(inode(alpha))
        change_peers(lab.etcd, "host-gw", put=ghosts[1:], gone=ghosts[:1])
        seen.add(inode(alpha))
    spent = time.monotonic() - began
    assert 2 <= len(seen) <= 2 + spent / WRITE_EVERY
    change_peers(lab.etcd, "host-gw", gone=ghosts)
    wait_in_order(alpha, "host-gw")
    assert alpha.daemon.terminate() == 0
    wait_kept(alpha, {own_key(alpha)})


STEPS = ("before", "opened", "synced", "renamed", "folder synced")


@pytest.mark.parametrize("step", STEPS)
def test_killed_while_it_is_written_the_next_start_goes_by_the_old_or_the_new(
    lab: Lab, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    old = set(lab.etcd.leases())
    before = switch_off(alpha, backend="vxlan")[alpha.name]
    (ghost,) = make_peers(lab.etcd, 1)
    change_peers(lab.etcd, "vxlan", put=[ghost])
    command = (sys.executable, "-m", "tests.netns.die_keeping", step)
    with monkeypatch.context() as patched:
        patched.setattr("flanneld_py.lab.daemon.COMMAND", command)
        patched.chdir(ROOT)
        daemon = alpha.start_daemon()
    assert daemon.wait_exit(20) == -9
    lab.etcd.stop()
    began = boot(alpha)
    wait_reached(alpha, beta, began)
    running_on(alpha)
    new = step in ("renamed", "folder synced")
    wait_kept(alpha, old | {ghost.key} if new else old)
    assert (f"fdb {ghost.mac}" in actual(alpha, "vxlan")) == new
    assert own_of(alpha) == before.key
    assert [path.name for path in alpha.state_directory.glob(f".{NAME}.*")] == []
    lab.etcd.start()
    wait_sync(alpha)
    wait_in_order(alpha, "vxlan")


def own_of(host: Host) -> str:
    key: str = host.daemon.status()["lease"]["key"]
    return key


@contextmanager
def immutable(host: Host) -> Iterator[None]:
    host.run(["chattr", "+i", str(host.state_directory)])
    try:
        yield
    finally:
        host.run(["chattr", "-i", str(host.state_directory)])


def test_a_disk_that_cannot_be_written_is_named_and_costs_nothing_else(lab: Lab) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    wait_kept(alpha, set(lab.etcd.leases()))
    ping = start_pings(alpha, beta)
    (ghost,) = make_peers(lab.etcd, 1)
    with immutable(alpha):
        change_peers(lab.etcd, "vxlan", put=[ghost])
        wait_in_order(alpha, "vxlan")
        status = wait_status(
            alpha.daemon, "it to be named", lambda s: codes(s) == ["state-not-saved"], WRITE_EVERY + 5
        )
        assert str(kept(alpha)) in status["problems"][0]["reason"]
        assert status["ready"]
        assert len(events(alpha.daemon, "registry_not_saved")) == 1
    wait_status(alpha.daemon, "no problem", lambda s: not s["problems"], 2 * WRITE_EVERY + 5)
    wait_kept(alpha, set(lab.etcd.leases()))
    assert ping.stop().lost == ()


def test_the_state_is_private(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    wait_kept(alpha, set(lab.etcd.leases()))
    assert alpha.state_directory.stat().st_mode & 0o077 == 0
    assert kept(alpha).stat().st_mode & 0o077 == 0


# --- what etcd says at the start --------------------------------------------------------------------


def test_a_peer_whose_record_became_garbage_stays_over_a_restart(lab: Lab) -> None:
    alpha, _ = overlay(lab, "vxlan", "alpha", "beta")
    (peer,) = make_peers(lab.etcd, 1)
    change_peers(lab.etcd, "vxlan", put=[peer])
    wait_in_order(alpha, "vxlan")
    wait_kept(alpha, set(lab.etcd.leases()))
    before = actual(alpha, "vxlan")
    lab.etcd.ctl("put", "--ignore-lease", f"{lab.etcd.prefix}/subnets/{peer.key}", "--", "garbage")
    wait_status(alpha.daemon, "it to be told", lambda s: "peers-left-out" in codes(s))
    alpha.daemon.terminate()
    alpha.start_daemon().wait_ready()
    wait_status(alpha.daemon, "it to be told again", lambda s: "peers-left-out" in codes(s))
    assert actual(alpha, "vxlan") == before


def test_an_etcd_that_lost_all_while_no_daemon_ran_and_was_overtaken_takes_no_peer_away(
    fresh_lab: Lab,
) -> None:
    """It has more revisions than we knew, as others have written to it since."""
    etcd = fresh_lab.etcd
    alpha, beta, gamma = overlay(fresh_lab, "vxlan", "alpha", "beta", "gamma")
    before = switch_off(alpha, beta, gamma, backend="vxlan")
    known = revision(etcd)
    config_text = etcd.ctl("get", f"{etcd.prefix}/config", "--print-value-only")
    etcd.stop()
    etcd.start(empty=True)
    etcd.put_config(config_text)
    while revision(etcd) <= known + 5:
        etcd.ctl("put", "/others", "written")
    alpha.start_daemon().wait_ready()
    wait_for(lambda: events(alpha.daemon, "wipe_hold"), TOLD_WITHIN, "the wipe to be told")
    wait_for(lambda: own_key(alpha), TOLD_WITHIN, "its record")
    assert actual(alpha, "vxlan") == before["alpha"].rows
    beta.start_daemon().wait_ready()
    gamma.start_daemon().wait_ready()
    wait_sync(alpha, beta, gamma)
    assert actual(alpha, "vxlan") == before["alpha"].rows


def test_a_state_directory_that_became_read_only_serves_a_start(lab: Lab) -> None:
    """As after an error of the disk."""
    alpha, _ = overlay(lab, "vxlan", "alpha", "beta")
    before = switch_off(alpha, backend="vxlan")["alpha"]
    lab.etcd.stop()
    alpha.reboot()
    folder = alpha.state_directory
    read_only = f'mount --bind {folder} {folder} && mount -o remount,ro,bind {folder} && exec "$@"'
    alpha.start_daemon(wrapper=["unshare", "--mount", "sh", "-c", read_only, "sh"]).wait_ready()
    running_on(alpha)
    wait_for(
        lambda: actual(alpha, "vxlan"), TOLD_WITHIN, "what stood before", lambda rows: rows == before.rows
    )
