"""The blackhole route: what is sent to an address of our own subnet that no pod has ends on this host."""

from __future__ import annotations

import sys
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.drivers.blackholes import Blackholes
from flanneld_py.lab import wait_for
from flanneld_py.model import Op, Scope, State
from tests.netns.inside import Namespace
from tests.netns.oracle import own_key, subnets_of, wait_in_order
from tests.netns.scenes import FAMILIES, MTU, family_config

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

FLAG = "--ip-blackhole-route"
METRIC = 2_147_483_647
"""So high that every other route to the subnet, such as the bridge's own, is better."""
NETWORKS = (ip_network("10.5.0.0/16"), ip_network("fd00:5::/48"))


def blackholes(host: Host | Namespace) -> set[tuple[Any, ...]]:
    """Destination, protocol and metric of the blackhole routes in table main."""
    show = host.show if isinstance(host, Namespace) else host.ip
    rows = [row for version in ("-4", "-6") for row in show(version, "route", "show", "type", "blackhole")]
    return {(row["dst"], row["protocol"], row.get("metric")) for row in rows}


def wanted(host: Host) -> set[tuple[Any, ...]]:
    return {(subnet, "96", METRIC) for subnet in subnets_of(own_key(host)).values()}


def wait_blackholes(host: Host) -> None:
    want = wanted(host)
    wait_for(lambda: blackholes(host), 3, f"blackholes {want}", lambda seen: seen == want)


def start(lab: Lab, backend: str, families: str) -> list[Host]:
    lab.etcd.put_config(family_config(backend, families))
    hosts = lab.add_hosts("alpha", "beta", families=FAMILIES[families])
    lab.start_daemons([FLAG])
    for host in hosts:
        wait_in_order(host, backend)
        wait_blackholes(host)
    return hosts


# --- the driver -----------------------------------------------------------------------------------


@pytest.mark.parametrize("subnet", ["10.5.7.0/24", "fd00:5:0:7::/64"])
def test_the_driver_stands_beside_the_routes_of_others(subnet: str) -> None:
    key = ip_network(subnet)
    version = f"-{key.version}"
    with Namespace() as net:
        net.ip("link add br0 type bridge", "link set br0 up", f"{version} route add {subnet} dev br0")
        net.ip(
            f"{version} route add blackhole {subnet} metric 77", "route add blackhole 10.9.0.0/24 proto 96"
        )
        net.ip(f"route add blackhole 10.9.1.0/24 metric {METRIC} proto 96")
        driver, scope = net.agent().make(Blackholes, "/p"), Scope("/p", NETWORKS)
        before = blackholes(net)
        assert driver.observe(scope) == State()
        ((_, error),) = driver.apply([Op("set", "blackholes", key, value=True)])
        assert error is None
        assert driver.observe(scope) == State(blackholes={key: True})
        rows = net.show(version, "route", "show", subnet)
        assert [(row["type"], row.get("metric")) for row in rows if row.get("protocol") == "96"] == [
            ("blackhole", METRIC)
        ]
        ((_, error),) = driver.apply([Op("del", "blackholes", key)])
        assert error is None
        assert blackholes(net) == before
        ((_, error),) = driver.apply([Op("del", "blackholes", key)])
        assert error is None, "gone already"


def test_the_driver_replaces_nothing_of_others() -> None:
    with Namespace() as net:
        net.ip(f"route add unreachable 10.5.7.0/24 metric {METRIC}")
        driver = net.agent().make(Blackholes, "/p")
        ((_, error),) = driver.apply([Op("set", "blackholes", ip_network("10.5.7.0/24"), value=True)])
        assert error == f"a route to 10.5.7.0/24 with metric {METRIC} is not ours; remove it"


@pytest.mark.parametrize("subnet", ["10.5.7.0/24", "fd00:5:0:7::/64"])
def test_the_driver_of_another_prefix_sees_and_deletes_nothing(subnet: str) -> None:
    key = ip_network(subnet)
    with Namespace() as net:
        first, second = (net.agent().make(Blackholes, prefix) for prefix in ("/p", "/q"))
        assert first.apply([Op("set", "blackholes", key, value=True)])[0].error is None
        assert first.observe(Scope("/p", NETWORKS)) == State(blackholes={key: True})
        assert second.observe(Scope("/q", NETWORKS)) == State()
        ((_, error),) = second.apply([Op("set", "blackholes", key, value=True)])
        assert error == f"a route to {key} with metric {METRIC} is not ours; remove it"


# --- the daemon -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "families"), MTU)
def test_pods_are_reached_and_the_rest_of_the_subnet_ends_here(lab: Lab, backend: str, families: str) -> None:
    alpha, beta = start(lab, backend, families)
    for address in beta.pod.addresses:
        assert alpha.pod.ping(str(address)).lost == 0, "the bridge's own route is better"
    # Without it the default route would lead packets back to the router, and round again.
    alpha.remove_pods()
    for subnet in subnets_of(own_key(alpha)).values():
        nobody = str(ip_network(subnet)[77])
        with pytest.raises(Exception, match="Invalid argument"):
            alpha.ip("route", "get", nobody)
    wait_blackholes(alpha)


def test_what_others_remove_comes_back_and_a_restart_writes_nothing(lab: Lab) -> None:
    alpha, _ = start(lab, "host-gw", "dual-stack")
    for subnet in subnets_of(own_key(alpha)).values():
        version = f"-{ip_network(subnet).version}"
        alpha.run(["ip", version, "route", "delete", "blackhole", subnet, "metric", str(METRIC)])
        wait_blackholes(alpha)
    alpha.daemon.kill()
    daemon = alpha.start_daemon([FLAG])
    daemon.wait_ready()
    wait_for(lambda: daemon.status()["state"], 5, "in sync", lambda state: state == "in sync")
    assert daemon.status()["drift"]["ops"] == {"set": 0, "del": 0}
    assert blackholes(alpha) == wanted(alpha)


def test_without_the_flag_it_goes(lab: Lab) -> None:
    alpha, _ = start(lab, "host-gw", "dual-stack")
    alpha.daemon.terminate()
    alpha.start_daemon().wait_ready()
    wait_for(lambda: blackholes(alpha), 3, "no blackholes", lambda seen: not seen)


def test_cleanup_removes_it(lab: Lab) -> None:
    alpha, _ = start(lab, "vxlan", "dual-stack")
    alpha.ip("route", "add", "blackhole", "203.0.113.0/24")
    alpha.daemon.terminate()
    flags = [flag for flag in alpha.flags if not flag.startswith(("--node-id", "--iface"))]
    told = alpha.run([sys.executable, "-m", "flanneld_py.cli.ctl.main", *flags, "cleanup"])
    assert [row[0] for row in blackholes(alpha)] == ["203.0.113.0/24"]
    assert told.count("del blackhole route ") == 2
