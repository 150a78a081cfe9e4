"""Reservations: subnets that are a host's for ever, made with flannelctl or by taking away the etcd lease."""

from __future__ import annotations

import json
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import Daemon, wait_for
from tests.netns.observing import wait_held, wait_status
from tests.netns.oracle import own_key, wait_in_order
from tests.netns.peers import Peer, change_peers
from tests.netns.registry_history import history, record_at, revision, stored
from tests.netns.scenes import BACKENDS, config, overlay
from tests.netns.test_ctl import Said, flannelctl

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

SUBNET, KEY = "10.5.20.0/24", "10.5.20.0-24"
TTL = 5
"""Seconds, the least there is."""


def reserve(host: Host, *args: str) -> Said:
    return flannelctl(host, "leases", "reserve", *args)


def release(host: Host, *args: str) -> Said:
    return flannelctl(host, "leases", "release", *args)


# --- kept for ever --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_subnet_over_ten_restarts_and_longer_than_a_lease_lives(lab: Lab, backend: str) -> None:
    lab.etcd.put_config(config(backend))
    alpha, beta = lab.add_hosts("alpha", "beta")
    said = reserve(alpha, SUBNET, f"--public-ip={alpha.address}")
    assert said.code == 0, said
    assert f"{KEY} is reserved for {alpha.address}" in said.out
    for host in (beta, alpha):
        host.start_daemon([f"--subnet-lease-ttl={TTL}s"]).wait_ready()
    wait_held(alpha.daemon, KEY)
    assert alpha.daemon.status()["lease"]["ttl"] == 0
    taken = record_at(lab.etcd, KEY)
    assert (taken.lease, taken.record["NodeID"]) == (0, alpha.node_id)
    wait_in_order(beta, backend)

    for number in range(10):
        (Daemon.kill if number % 2 else Daemon.terminate)(alpha.daemon)
        alpha.start_daemon([f"--subnet-lease-ttl={TTL}s"]).wait_ready()
        wait_held(alpha.daemon, KEY)
        assert record_at(lab.etcd, KEY) == taken, "nothing changed, nothing written"
    alpha.daemon.kill()
    # A lease of the same length that nobody renews, granted now, tells when it would have ended.
    canary = lab.etcd.grant(TTL)
    wait_for(
        lambda: lab.etcd.ctl_json("lease", "timetolive", canary)["ttl"],
        3 * TTL,
        "a lease to end",
        lambda left: left == -1,
    )
    assert record_at(lab.etcd, KEY) == taken
    alpha.start_daemon([f"--subnet-lease-ttl={TTL}s"]).wait_ready()
    wait_held(alpha.daemon, KEY)
    assert record_at(lab.etcd, KEY) == taken
    for host in (alpha, beta):
        wait_in_order(host, backend)


def test_it_stays_one_through_a_new_mac_garbage_and_another_address(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    assert reserve(alpha, SUBNET, f"--public-ip={alpha.address}").code == 0
    alpha.start_daemon().wait_ready()
    taken = record_at(lab.etcd, KEY)
    path = f"{lab.etcd.prefix}/subnets/{KEY}"

    lab.etcd.ctl("put", path, "garbage")
    restored = wait_for(
        lambda: record_at(lab.etcd, KEY), 10, "the record to be restored", lambda kv: kv.text == taken.text
    )
    assert restored.lease == 0

    # A MAC that beta has too, and had first, is given up.
    beta.start_daemon().wait_ready()
    theirs = record_at(lab.etcd, own_key(beta))
    alpha.daemon.terminate()
    changed = json.loads(taken.text or "")
    changed["BackendData"]["VtepMAC"] = theirs.record["BackendData"]["VtepMAC"]
    lab.etcd.ctl("put", path, json.dumps(changed))
    alpha.start_daemon().wait_ready()
    other = wait_for(
        lambda: record_at(lab.etcd, KEY),
        10,
        "another MAC",
        lambda kv: kv.record["BackendData"]["VtepMAC"] != theirs.record["BackendData"]["VtepMAC"],
    )
    assert other.lease == 0

    alpha.daemon.terminate()
    alpha.ip_batch(["address add 192.0.2.211/24 dev eth0"])
    alpha.start_daemon(["--public-ip=192.0.2.211"]).wait_ready()
    moved = wait_for(
        lambda: record_at(lab.etcd, KEY),
        10,
        "the new address",
        lambda kv: kv.record["PublicIP"] == "192.0.2.211",
    )
    assert moved.lease == 0
    assert alpha.daemon.status()["subnets"] == [SUBNET]


def test_a_live_record_becomes_a_reservation_and_its_value_stays(lab: Lab) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    before = record_at(lab.etcd, own_key(alpha))
    ops = beta.daemon.status()["drift"]["ops"]
    said = reserve(beta, before.key.replace("-", "/"), f"--public-ip={alpha.address}")
    assert said.code == 0, said
    after = record_at(lab.etcd, before.key)
    assert (after.lease, after.text, after.created) == (0, before.text, before.created)
    wait_status(alpha.daemon, "no end", lambda s: (s["lease"]["state"], s["lease"]["ttl"]) == ("held", 0))
    assert lab.etcd.ctl_json("lease", "timetolive", f"{before.lease:x}")["ttl"] == -1, "it would hang about"
    again = reserve(beta, before.key)
    assert (again.code, "a reservation already" in again.out) == (0, True)
    alpha.daemon.kill()
    alpha.start_daemon().wait_ready()
    assert record_at(lab.etcd, before.key) == after
    wait_in_order(beta, "vxlan")
    assert beta.daemon.status()["drift"]["ops"] == ops


def test_a_host_that_holds_a_lease_keeps_that_and_a_vacant_subnet_is_no_problem(lab: Lab) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    key = own_key(alpha)
    alpha.daemon.terminate()
    # Whoever is known under no address yet: by its node id.
    said = reserve(alpha, SUBNET, "--public-ip=192.0.2.200", f"--node-id={alpha.node_id}")
    assert said.code == 0, said
    alpha.start_daemon().wait_ready()
    wait_held(alpha.daemon, key)
    for host in (alpha, beta):
        wait_status(host.daemon, "no problem", lambda s: s["state"] == "in sync" and not s["problems"])
        wait_in_order_without(host, KEY)
    gamma = lab.add_host("gamma")
    gamma.start_daemon().wait_ready()
    assert own_key(gamma) != KEY

    # With its lease gone it takes what waits for it, and the address becomes its own.
    alpha.daemon.terminate()
    lab.etcd.ctl("del", f"{lab.etcd.prefix}/subnets/{key}")
    alpha.start_daemon().wait_ready()
    wait_held(alpha.daemon, KEY)
    assert record_at(lab.etcd, KEY).record["PublicIP"] == alpha.address


def wait_in_order_without(host: Host, key: str) -> None:
    """No row for a reservation that nobody has taken."""
    subnet = key.replace("-", "/")
    assert not any(route["dst"] == subnet for route in host.ip("route", "show"))


def test_a_dual_stack_reservation(lab: Lab) -> None:
    dual = {"EnableIPv6": True, "IPv6Network": "fd00:5::/48"}
    lab.etcd.put_config(config("vxlan", **dual))
    alpha = lab.add_host("alpha")
    both = ("fd00:5:0:20::/64", f"--public-ip={alpha.address}", f"--public-ipv6={alpha.address6}")
    assert reserve(alpha, SUBNET, f"--public-ip={alpha.address}").code == 1
    assert reserve(alpha, SUBNET, *both).code == 0
    alpha.start_daemon().wait_ready()
    wait_held(alpha.daemon, f"{KEY}&fd00:5:0:20::-64")
    assert record_at(lab.etcd, f"{KEY}&fd00:5:0:20::-64").lease == 0


# --- refused --------------------------------------------------------------------------------------


def test_what_would_harm_somebody_is_refused_and_nothing_is_written(lab: Lab) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    key, others = own_key(alpha), own_key(beta)
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/10.5.30.0-24", "garbage")
    before = revision(lab.etcd)
    free = "--public-ip=192.0.2.200"
    cases: list[tuple[int, tuple[str, ...], str]] = [
        (1, ("10.6.1.0/24", free), "expected a subnet of the Network 10.5.0.0/16"),
        (1, ("10.5.20.0/25", free), "10.5.20.0/25: expected a /24"),
        (1, (SUBNET,), "--public-ip is missing"),
        (1, (SUBNET, "--public-ip=10.5.1.1"), "inside the Network"),
        (1, (SUBNET, "--public-ip=127.0.0.1"), "a loopback address"),
        (1, (SUBNET, f"--public-ip={beta.address}"), f"{beta.address} holds {others} already"),
        (1, ("10.5.30.0/24", free), "10.5.30.0-24, which cannot be read"),
        (1, (key, free), f"{key} is held by {alpha.address} (node id {alpha.node_id})"),
        (1, (key, f"--public-ip={alpha.address}", "--node-id=other"), f"{key} is held by"),
        (1, (SUBNET, "fd00:5:0:1::/64", free), "IPv6 is not enabled"),
        (2, ("10.5.20.1/24", free), "expected one such as 10.5.34.0/24"),
        (2, ("there", free), "expected one such as 10.5.34.0/24"),
        (2, (SUBNET, "10.5.21.0/24", free), "expected one IPv4 subnet"),
        (2, (SUBNET, "--public-ip=host"), "--public-ip 'host': expected an IPv4 address"),
        (2, (SUBNET, free, "--node-id=a b"), "--node-id 'a b'"),
    ]
    for code, args, part in cases:
        said = reserve(alpha, *args)
        assert (said.code, said.out) == (code, ""), (args, said)
        assert part in said.err, (args, said)
        assert said.err.count("\n") == 1
    change_peers(lab.etcd, "vxlan", put=[Peer("10.5.40.0/23", "192.0.2.140", "02:00:05:00:00:40")])
    said = reserve(alpha, "10.5.41.0/24", free)
    assert (said.code, "overlaps 10.5.40.0-23, which 192.0.2.140 holds" in said.err) == (1, True)
    assert [event.key for event in history(lab.etcd, before + 1)] == ["10.5.40.0-23"]


# --- release --------------------------------------------------------------------------------------


def test_release_of_a_reservation_and_of_what_is_not_there(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    assert reserve(alpha, SUBNET, "--public-ip=192.0.2.200").code == 0
    said = release(alpha, SUBNET)
    assert said.code == 0, said
    assert f"{KEY} of 192.0.2.200 released" in said.out
    assert stored(lab.etcd, KEY) is None
    said = release(alpha, SUBNET)
    assert (said.code, "nobody holds 10.5.20.0/24" in said.err) == (1, True)


def test_release_of_a_reservation_that_a_host_has_taken_is_refused_without_force(lab: Lab) -> None:
    """It does not show whether its host is alive."""
    lab.etcd.put_config(config("vxlan"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    assert reserve(alpha, SUBNET, f"--public-ip={beta.address}").code == 0
    beta.start_daemon().wait_ready()
    wait_held(beta.daemon, KEY)
    taken = record_at(lab.etcd, KEY)
    said = release(alpha, SUBNET)
    assert (said.code, record_at(lab.etcd, KEY)) == (1, taken)
    assert (
        f"{KEY} is reserved for {beta.address} (node id {beta.node_id}), a host that has taken it" in said.err
    )
    beta.daemon.terminate()
    assert release(alpha, SUBNET, "--force").code == 0
    assert stored(lab.etcd, KEY) is None


def test_release_of_a_record_that_cannot_be_read_needs_force(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/{KEY}", "garbage")
    wait_status(
        alpha.daemon, "the bad record", lambda s: [p["code"] for p in s["problems"]] == ["peers-left-out"]
    )
    assert flannelctl(alpha, "status").code == flannelctl(alpha, "leases").code == 1
    said = release(alpha, SUBNET)
    assert (said.code, stored(lab.etcd, KEY) is None) == (1, False)
    assert f"{KEY} cannot be read" in said.err
    assert "--force deletes it" in said.err
    assert release(alpha, SUBNET, "--force").code == 0
    assert stored(lab.etcd, KEY) is None
    wait_status(alpha.daemon, "no problem", lambda s: not s["problems"])


def test_what_took_our_subnet_can_be_released_from_here_as_the_status_says(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    key = own_key(alpha)
    thief = Peer(key.replace("-", "/"), "192.0.2.200", "02:00:05:00:00:99")
    change_peers(lab.etcd, "vxlan", put=[thief])
    told = wait_status(alpha.daemon, "the conflict", lambda s: s["lease"]["state"] == "conflict")
    fix = next(p["fix"] for p in told["problems"] if p["code"] == "lease-conflict")
    command = re.search(r"flannelctl (leases release \S+ --force)", fix)
    assert command is not None, fix
    said = flannelctl(alpha, *command[1].split())
    assert said.code == 0, said
    wait_held(alpha.daemon, key)
    assert record_at(lab.etcd, key).record["NodeID"] == alpha.node_id


def test_release_of_a_live_lease_is_refused_without_force(lab: Lab) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    before = record_at(lab.etcd, own_key(beta))
    said = release(alpha, before.key)
    assert said.code == 1
    assert f"{before.key} is held by {beta.address} (node id {beta.node_id}), who renewed it" in said.err
    assert record_at(lab.etcd, before.key) == before

    beta.daemon.kill()
    assert release(alpha, before.key).code == 1, "it may come back"
    said = release(alpha, before.key, "--force")
    assert said.code == 0, said
    assert stored(lab.etcd, before.key) is None
    assert lab.etcd.ctl_json("lease", "timetolive", f"{before.lease:x}")["ttl"] == -1


def test_release_of_a_lease_that_nobody_has_renewed_for_long(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    ours = Peer("10.5.50.0/24", "192.0.2.150", "02:00:05:00:00:50")
    lease = lab.etcd.grant(3600)
    text = json.dumps(ours.record("vxlan") | {"NodeID": "gone"})
    lab.etcd.ctl("put", f"--lease={lease}", f"{lab.etcd.prefix}/subnets/{ours.key}", "--", text)
    said = release(alpha, ours.subnet)
    assert said.code == 1, "just granted"
    waits = re.search(r"who renewed it \d+ s ago: .* in (\d+) min", said.err)
    assert waits is not None, said
    assert int(waits[1]) in (14, 15), "three renewals"


def test_this_hosts_own_is_refused_while_its_daemon_runs(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    key = own_key(alpha)
    for force in ((), ("--force",)):
        said = release(alpha, key, *force)
        assert said.code == 1
        assert f"{key} is this host's own, and its daemon (pid {alpha.daemon.pid}) runs" in said.err
    assert reserve(alpha, key).code == 0
    assert release(alpha, key).code == 1, "a reservation, too"
    alpha.daemon.terminate()
    assert release(alpha, key, "--force").code == 0
    assert stored(lab.etcd, key) is None


def test_this_hosts_own_is_refused_while_its_daemon_runs_and_does_not_answer(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    key = own_key(alpha)
    assert reserve(alpha, key).code == 0
    assert reserve(alpha, SUBNET, "--public-ip=192.0.2.200").code == 0
    wait_status(alpha.daemon, "the reservation", lambda s: s["lease"]["ttl"] == 0)
    alpha.daemon.send_signal(signal.SIGSTOP)
    try:
        said = release(alpha, key, "--force")
        assert said.code == 1, said
        assert f"{key} is this host's own, and its daemon (pid {alpha.daemon.pid}) runs, though" in said.err
        alpha.control_socket.unlink()
        assert release(alpha, key, "--force").code == 1
        assert release(alpha, SUBNET).code == 0, "another's"
        alpha.status_file.unlink()
        said = release(alpha, key, "--force")
        assert said.code == 1, said
        assert f"{key} may be this host's own, whose daemon runs and cannot be asked" in said.err
    finally:
        alpha.daemon.send_signal(signal.SIGCONT)
    assert stored(lab.etcd, key) is not None


def test_a_released_live_host_claims_its_subnet_anew(lab: Lab) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    before = record_at(lab.etcd, own_key(beta))
    assert release(alpha, before.key, "--force").code == 0
    after: Any = wait_for(lambda: stored(lab.etcd, before.key), 5, "the lease")
    assert (after.text, after.created > before.created) == (before.text, True)
