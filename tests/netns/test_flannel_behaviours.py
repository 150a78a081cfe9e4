"""What flannel's own tests say of registry, leases, devices, routes and interfaces, by number: T17 to T39.

T01 to T16, T19 to T21, T28 and T29 need no etcd and no kernel: tests/unit/test_flannel_behaviours.py
says where they stand. T40 to T45 are of the packet-filter rules (test_packet_rules.py),
T47 to T53 of the CNI plugin (tests/unit/test_cni_*.py), the others of Kubernetes.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.core.ifselect import select
from flanneld_py.drivers.kernel import read_host
from flanneld_py.lab import wait_for
from tests.netns.etcd_servers import PREFIX
from tests.netns.inside import Namespace
from tests.netns.observing import events, wait_problem, wait_status
from tests.netns.oracle import own_key, subnet_of, wait_in_order
from tests.netns.peers import Peer, change_peers
from tests.netns.scenes import config, family_config, overlay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flanneld_py.addresses import Family
    from flanneld_py.drivers.etcd import EtcdRegistry
    from flanneld_py.lab import Host, Lab
    from flanneld_py.model import HostFacts
    from tests.netns.etcd_servers import Etcd

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
def server(servers: Callable[..., Etcd]) -> Etcd:
    return servers().start()


@pytest.fixture
def registry(server: Etcd, connect: Callable[..., EtcdRegistry]) -> EtcdRegistry:
    return connect(server.url)


VALUE = '{"PublicIP":"1.2.3.4","PublicIPv6":null}'


def test_t23_a_record_is_stored_listed_read_and_deleted(server: Etcd, registry: EtcdRegistry) -> None:
    key, value = "subnets/10.1.5.0-24", VALUE
    lease = registry.grant(86_400)
    written = registry.create(key, value, lease)
    assert written.ok
    assert server.stored(PREFIX) == {b"/coreos.com/network/subnets/10.1.5.0-24": value.encode()}
    assert 86_390 < registry.time_to_live(lease).left <= 86_400
    assert [(entry.key, entry.value.decode()) for entry in registry.list().entries] == [(key, value)]
    there = registry.get(key)
    assert there is not None
    assert registry.delete(key, there.mod_revision).ok
    assert registry.get(key) is None
    assert server.stored(PREFIX) == {}


def test_t23_what_the_daemon_stores_is_flannels_record_and_its_node_id(lab: Lab) -> None:
    """NodeID, the last key, is ours: Go flannel ignores keys it does not know."""
    lab.etcd.put_config(config("alloc"))
    host = lab.add_host("alpha")
    host.start_daemon(["--public-ip=1.2.3.4"]).wait_ready()
    ((key, _),) = lab.etcd.leases().items()
    path = f"{lab.etcd.prefix}/subnets/{key}"
    stored = lab.etcd.ctl("get", "--print-value-only", path).rstrip("\n")
    assert stored.replace(f',"NodeID":"{host.node_id}"}}', "}") == VALUE
    lease = lab.etcd.ctl_json("get", path)["kvs"][0]["lease"]
    assert 86_390 < json.loads(lab.etcd.ctl("lease", "timetolive", f"{lease:x}", "-w=json"))["ttl"] <= 86_400


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
    """So that the revision after the one that a watch away saw last is gone."""
    for _ in range(2):
        lab.etcd.put_config(config("vxlan"))
    lab.etcd.ctl("compact", str(lab.etcd.ctl_json("get", "nothing")["header"]["revision"]))


def wait_held_and_followed(host: Host) -> None:
    """Its lease stands, and what comes now is seen."""
    change_peers(host.etcd, "vxlan", put=[PEER])
    wait_status(host.daemon, "the peer", lambda seen: seen["peers"]["count"] == 1, 10)
    wait_status(host.daemon, "the lease", lambda seen: seen["lease"]["state"] == "held", 10)
    wait_in_order(host, "vxlan")


def test_t25_a_watch_that_fell_behind_a_compaction_goes_on(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    host.daemon.send_signal(signal.SIGSTOP)
    # A new server has sent nothing yet to a client that has not read for a while.
    lab.etcd.stop()
    lab.etcd.start()
    compact(lab)
    host.daemon.send_signal(signal.SIGCONT)
    (relisted,) = wait_for(lambda: events(host.daemon, "registry_relist"), 10, "a new listing")
    assert "compacted" in relisted["reason"]
    wait_held_and_followed(host)


def test_t26_so_does_one_that_lost_etcd_after_a_compaction(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    compact(lab)
    lab.etcd.kill()
    wait_status(host.daemon, "etcd to be missed", lambda seen: seen["registry"]["state"] == "unreachable", 10)
    lab.etcd.start()
    wait_status(host.daemon, "etcd to be back", lambda seen: seen["registry"]["state"] == "in sync", 30)
    wait_held_and_followed(host)


def test_t27_a_daemon_that_waits_for_etcd_ends_when_it_is_told_to(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    lab.etcd.pause()
    for daemon in (host.daemon, host.start_daemon()):  # the other one waits for its first listing
        wait_status(daemon, "the daemon to be there", bool)
        begun = time.monotonic()
        assert daemon.terminate() == 0
        assert time.monotonic() - begun < 3


def test_t30_t31_a_node_that_comes_again_has_its_subnet_while_the_config_has_it(lab: Lab) -> None:
    (host,) = overlay(lab, "host-gw", "alpha")
    key = own_key(host)
    for _ in range(2):
        assert host.daemon.terminate() == 0
        host.start_daemon().wait_ready()
        wait_in_order(host, "host-gw")
        assert list(lab.etcd.leases()) == [key]
    assert host.daemon.terminate() == 0
    lab.etcd.put_config(config("host-gw", Network="10.4.0.0/16"))
    host.start_daemon().wait_ready()
    ((key, _),) = lab.etcd.leases().items()
    assert subnet_of(key).startswith("10.4.")
    assert key != "10.4.0.0-24", "the first subnet of a Network is for nobody"
    assert host.subnet_env()["FLANNEL_SUBNET"] == subnet_of(key).replace(".0/", ".1/")


def test_t32_the_own_lease_is_no_peer_and_one_outside_the_range_is_one(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    passes = len(events(host.daemon, "reconciled"))
    change_peers(lab.etcd, "vxlan", put=[PEER])
    status = wait_status(host.daemon, "the peer", lambda seen: seen["peers"]["count"] == 1)
    assert status["peers"]["bad"] == {}
    wait_in_order(host, "vxlan")
    # One batch: its four rows together.
    (seen,) = wait_for(lambda: events(host.daemon, "reconciled")[passes:], 2, "the pass to be told")
    assert (seen["set"], seen["del"]) == (4, 0)


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


# --- interface selection, of what the kernel shows ------------------------------------------------


@pytest.fixture(scope="module")
def facts() -> Iterator[HostFacts]:
    """A veth called dummy0, as not every kernel makes links of kind dummy."""
    with Namespace() as net:
        net.ip(
            "link add dummy0 type veth peer name far",
            "link set dummy0 up",
            "link set far up",
            "address add 1.10.100.1/24 dev dummy0",
            "address add 192.168.200.128/24 dev dummy0",
            "address add 172.16.30.18/24 dev dummy0",
            "address add 172.16.31.200/24 dev dummy0",
            "address add 172.16.32.100/24 dev dummy0",
            "address add 2001:db8::1/64 dev dummy0 nodad",
        )
        yield net.agent().call(read_host)


def chosen(facts: HostFacts, families: tuple[Family, ...] = (4,), **flags: Any) -> tuple[str, list[str]]:
    found = select(facts, families=families, **flags)
    return found.name, [str(address) for address in found.addresses.values()]


def test_t35_interface_by_a_pattern_for_its_address(facts: HostFacts) -> None:
    assert chosen(facts, iface_regex=[r"192\.168\.200\.\d+"]) == ("dummy0", ["192.168.200.128"])


def test_t36_interface_by_a_pattern_for_its_name(facts: HostFacts) -> None:
    assert chosen(facts, iface_regex=[r"dummy\d+"]) == ("dummy0", ["1.10.100.1"])


def test_t37_interface_by_name(facts: HostFacts) -> None:
    assert chosen(facts, iface=["dummy0"]) == ("dummy0", ["1.10.100.1"])


def test_t38_interface_by_address(facts: HostFacts) -> None:
    assert chosen(facts, iface=["172.16.30.18"]) == ("dummy0", ["172.16.30.18"])


def test_t39_interface_by_address_in_dual_stack(facts: HostFacts) -> None:
    found = chosen(facts, (4, 6), iface=["172.16.30.18"])
    assert found == ("dummy0", ["172.16.30.18", "2001:db8::1"])
