"""etcd away, empty, behind, or full of garbage: no peer is lost by it, and all is well soon after."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.faults.surfaces import OBSERVED
from tests.netns.kernel_writes import STRACE, kernel_writes
from tests.netns.observing import codes, events, start_pings, wait_held, wait_status
from tests.netns.offline import wait_kept
from tests.netns.oracle import actual, differences, own_key, wait_in_order
from tests.netns.peers import change_peers, make_peers
from tests.netns.registry_history import revision, stored
from tests.netns.scenes import BACKENDS, config, overlay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flanneld_py.lab import Daemon, EtcdServer, Lab
    from tests.netns.faults.rows import Matrix

RECOVERED_WITHIN = 5.0
TOLD_WITHIN = 5.0
CUT_NOTICED_WITHIN = 15.0
"""Seconds until unanswered pings end a connection."""
MOST_LOG_LINES = 20


# --- away -----------------------------------------------------------------------------------------


def test_etcd_is_frozen_when_the_daemon_starts(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    lab.etcd.pause()
    daemon = alpha.start_daemon()
    status = wait_status(daemon, "the reason", lambda s: codes(s) == ["registry-unreachable"], TOLD_WITHIN)
    assert "deadline exceeded" in status["registry"]["error"]
    lab.etcd.resume()
    daemon.wait_ready()
    wait_in_order(alpha, "vxlan")


def test_a_restart_while_etcd_is_away_does_not_deny_what_stands(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    alpha.start_daemon().wait_ready()
    subnet = alpha.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0/")
    assert alpha.daemon.terminate() == 0
    (alpha.state_directory / "registry").unlink()  # else it would go by that
    lab.etcd.stop()
    daemon = alpha.start_daemon()
    status = wait_status(daemon, "the reason", lambda s: codes(s) == ["registry-unreachable"], TOLD_WITHIN)
    assert status["inherited"] == [subnet]
    assert status["checks"]["kernel"]["reason"].startswith("not looked at yet")
    assert status["checks"]["subnet-file"]["reason"] == "not written yet; that of the last run stands"
    lab.etcd.start()
    daemon.wait_ready()
    assert wait_status(daemon, "the lease", lambda s: s["ready"])["inherited"] == []


@contextmanager
def cut_off_from_etcd(lab: Lab) -> Iterator[None]:
    """Etcd is down; when the block ends it has to be up, and the hosts can reach it again."""
    lab.etcd.stop()
    lab.underlay.drop(["tcp dport 2379", "tcp sport 2379"])
    yield
    lab.underlay.drop([])


def overtake(etcd: EtcdServer, past: int) -> None:
    """Somebody else's writes, until etcd's revision is one that the hosts cannot tell from their own."""
    while revision(etcd) <= past + 5:
        etcd.ctl("put", "/somebody/else", "x")


@pytest.mark.parametrize("backend", BACKENDS)
def test_etcd_comes_back_empty_and_is_overtaken(fresh_lab: Lab, backend: str, fault: Matrix) -> None:
    """Cluster id and revision show nothing then: etcd would let every watch go on."""
    hosts = overlay(fresh_lab, backend, "alpha", "beta", "gamma", flags=OBSERVED)
    etcd = fresh_lab.etcd
    leases, known = etcd.leases(), revision(etcd)
    rows = {host: actual(host, backend) for host in hosts}
    ops = {host: host.daemon.status()["drift"]["ops"] for host in hosts}
    name, expected = "etcd empty, and overtaken", "all peers stay; each host claims its subnet again"
    with fault(name, backend, expected=expected, check=None) as row:
        row.stands(*hosts)
        with cut_off_from_etcd(fresh_lab):
            etcd.start(empty=True)
            etcd.put_config(config(backend))
            overtake(etcd, known)
        row.cured()
        wait_for(etcd.leases, RECOVERED_WITHIN, "every host to be back", lambda seen: seen == leases)
        row.recovered(*hosts)
    for host in hosts:
        assert [*replacements(host.daemon)], "a watch went on"
        assert actual(host, backend) == rows[host]
        assert host.daemon.status()["drift"]["ops"] == ops[host], "no peer ever left the kernel"


@pytest.mark.parametrize("backend", BACKENDS)
def test_etcd_is_restored_from_a_backup_and_overtaken(
    fresh_lab: Lab, backend: str, tmp_path: Path, fault: Matrix
) -> None:
    """With a host missing that came after the backup, and a peer in it that has been removed since."""
    etcd = fresh_lab.etcd
    alpha, beta = overlay(fresh_lab, backend, "alpha", "beta", flags=OBSERVED)
    (removed,) = make_peers(etcd, 1)
    change_peers(etcd, backend, put=[removed])
    backup = tmp_path / "backup"
    etcd.ctl("snapshot", "save", str(backup))
    change_peers(etcd, backend, gone=[removed])
    gamma = fresh_lab.add_host("gamma")
    gamma.start_daemon(OBSERVED).wait_ready()
    gamma.attach_pods()
    for host in (alpha, beta, gamma):
        wait_in_order(host, backend)
    leases, known = etcd.leases(), revision(etcd)
    name, expected = "etcd restored, and overtaken", "all peers stay; who came later claims again"
    with fault(name, backend, expected=expected, check=None) as row:
        row.stands(alpha, beta, gamma)
        with cut_off_from_etcd(fresh_lab):
            restore(etcd, backup)
            assert revision(etcd) < known
            overtake(etcd, known)
        row.cured()
        leases[removed.key] = removed.record(backend)
        wait_for(etcd.leases, RECOVERED_WITHIN, "gamma to be back", lambda seen: seen == leases)
        row.recovered(alpha, beta, gamma)
    for host in (alpha, beta, gamma):
        assert [*replacements(host.daemon)], "a watch went on"


def restore(etcd: EtcdServer, backup: Path) -> None:
    """Start it with what a backup holds."""
    shutil.rmtree(etcd.data_directory)
    peer = "http://127.0.0.1:2380"
    options = [f"--initial-cluster=default={peer}", f"--initial-advertise-peer-urls={peer}"]
    etcd.ctl("snapshot", "restore", str(backup), f"--data-dir={etcd.data_directory}", *options)
    etcd.start()


def replacements(daemon: Daemon) -> Iterator[str]:
    """What it said when it took etcd for another one although nothing but its content was."""
    for line in events(daemon, "registry_relist"):
        if "expected" in line["reason"] and "found" in line["reason"]:
            yield line["reason"]


def seconds_between(daemon: Daemon, one: str, other: str) -> float:
    """Of the last events of these kinds in its log."""
    earlier, later = (datetime.fromisoformat(events(daemon, name)[-1]["ts"]) for name in (one, other))
    return (later - earlier).total_seconds()


# --- behind ---------------------------------------------------------------------------------------


@contextmanager
def stopped(lab: Lab, daemon: Daemon) -> Iterator[None]:
    """The daemon is frozen, and its connection gone when it goes on."""
    daemon.send_signal(signal.SIGSTOP)
    # A new server has nothing in the pipe for a client that has not read for a while.
    lab.etcd.stop()
    lab.etcd.start()
    yield
    daemon.send_signal(signal.SIGCONT)


@contextmanager
def cut_off(lab: Lab, daemon: Daemon) -> Iterator[None]:
    """Nothing gets through between the daemon and etcd, long enough for it to give its connection up."""
    lab.underlay.drop(["tcp dport 2379", "tcp sport 2379"])
    wait_status(
        daemon,
        "etcd to be given up",
        lambda s: codes(s) == ["registry-unreachable"] and "not answered" not in s["problems"][0]["reason"],
        CUT_NOTICED_WITHIN,
    )
    yield
    lab.underlay.drop([])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("away", [stopped, cut_off])
def test_compaction_past_the_watch(
    lab: Lab, backend: str, away: Callable[[Lab, Daemon], AbstractContextManager[None]], fault: Matrix
) -> None:
    """One peer is deleted and one moves meanwhile: of the kernel's rows only theirs are written."""
    lab.etcd.put_config(config(backend))
    alpha = lab.add_host("alpha")
    steady, moved, gone = make_peers(lab.etcd, 3)
    change_peers(lab.etcd, backend, put=[steady, moved, gone])
    daemon = alpha.start_daemon(OBSERVED, strace=STRACE)
    daemon.wait_ready()
    wait_in_order(alpha, backend)
    before = actual(alpha, backend)
    number = {hop["gateway"]: hop["id"] for hop in alpha.ip("nexthop", "show")}
    lines = len(daemon.log_lines())

    name = f"etcd compacted past a daemon that was {away.__name__.replace('_', ' ')}"
    with fault(name, backend, expected="only what changed is written", check=None) as row:
        with away(lab, daemon):
            moved_to = replace(moved, mac="02:00:05:00:00:99", public="192.0.2.199")
            change_peers(lab.etcd, backend, gone=[gone])
            change_peers(lab.etcd, backend, put=[moved_to])
            lab.etcd.ctl("compact", str(revision(lab.etcd)))
            assert actual(alpha, backend) == before
        row.cured()
        row.recovered(alpha)
    assert any("compacted" in line["reason"] for line in events(daemon, "registry_relist"))
    assert len(daemon.log_lines()) - lines < MOST_LOG_LINES

    assert daemon.terminate() == 0
    written = kernel_writes(daemon.trace).lines
    if backend == "udp":  # it is all behind one route
        assert not any(line.startswith("del") for line in written)
        return
    if backend == "vxlan":
        expected = [f"set neigh {moved.base}", f"set fdb {moved_to.mac}", f"del fdb {moved.mac}"]
        expected += [f"del neigh {gone.base}", f"del fdb {gone.mac}", f"del nexthop {number[gone.base]}"]
    else:
        expected = [f"set nexthop {moved_to.public}", f"set route {moved.subnet}"]
        expected += [f"del nexthop {number[peer.public]}" for peer in (moved, gone)]
    assert Counter(written[-len(expected) - 1 :]) == Counter([*expected, f"del route {gone.subnet}"])
    assert not any(line.startswith("del") for line in written[: -len(expected) - 1])


# --- garbage --------------------------------------------------------------------------------------


def put_raw(etcd: EtcdServer, key: str, text: str) -> None:
    etcd.ctl("put", f"{etcd.prefix}/subnets/{key}", text=text)


@pytest.mark.parametrize("backend", BACKENDS)
def test_garbage_takes_no_peer_away(lab: Lab, backend: str) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta")
    good, other = make_peers(lab.etcd, 2)
    change_peers(lab.etcd, backend, put=[good, other])
    wait_in_order(alpha, backend)
    rows = actual(alpha, backend)
    ops = wait_status(alpha.daemon, "all peers", lambda s: s["peers"]["count"] == 3)["drift"]["ops"]
    ping = start_pings(alpha, beta)

    garbage = {"10.5.250.0-24": "no JSON", "junk": json.dumps(other.record(backend)), good.key: "\x01{"}
    for key, text in garbage.items():
        put_raw(lab.etcd, key, text)
    status = wait_status(alpha.daemon, "the garbage", lambda s: len(s["peers"]["bad"]) == len(garbage))
    bad = status["peers"]["bad"]
    assert bad.keys() == garbage.keys()
    assert status["peers"]["count"] == 3
    assert (status["state"], status["drift"]["ops"]) == ("in sync", ops)
    assert actual(alpha, backend) == rows
    told = events(alpha.daemon, "bad_record")
    assert [(line["key"], line["reason"], line["kept"]) for line in told] == [
        (key, bad[key], key == good.key) for key in garbage
    ]

    assert ping.stop().lost == ()
    better = replace(good, public="192.0.2.199")
    change_peers(lab.etcd, backend, put=[better])
    for key in ("10.5.250.0-24", "junk"):
        lab.etcd.ctl("del", f"{lab.etcd.prefix}/subnets/{key}")
    wait_in_order(alpha, backend)
    wait_status(alpha.daemon, "no bad record", lambda s: not s["peers"]["bad"])


def test_much_garbage_does_not_fill_the_log(lab: Lab) -> None:
    alpha, _ = overlay(lab, "vxlan", "alpha", "beta")
    for hundred in range(3):
        puts = (f"put {lab.etcd.prefix}/subnets/junk-{hundred}-{number} x" for number in range(100))
        lab.etcd.ctl("txn", text="\n" + "\n".join(puts) + "\n\n\n")

    def told() -> tuple[int, list[int]]:
        wait_status(alpha.daemon, "the garbage", lambda s: s["peers"]["bad_count"] == 300)
        lines = events(alpha.daemon, "bad_records")
        return len(events(alpha.daemon, "bad_record")), [line["count"] for line in lines]

    assert told() == (100, [100]), "the rest follows after a while"
    alpha.daemon.kill()
    alpha.start_daemon().wait_ready()
    assert told() == (100, [200])


@pytest.mark.parametrize("backend", BACKENDS)
def test_garbage_over_our_own_record_is_put_right(lab: Lab, backend: str) -> None:
    """Else no host that starts from now on could read it."""
    alpha, beta = overlay(lab, backend, "alpha", "beta")
    before = stored(lab.etcd, own_key(beta))
    assert before is not None
    ping = start_pings(alpha, beta)
    put_raw(lab.etcd, before.key, "garbage")
    after = wait_for(
        lambda: stored(lab.etcd, before.key), 5, "the record", lambda kv: kv and kv.text == before.text
    )
    assert after is not None
    assert (after.lease, after.version) == (before.lease, before.version + 2)
    wait_status(beta.daemon, "the lease", lambda s: s["lease"]["state"] == "held")
    assert ping.stop().lost == ()
    for host in (alpha, beta):
        assert differences(host, backend) == []


def test_garbage_over_our_record_while_the_daemon_was_down_is_put_right(lab: Lab) -> None:
    """The others keep the peer that they could read, and would take it for another one elsewhere."""
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    before = stored(lab.etcd, own_key(beta))
    assert before is not None
    ping = start_pings(alpha, beta)
    beta.daemon.kill()
    put_raw(lab.etcd, before.key, "garbage")
    wait_status(alpha.daemon, "the garbage", lambda s: s["peers"]["bad_count"] == 1)
    beta.start_daemon().wait_ready()
    after = stored(lab.etcd, before.key)
    assert after is not None
    assert (after.text, after.lease) == (before.text, before.lease)
    wait_held(beta.daemon, before.key)
    for host in (alpha, beta):
        wait_in_order(host, "vxlan")
    assert ping.stop().lost == ()


def test_what_cannot_be_read_at_our_key_and_somebody_keeps_alive_is_left_alone(lab: Lab) -> None:
    """It may be the record of somebody whose language we do not speak."""
    _, beta = overlay(lab, "vxlan", "alpha", "beta")
    key = own_key(beta)
    wait_kept(beta, set(lab.etcd.leases()))
    beta.daemon.kill()
    lease = lab.etcd.grant(600)
    lab.etcd.ctl("put", f"--lease={lease}", f"{lab.etcd.prefix}/subnets/{key}", "--", "garbage")
    standing = stored(lab.etcd, key)
    beta.start_daemon()
    status = wait_status(beta.daemon, "another lease", lambda s: s["lease"]["state"] == "held")
    assert status["lease"]["key"] not in (None, key)
    assert stored(lab.etcd, key) == standing
    assert status["peers"]["bad"].keys() == {key}
