"""Many peers vanish at once: mostly somebody or something wiped the registry, and the hosts live on."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.faults.product import on_vxlan
from tests.netns.faults.surfaces import OBSERVED
from tests.netns.kernel_writes import STRACE, kernel_writes
from tests.netns.observing import events, start_pings, wait_answers, wait_status
from tests.netns.offline import kept, kept_roles
from tests.netns.oracle import actual, own_key, wait_in_order
from tests.netns.peers import change_peers, make_peers
from tests.netns.scenes import BACKENDS, config, overlay

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flanneld_py.lab import Host, Lab
    from tests.netns.faults.rows import Matrix
    from tests.netns.peers import Peer

USUAL_STAY = 3.0
"""Seconds after which a peer that was deleted alone has certainly left the kernel."""
GRACE = 8.0
"""For tests that wait for its end."""
COUNT = 8


def with_ghosts(lab: Lab, backend: str, *flags: str) -> tuple[Host, list[Peer]]:
    """A host with COUNT peers that exist in etcd only, all in its memory for the next run."""
    lab.etcd.put_config(config(backend))
    ghosts = make_peers(lab.etcd, COUNT)
    change_peers(lab.etcd, backend, put=ghosts)
    alpha = lab.add_host("alpha")
    alpha.start_daemon(flags).wait_ready()
    wait_in_order(alpha, backend)
    wait_for(partial(remembered, alpha), 5, "the peers in a file", lambda seen: len(seen) == COUNT)
    return alpha, ghosts


def remembered(host: Host) -> set[str]:
    """Keys of the peers in what it keeps for a start without etcd."""
    return {key for key, role in kept_roles(host).items() if role in ("peer", "held")}


def rows_of(host: Host, backend: str, peers: Iterable[Peer]) -> dict[str, str]:
    """Routes of these peers' subnets, with where they lead."""
    subnets = {peer.subnet for peer in peers}
    return {what: how for what, how in actual(host, backend).items() if what.split()[-1] in subnets}


def wait_gone(host: Host, backend: str, peers: Iterable[Peer], timeout: float) -> None:
    wait_for(lambda: rows_of(host, backend, peers), timeout, "them to be gone", lambda seen: not seen)


@on_vxlan
@pytest.mark.parametrize("one_by_one", [False, True], ids=["at once", "one by one"])
def test_all_records_are_deleted(lab: Lab, backend: str, one_by_one: bool, fault: Matrix) -> None:
    hosts = overlay(lab, backend, "alpha", "beta", "gamma", flags=OBSERVED)
    alpha, beta, _ = hosts
    ghosts = make_peers(lab.etcd, 5)
    change_peers(lab.etcd, backend, put=ghosts)
    for host in hosts:
        wait_in_order(host, backend)
    leases = lab.etcd.leases()
    rows = {host: actual(host, backend) for host in hosts}
    ops = {host: host.daemon.status()["drift"]["ops"] for host in hosts}
    name = f"all records deleted {'key by key' if one_by_one else 'in one batch'}"
    with fault(name, backend, expected="all peers stay; each host claims again", check=None) as row:
        row.stands(*hosts)
        for ghost in ghosts:
            if one_by_one:
                lab.etcd.ctl("del", f"{lab.etcd.prefix}/subnets/{ghost.key}")
            del leases[ghost.key]
        for host in hosts if one_by_one else ():
            lab.etcd.ctl("del", f"{lab.etcd.prefix}/subnets/{own_key(host)}")
        if not one_by_one:
            lab.etcd.ctl("del", "--prefix", f"{lab.etcd.prefix}/subnets/")
        deleted = time.monotonic()
        row.cured()
        wait_for(lab.etcd.leases, 5, "every host to be back", lambda seen: seen == leases)
        row.recovered(*hosts, kernel=False)
    ping = start_pings(alpha, beta)
    (one_more,) = make_peers(lab.etcd, 1)
    while time.monotonic() < deleted + USUAL_STAY:
        wait_answers(ping)
    change_peers(lab.etcd, backend, put=[replace(one_more, public="192.0.2.199")])
    moves = {
        "vxlan": {f"fdb {one_more.mac}"},
        "host-gw": {f"route {one_more.subnet}", f"nexthop {one_more.public}"},
        "udp": {f"packets to {one_more.subnet}"},
    }
    for host in hosts:
        wait_for(partial(actual, host, backend), 5, "a pass", lambda rows: "192.0.2.199" in str(rows))
        kept = {what: how for what, how in actual(host, backend).items() if what in rows[host]}
        changed = {what for what, how in rows[host].items() if kept.get(what) != how}
        assert changed <= moves[backend], "a ghost whose subnet nobody has claimed is gone"
        if backend != "host-gw":  # there an address that changes is another nexthop
            assert host.daemon.status()["drift"]["ops"]["del"] == ops[host]["del"]
    assert ping.stop().lost == ()


@pytest.mark.parametrize(("flag", "shortest", "longest"), [("0", 0.0, USUAL_STAY), ("5s", 4.5, 8.0)])
def test_the_grace_is_a_flag(lab: Lab, flag: str, shortest: float, longest: float) -> None:
    alpha, ghosts = with_ghosts(lab, "host-gw", f"--registry-wipe-grace={flag}")
    change_peers(lab.etcd, "host-gw", gone=ghosts)
    deleted = time.monotonic()
    wait_gone(alpha, "host-gw", ghosts, longest)
    assert time.monotonic() - deleted >= shortest
    assert bool(events(alpha.daemon, "wipe_hold")) == (shortest > 0)
    assert bool(events(alpha.daemon, "wipe_hold_over")) == (shortest > 0)


def test_three_at_once_are_no_wipe(lab: Lab) -> None:
    alpha, ghosts = with_ghosts(lab, "host-gw")
    change_peers(lab.etcd, "host-gw", gone=ghosts[:3])
    wait_gone(alpha, "host-gw", ghosts[:3], USUAL_STAY)
    wait_in_order(alpha, "host-gw")
    assert events(alpha.daemon, "wipe_hold") == []


def test_reservations_and_bad_records_that_go_are_no_wipe(lab: Lab) -> None:
    """Only peers count: none of these was one."""
    (alpha,) = overlay(lab, "vxlan", "alpha")
    (ghost,) = make_peers(lab.etcd, 1)
    change_peers(lab.etcd, "vxlan", put=[ghost])
    for number in range(50, 56):
        text = json.dumps({"PublicIP": f"192.0.2.{number + 100}"}) if number < 53 else "garbage"
        lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/10.5.{number}.0-24", "--", text)
    wait_status(alpha.daemon, "them", lambda s: (s["peers"]["count"], s["peers"]["bad_count"]) == (1, 3))
    lab.etcd.ctl("del", "--prefix", f"{lab.etcd.prefix}/subnets/10.5.5")
    wait_status(alpha.daemon, "none", lambda s: s["peers"]["bad_count"] == 0)
    assert alpha.daemon.status()["peers"]["held"] == 0
    change_peers(lab.etcd, "vxlan", gone=[ghost])
    wait_gone(alpha, "vxlan", [ghost], USUAL_STAY)
    assert events(alpha.daemon, "wipe_hold") == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", ["wiped", "killed"])
def test_a_restart_does_not_end_the_hold(lab: Lab, backend: str, first: str) -> None:
    """Nor does it miss a wipe that came while no daemon ran; who returns or is replaced is no longer held."""
    alpha, ghosts = with_ghosts(lab, backend)
    rows = actual(alpha, backend)
    if first == "wiped":
        change_peers(lab.etcd, backend, gone=ghosts)
        wait_for(lambda: events(alpha.daemon, "wipe_hold"), 5, "the hold")
        alpha.daemon.kill()
    else:
        alpha.daemon.kill()
        change_peers(lab.etcd, backend, gone=ghosts)
    daemon = alpha.start_daemon([f"--registry-wipe-grace={GRACE:g}s"], strace=STRACE)
    daemon.wait_ready()
    started = time.monotonic()
    status = wait_status(daemon, "a pass", lambda s: s["state"] == "in sync")
    assert (status["peers"]["count"], status["peers"]["held"]) == (COUNT, COUNT)
    assert actual(alpha, backend) == rows
    assert kernel_writes(daemon.trace).lines == []
    assert [line["peers"] for line in events(daemon, "wipe_hold")] == [COUNT]

    back, moved, taken, *rest = ghosts
    elsewhere = make_peers(lab.etcd, COUNT + 2)[-1]
    moved_to = replace(moved, subnet=elsewhere.subnet)
    owner = replace(taken, public="192.0.2.198", mac="02:00:05:00:00:98")
    change_peers(lab.etcd, backend, put=[back, moved_to, owner])
    wait_gone(alpha, backend, [moved], USUAL_STAY)
    assert rows_of(alpha, backend, [back]) == {
        what: how for what, how in rows.items() if what.split()[-1] == back.subnet
    }
    held = rows_of(alpha, backend, rest)
    assert time.monotonic() - started < GRACE, "too late to show anything"
    assert held == {what: how for what, how in rows.items() if what in held}
    assert len(held) == len(rest)
    wait_gone(alpha, backend, rest, GRACE + 2)
    wait_in_order(alpha, backend)
    assert time.monotonic() - started > GRACE - 1


def test_a_few_that_left_while_no_daemon_ran_go_at_once(lab: Lab) -> None:
    alpha, ghosts = with_ghosts(lab, "host-gw")
    alpha.daemon.kill()
    change_peers(lab.etcd, "host-gw", gone=ghosts[:3])
    daemon = alpha.start_daemon()
    daemon.wait_ready()
    wait_in_order(alpha, "host-gw")
    assert events(daemon, "wipe_hold") == []
    wait_for(lambda: events(daemon, "reconciled"), 2, "a pass")
    assert len(events(daemon, "reconciled")) == 1, "they stayed for a moment first"


@pytest.mark.parametrize("text", ["", "garbage", "{}"])
def test_a_damaged_memory_holds_nobody_and_stops_nobody(lab: Lab, text: str) -> None:
    alpha, ghosts = with_ghosts(lab, "host-gw")
    alpha.daemon.kill()
    kept(alpha).write_text(text)
    change_peers(lab.etcd, "host-gw", gone=ghosts)
    daemon = alpha.start_daemon()
    daemon.wait_ready()
    wait_in_order(alpha, "host-gw")


def test_the_memory_is_written_when_the_daemon_stops(lab: Lab) -> None:
    alpha, ghosts = with_ghosts(lab, "host-gw")
    (one_more,) = make_peers(lab.etcd, 1)
    change_peers(lab.etcd, "host-gw", put=[one_more])
    wait_in_order(alpha, "host-gw")
    assert alpha.daemon.terminate() == 0
    assert remembered(alpha) == {peer.key for peer in (*ghosts, one_more)}
