"""What flannel's own tests say of registry, leases, devices and routes, by number: T17 to T34."""

from __future__ import annotations

import json
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.drivers.etcd import EtcdRegistry, EtcdSettings
from flanneld_py.lab import wait_for
from tests.netns.etcd_servers import Etcd
from tests.netns.observing import wait_problem, wait_status
from tests.netns.oracle import own_key, wait_in_order
from tests.netns.peers import Peer, change_peers
from tests.netns.scenes import config, family_config, overlay

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanneld_py.lab import Host, Lab

PREFIX = "/coreos.com/network"
PEER = Peer("10.5.30.0/24", "192.0.2.100", "02:00:05:00:00:01")
"""Outside the range that scenes.config leases from."""


def addresses(host: Host, device: str, family: str) -> list[str]:
    (link,) = host.ip("address", "show", "dev", device)
    return [
        f"{entry['local']}/{entry['prefixlen']}"
        for entry in link["addr_info"]
        if entry["family"] == family and entry["scope"] == "global"
    ]


def wait_one_address(host: Host, device: str, family: str, expected: str) -> None:
    wait_for(
        lambda: addresses(host, device, family),
        5,
        f"{expected} alone",
        lambda found: found == [expected],
        0.05,
    )


def test_t17_one_ipv4_address_of_the_network_is_on_the_device(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    base = own_key(host).partition("-")[0]
    host.ip_batch(["address add 10.5.3.3/24 dev flannel.1", f"address del {base}/32 dev flannel.1"])
    wait_one_address(host, "flannel.1", "inet", f"{base}/32")


def test_t18_one_ipv6_address_of_the_network_is_on_the_device(lab: Lab) -> None:
    lab.etcd.put_config(family_config("vxlan", "ipv6"))
    (host,) = lab.add_hosts("alpha", families=(6,))
    host.start_daemon().wait_ready()
    base = next(iter(lab.etcd.leases())).partition("&")[2].rpartition("-")[0]
    host.ip_batch(["address add fd00:5:0:3::4/64 dev flannel-v6.1 nodad"])
    wait_one_address(host, "flannel-v6.1", "inet6", f"{base}/128")


def test_t22_a_missing_config_has_its_own_name_and_a_stored_one_comes_back_verbatim(lab: Lab) -> None:
    host = lab.add_host("alpha")
    wait_problem(host.start_daemon(), "config-missing")
    text = ' { "network" :"10.5.0.0/16",  "Backend":{"Type":"vxlan"}}'
    lab.etcd.put_config(text)
    host.daemon.wait_ready()
    argv = [sys.executable, "-m", "flanneld_py.cli.ctl.main", f"--etcd-endpoints={lab.etcd.endpoint}"]
    assert host.run([*argv, f"--etcd-prefix={lab.etcd.prefix}", "config", "get"]) == f"{text}\n"


@pytest.fixture
def registry() -> Iterator[EtcdRegistry]:
    with Etcd() as server:
        yield EtcdRegistry(EtcdSettings((server.start().url,), PREFIX))


def test_t23_a_record_is_stored_listed_read_and_deleted(registry: EtcdRegistry) -> None:
    """The value to the byte stands in tests/unit/test_records.py."""
    key, value = "subnets/10.1.5.0-24", '{"PublicIP":"1.2.3.4","PublicIPv6":null}'
    lease = registry.grant(86_400)
    written = registry.create(key, value, lease)
    assert written.ok
    assert 86_390 < registry.time_to_live(lease).left <= 86_400
    assert [(entry.key, entry.value.decode()) for entry in registry.list().entries] == [(key, value)]
    there = registry.get(key)
    assert there is not None
    assert registry.delete(key, there.mod_revision).ok
    assert registry.get(key) is None


def test_t24_a_lease_that_comes_and_goes_is_seen_once_each(registry: EtcdRegistry) -> None:
    listing = registry.list()
    stream = registry.watch(listing.revision, listing.cluster_id)
    written = registry.create("subnets/10.1.5.0-24", "{}", 0)
    registry.delete("subnets/10.1.5.0-24", written.revision)
    registry.create("subnets/10.1.6.0-24", "{}", 0)
    seen: list[tuple[str, bool]] = []
    for changes in stream:
        seen += [(change.key, change.entry is not None) for change in changes.changes]
        if len(seen) == 3:
            stream.cancel()
            break
    assert seen == [
        ("subnets/10.1.5.0-24", True),
        ("subnets/10.1.5.0-24", False),
        ("subnets/10.1.6.0-24", True),
    ]


def compact(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))  # a revision more, so that the watch's own is gone
    lab.etcd.ctl("compact", str(lab.etcd.ctl_json("get", "nothing")["header"]["revision"]))


def wait_renewed_and_followed(host: Host) -> None:
    """Its lease stands, and what comes now is seen."""
    change_peers(host.etcd, "vxlan", put=[PEER])
    wait_status(host.daemon, "the peer", lambda seen: seen["peers"]["count"] == 1, 10)
    wait_status(host.daemon, "the lease", lambda seen: seen["lease"]["state"] == "held", 10)
    wait_in_order(host, "vxlan")


def test_t25_a_watch_that_fell_behind_a_compaction_goes_on(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    host.daemon.send_signal(signal.SIGSTOP)
    compact(lab)
    host.daemon.send_signal(signal.SIGCONT)
    wait_renewed_and_followed(host)


def test_t26_so_does_one_that_lost_etcd_after_a_compaction(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    compact(lab)
    lab.etcd.kill()
    wait_status(host.daemon, "etcd to be missed", lambda seen: seen["registry"]["state"] == "unreachable", 10)
    lab.etcd.start()
    wait_status(host.daemon, "etcd to be back", lambda seen: seen["registry"]["state"] == "in sync", 30)
    wait_renewed_and_followed(host)


def test_t27_a_daemon_that_waits_for_etcd_ends_when_it_is_told_to(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    lab.etcd.pause()
    begun = time.monotonic()
    assert host.daemon.terminate() == 0
    assert time.monotonic() - begun < 5


def test_t32_the_own_lease_is_no_peer_and_one_outside_the_range_is_one(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    change_peers(lab.etcd, "vxlan", put=[PEER])
    status = wait_status(host.daemon, "the peer", lambda seen: seen["peers"]["count"] == 1)
    assert status["peers"]["bad"] == {}
    wait_in_order(host, "vxlan")


def test_t33_renewal_brings_the_ttl_back_and_leaves_the_value_alone(lab: Lab) -> None:
    """By keep-alive instead of a put, as a put wakes all other hosts."""
    lab.etcd.put_config(config("vxlan"))
    host = lab.add_host("alpha")
    host.start_daemon(["--subnet-lease-ttl=6s"]).wait_ready()
    path = f"{lab.etcd.prefix}/subnets/{own_key(host)}"

    def stored() -> dict[str, Any]:
        kv: dict[str, Any] = lab.etcd.ctl_json("get", path)["kvs"][0]
        return kv

    before = stored()

    def left() -> int:
        answer = lab.etcd.ctl("lease", "timetolive", f"{before['lease']:x}", "--write-out=json")
        return int(json.loads(answer)["ttl"])

    wait_for(left, 10, "the TTL to run down", lambda ttl: ttl <= 4)
    wait_for(left, 10, "the TTL to be back", lambda ttl: ttl >= 5)
    assert stored() == before


def test_t34_one_route_for_a_subnet_that_moves_to_another_host(lab: Lab) -> None:
    (host,) = overlay(lab, "host-gw", "alpha")
    for public in ("192.0.2.100", "192.0.2.101"):
        change_peers(lab.etcd, "host-gw", put=[Peer(PEER.subnet, public, PEER.mac)])
        wait_for(
            lambda: [route["gateway"] for route in host.ip("route", "show", PEER.subnet)],
            5,
            f"one route by {public}",
            partial(list.__eq__, [public]),
        )
