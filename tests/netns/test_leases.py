"""Every host gets a subnet of its own and keeps it, whatever happens to its key in etcd."""

from __future__ import annotations

import json
import time
from ipaddress import ip_network
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import Daemon, wait_for
from tests.netns.faults.surfaces import OBSERVED
from tests.netns.observing import events, start_pings, wait_answers, wait_held, wait_status
from tests.netns.oracle import differences, own_key, subnet_of, wait_in_order
from tests.netns.peers import Peer, change_peers, make_peers
from tests.netns.registry_history import Stored, history, record_at, revision, stored
from tests.netns.scenes import BACKENDS, config, overlay

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.lab import Host, Lab
    from tests.netns.faults.rows import Matrix

COUNT = 20
"""Hosts, and subnets to give away."""
CLAIMED_WITHIN = 2.0
DAY = 86_400


def scarce(count: int) -> dict[str, Any]:
    """A config with exactly this many subnets, 10.5.1.0/24 to 10.5.<count>.0/24."""
    return config("vxlan", SubnetMin="10.5.1.0", SubnetMax=f"10.5.{count}.0")


# --- allocation -----------------------------------------------------------------------------------


def test_as_many_hosts_at_once_as_there_are_subnets(lab: Lab) -> None:
    since = revision(lab.etcd) + 1
    lab.etcd.put_config(scarce(COUNT))
    hosts = lab.add_hosts(*(f"host-{n}" for n in range(1, COUNT + 1)))
    daemons = [host.start_daemon() for host in hosts]
    for daemon in daemons:
        daemon.wait_ready(60)

    leases = lab.etcd.leases()
    assert leases.keys() == {f"10.5.{n}.0-24" for n in range(1, COUNT + 1)}
    assert {record["PublicIP"] for record in leases.values()} == {host.address for host in hosts}
    assert len({record["BackendData"]["VtepMAC"] for record in leases.values()}) == COUNT
    for host in hosts:
        network = ip_network(subnet_of(own_key(host)))
        assert host.subnet_env()["FLANNEL_SUBNET"] == f"{network[1]}/24"
    assert_written_once(history(lab.etcd, since))
    for host in hosts:
        wait_in_order(host, "vxlan")


def assert_written_once(events: list[Stored]) -> None:
    """Nobody wrote, moved, or deleted what somebody holds."""
    assert len(events) == COUNT
    assert all(event.version == 1 and event.lease for event in events), events
    assert len({event.lease for event in events}) == COUNT
    owners = [(ip_network(subnet_of(event.key)), event.record["NodeID"]) for event in events]
    assert len({owner for _, owner in owners}) == COUNT
    assert not any(one.overlaps(other) for (one, _), (other, _) in combinations(owners, 2))


def test_without_a_free_subnet_it_waits_and_gets_the_first_that_is_released(lab: Lab) -> None:
    lab.etcd.put_config(scarce(COUNT))
    peers = [
        Peer(f"10.5.{n}.0/24", f"192.0.2.{100 + n}", f"02:00:05:00:00:{n:02x}") for n in range(1, COUNT + 1)
    ]
    change_peers(lab.etcd, "vxlan", put=peers)
    daemon = lab.add_host("late").start_daemon()
    status = wait_status(daemon, "the lease to be waited for", lambda s: s["lease"]["state"] == "waiting", 10)
    for part in (
        f"10.5.0.0/16 gives {COUNT} subnets of /24",
        f"10.5.1.0 to 10.5.{COUNT}.0",
        f"{COUNT} leases",
    ):
        assert part in status["lease"]["reason"]
    assert (status["state"], status["ready"], status["subnets"]) == ("waiting", False, [])
    assert status["problems"][0]["code"] == "lease-waiting"
    assert "flannelctl leases" in status["problems"][0]["fix"]
    assert daemon.ready_after() is None
    assert not daemon.host.subnet_file.exists()

    released = peers[6]
    begun = time.monotonic()
    change_peers(lab.etcd, "vxlan", gone=[released])
    wait_held(daemon, released.key)
    assert time.monotonic() - begun < CLAIMED_WITHIN
    daemon.wait_ready()
    wait_in_order(daemon.host, "vxlan")
    assert len(events(daemon, "lease_waiting")) == 1


# --- loss -----------------------------------------------------------------------------------------


def delete_key(host: Host) -> None:
    host.etcd.ctl("del", f"{host.prefix}/subnets/{own_key(host)}")


def revoke_lease(host: Host) -> None:
    host.etcd.ctl("lease", "revoke", host.daemon.status()["lease"]["etcd_lease"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lose", [delete_key, revoke_lease])
def test_a_lost_lease_is_claimed_again_without_a_lost_ping(
    lab: Lab, backend: str, lose: Callable[[Host], None], fault: Matrix
) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=OBSERVED)
    before = stored(lab.etcd, own_key(alpha))
    assert before is not None
    ops = beta.daemon.status()["drift"]["ops"]
    name = "key deleted" if lose is delete_key else "etcd lease revoked"
    with fault(name, backend, expected="the same subnet is claimed again", check=None) as row:
        row.stands(alpha, beta)
        lose(alpha)
        row.cured()
        after = wait_for(
            lambda: stored(lab.etcd, before.key),
            CLAIMED_WITHIN,
            "the same key",
            lambda kv: kv and kv.created > before.created,
        )
        row.recovered(alpha, beta)
    assert after is not None
    assert after.text == before.text
    # An etcd lease that has lost its key only is used again: it would stand about for a day.
    assert after.lease != 0
    assert (after.lease == before.lease) is (lose is delete_key)
    wait_for(
        lambda: alpha.daemon.status()["lease"]["etcd_lease"],
        5,
        "the lease",
        lambda lease: lease == f"{after.lease:x}",
    )
    for host in (alpha, beta):
        assert differences(host, backend) == []
    assert beta.daemon.status()["drift"]["ops"] == ops, "the peer never left the kernel"
    assert len(events(alpha.daemon, "lease_lost")) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_peer_that_does_not_come_back_is_removed(lab: Lab, backend: str) -> None:
    (alpha,) = overlay(lab, backend, "alpha")
    (peer,) = make_peers(lab.etcd, 1)
    change_peers(lab.etcd, backend, put=[peer])
    wait_in_order(alpha, backend)
    change_peers(lab.etcd, backend, gone=[peer])
    wait_in_order(alpha, backend)


# --- another node in our place --------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_node_with_our_address_is_a_conflict_and_nothing_is_lost(lab: Lab, backend: str) -> None:
    """A cloned machine, or an address given twice: a person has to decide."""
    alpha, beta = overlay(lab, backend, "alpha", "beta")
    key, since = own_key(alpha), revision(lab.etcd) + 1
    before = lab.etcd.leases()[key]
    ping = start_pings(alpha, beta)
    lab.etcd.ctl(
        "put", f"{lab.etcd.prefix}/subnets/{key}", "--", json.dumps(before | {"NodeID": "another-node"})
    )
    status = wait_status(alpha.daemon, "a conflict", lambda s: s["lease"]["state"] == "conflict")
    for part in (alpha.address, "another-node", key):
        assert part in status["lease"]["reason"]
    assert "--public-ip" in status["problems"][0]["fix"]
    assert status["subnets"] == [subnet_of(key)], "the data plane stays"
    wait_answers(ping)
    assert ping.stop().lost == ()
    assert [event.record["NodeID"] for event in history(lab.etcd, since)] == ["another-node"]

    lab.etcd.ctl("del", f"{lab.etcd.prefix}/subnets/{key}")
    wait_held(alpha.daemon, key)
    for host in (alpha, beta):
        wait_in_order(host, backend)


# --- renewal --------------------------------------------------------------------------------------


def time_left(lab: Lab, lease: int) -> int:
    """Seconds; -1 when it has ended."""
    ttl: int = lab.etcd.ctl_json("lease", "timetolive", f"{lease:x}")["ttl"]
    return ttl


def test_a_restart_renews_the_lease_and_writes_nothing(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    before = stored(lab.etcd, own_key(alpha))
    assert before is not None
    for end in (Daemon.kill, Daemon.terminate):
        left = wait_for(lambda: time_left(lab, before.lease), 5, "time to pass", lambda left: left < DAY - 1)
        end(alpha.daemon)
        alpha.start_daemon().wait_ready()
        wait_held(alpha.daemon, before.key)
        assert time_left(lab, before.lease) > left
        assert stored(lab.etcd, before.key) == before


# --- from Go flannel, and to IPv6 -----------------------------------------------------------------


def test_migration_keeps_subnet_etcd_lease_and_value(lab: Lab) -> None:
    """Go flannel was stopped on this host: its record and its subnet.env are there."""
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    gos = Peer("10.5.40.0/24", alpha.address, "02:00:05:00:00:40")
    change_peers(lab.etcd, "vxlan", put=[gos])
    alpha.subnet_file.write_text(
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.40.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    )
    before = stored(lab.etcd, gos.key)
    assert before is not None
    lab.etcd.put_config(config("vxlan", SubnetMin="10.5.1.0"))
    alpha.start_daemon().wait_ready()
    wait_held(alpha.daemon, gos.key)
    after = stored(lab.etcd, gos.key)
    assert after is not None
    assert (after.lease, after.created, after.version) == (before.lease, before.created, 2)
    assert after.record == before.record | {"NodeID": alpha.node_id}
    assert alpha.subnet_env()["FLANNEL_SUBNET"] == "10.5.40.1/24"
    wait_in_order(alpha, "vxlan")


def test_s17_with_ipv6_switched_on_the_ipv4_subnet_stays(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    change_peers(lab.etcd, "vxlan", put=make_peers(lab.etcd, 3))
    before = stored(lab.etcd, own_key(alpha))
    assert before is not None
    alpha.daemon.terminate()
    lab.etcd.put_config(config("vxlan", EnableIPv6=True, IPv6Network="fd00:5::/48"))
    since = revision(lab.etcd) + 1
    alpha.start_daemon().wait_ready()
    status = wait_status(alpha.daemon, "two subnets", lambda s: len(s["subnets"]) == 2)
    assert status["subnets"][0] == subnet_of(before.key)
    moved, claimed = history(lab.etcd, since)
    assert moved.revision == claimed.revision, "in one step: nobody can come between"
    assert {event.key for event in (moved, claimed)} == {before.key, own_key(alpha)}
    after = stored(lab.etcd, own_key(alpha))
    assert after is not None
    assert after.lease == before.lease
    assert after.record["PublicIPv6"] == alpha.address6


def shorten_lease(host: Host, seconds: int) -> Stored:
    """Put the host's record under another etcd lease; what then stands."""
    key = own_key(host)
    before = stored(host.etcd, key)
    assert before is not None
    assert before.text is not None
    lease = host.etcd.grant(seconds)
    host.etcd.ctl("put", f"--lease={lease}", f"{host.prefix}/subnets/{key}", "--", before.text)
    after = stored(host.etcd, key)
    assert after is not None
    wait_status(host.daemon, "the short lease", lambda s: s["lease"]["etcd_lease"] == lease)
    return after


def test_the_lease_is_renewed_in_time_without_a_write(lab: Lab) -> None:
    """An etcd lease of 3 s must be renewed every second."""
    (alpha,) = overlay(lab, "vxlan", "alpha")
    short = shorten_lease(alpha, 3)
    before = lab.etcd.requests()
    time.sleep(5)  # nothing is to happen: it is neither written nor lost
    assert stored(lab.etcd, short.key) == short
    requests = lab.etcd.requests() - before
    assert 4 <= requests.pop("Lease/LeaseKeepAlive") <= 8
    requests.pop("KV/Range")  # ours
    requests.pop("Watch/Watch", None)  # a progress request is one
    assert not requests
    assert alpha.daemon.status()["lease"] == {
        "state": "held", "key": short.key, "ttl": 3, "etcd_lease": f"{short.lease:x}", "reason": None
    }  # fmt: skip


def test_a_lease_that_ran_out_while_etcd_was_away(lab: Lab) -> None:
    """It is said, the data plane stays, and the same subnet is held again."""
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    key = shorten_lease(alpha, 2).key
    ping = start_pings(alpha, beta)
    lab.etcd.stop()
    status = wait_status(alpha.daemon, "the loss of the lease", lambda s: s["lease"]["state"] == "lost")
    assert f"lease {key} was not renewed for 2 s" in status["lease"]["reason"]
    assert (status["subnets"], status["state"], status["ready"]) == ([subnet_of(key)], "degraded", False)
    lab.etcd.start()
    wait_held(alpha.daemon, key)
    for host in (alpha, beta):
        wait_in_order(host, "vxlan")
    assert ping.stop().lost == ()


def test_garbage_over_the_key_of_a_successor_is_not_put_right_by_the_one_before(lab: Lab) -> None:
    """It was away for longer than its lease, and another host has its subnet by now."""
    lab.etcd.put_config(scarce(1))
    alpha, beta = lab.add_hosts("alpha", "beta")
    alpha.start_daemon().wait_ready()
    key = own_key(alpha)
    alpha.daemon.terminate()
    lab.etcd.ctl("lease", "revoke", f"{record_at(lab.etcd, key).lease:x}")
    beta.start_daemon().wait_ready()
    assert own_key(beta) == key
    beta.daemon.terminate()
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/{key}", "--", "garbage")
    alpha.start_daemon()
    wait_status(alpha.daemon, "it to find no subnet", lambda s: s["lease"]["state"] == "waiting")
    assert record_at(lab.etcd, key).text == "garbage"
    beta.start_daemon().wait_ready()
    wait_for(lambda: record_at(lab.etcd, key).text != "garbage", 5, "its record to be put right")
    assert own_key(beta) == key
