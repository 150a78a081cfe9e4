"""Two daemons on one host whose Networks overlap: each keeps to its own rows, whatever they look like."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import wait_for
from tests.netns.host_state import changes, host_state
from tests.netns.observing import wait_status
from tests.netns.oracle import expected
from tests.netns.test_ctl import flannelctl

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

IPV4 = {"Network": "10.5.0.0/16"}
IPV6 = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00:5::/48"}
PART = IPV6 | {"IPv6Network": "fd00:5::/52"}
HOST_GW, VXLAN, OTHER = {"Type": "host-gw"}, {"Type": "vxlan"}, {"Type": "vxlan", "VNI": 2}
DIRECT = {"DirectRouting": True}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "host-gw, one IPv6Network": (IPV6 | {"Backend": HOST_GW}, IPV6 | {"Backend": HOST_GW}),
    "host-gw, one IPv6Network in the other": (IPV6 | {"Backend": HOST_GW}, PART | {"Backend": HOST_GW}),
    "vxlan and host-gw, one IPv6Network": (IPV6 | {"Backend": VXLAN}, IPV6 | {"Backend": HOST_GW}),
    "direct routes, one IPv6Network": (
        IPV6 | {"Backend": VXLAN | DIRECT},
        IPV6 | {"Backend": OTHER | DIRECT},
    ),
    "host-gw, one Network": (IPV4 | {"Backend": HOST_GW}, IPV4 | {"Backend": HOST_GW}),
}
FLAGS = ["--ip-blackhole-route"]


def start(*hosts: Host) -> None:
    for host in hosts:
        host.start_daemon(FLAGS)
    for host in hosts:
        host.daemon.wait_ready()


def passes(host: Host) -> tuple[dict[str, int], dict[str, int]]:
    """What the daemon has repaired, and what it has written."""
    drift = host.daemon.status()["drift"]
    return drift["repaired"], drift["ops"]


def routes_expected(host: Host, config: dict[str, Any]) -> dict[str, str]:
    backend = config["Backend"]
    direct = ["2001:db8::/64"] if "DirectRouting" in backend else []
    rows = expected(host, backend["Type"], vni=backend.get("VNI", 1), direct=direct)
    return {what: how for what, how in rows.items() if what.startswith("route")}


def routes(host: Host) -> dict[str, str]:
    """All of protocol 96 but blackholes."""
    found = [*host.ip("-4", "route", "show", "proto", "96"), *host.ip("-6", "route", "show", "proto", "96")]
    return {
        f"route {r['dst']}": f"via {r['gateway']} dev {r['dev']} onlink={'onlink' in r['flags']} proto 96"
        for r in found
        if "gateway" in r
    }


@pytest.mark.parametrize("name", PAIRS)
def test_neither_touches_what_is_the_others(lab: Lab, name: str) -> None:
    configs = PAIRS[name]
    machines = lab.add_hosts("alpha", "beta")
    overlays = [[machine.beside(prefix) for machine in machines] for prefix in ("one", "two")]
    one, two = (overlay[0] for overlay in overlays)
    for host, config in zip((one, two), configs, strict=True):
        host.etcd.put_config(config)
    start(*overlays[0])
    wait_for(lambda: routes(one), 5, "the routes", lambda rows: rows == routes_expected(one, configs[0]))
    before = host_state(machines[0])
    start(*overlays[1])

    def wanted() -> dict[str, str]:
        return routes_expected(one, configs[0]) | routes_expected(two, configs[1])

    wait_for(lambda: routes(one), 5, "the routes of both", lambda rows: rows == wanted())
    for host in (one, two):
        wait_status(host.daemon, "all to be well", lambda seen: seen["state"] == "in sync")
        assert host.daemon.status()["drift"]["repaired"] == {}
    for host in (one, two):
        host.daemon.kill()
        start(host)
        wait_status(host.daemon, "all to be well", lambda seen: seen["state"] == "in sync")
        assert passes(host) == ({}, {"set": 0, "del": 0})
    assert routes(one) == wanted()

    two.daemon.terminate()
    cleaned = flannelctl(two, "cleanup")
    assert cleaned.code == 0, cleaned
    left = changes(before, host_state(machines[0]))
    assert [line for line in left if not line[2:].startswith("files: ")] == []
    assert passes(one) == ({}, {"set": 0, "del": 0})


@pytest.mark.parametrize("family", [4, 6])
def test_one_subnet_in_both_is_the_first_ones_and_named(lab: Lab, family: int) -> None:
    (machine,) = lab.add_hosts("alpha")
    config = (IPV4 if family == 4 else IPV6) | {"Backend": HOST_GW}
    key = "10.5.250.0-24" if family == 4 else "0.0.0.0-0&fd00:5:0:fafa::-64"
    one, two = (machine.beside(prefix) for prefix in ("one", "two"))
    for host, last in ((one, "50"), (two, "51")):
        host.etcd.put_config(config)
        record = {"PublicIP": f"192.0.2.{last}", "PublicIPv6": f"2001:db8::{last}", "BackendType": "host-gw"}
        host.etcd.ctl("put", f"{host.prefix}/subnets/{key}", "--", json.dumps(record))
    start(one)
    wait_for(lambda: routes(one), 5, "the route", bool)
    before = routes(one)
    two.start_daemon(FLAGS)
    for _ in range(2):
        wait_status(
            two.daemon,
            "the conflict",
            lambda seen: any("is not ours" in problem["reason"] for problem in seen["problems"]),
        )
        assert routes(one) == before
        for host in (two, one):
            host.daemon.kill()
            host.start_daemon(FLAGS)
        wait_status(one.daemon, "all to be well", lambda seen: seen["state"] == "in sync")
    assert passes(one) == ({}, {"set": 0, "del": 0})
