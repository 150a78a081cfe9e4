"""Which interface and addresses carry the overlay, on hosts that have several."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import Host, wait_for
from flanneld_py.lab.daemon import COMMAND
from tests.netns.observing import events, wait_problem, wait_status
from tests.netns.scenes import config

if TYPE_CHECKING:
    from flanneld_py.lab import Daemon, Lab

OTHER = "198.51.100.7"
"""On wan0, by which the default route leads."""
OTHER6 = "2001:db8:7::7"
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def _no_interface_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lab's hosts name eth0; here the tests say what is named."""
    given = vars(Host)["flags"].fget
    unnamed = property(lambda host: [flag for flag in given(host) if not flag.startswith("--iface")])
    monkeypatch.setattr(Host, "flags", unnamed)


@pytest.fixture
def alpha(lab: Lab) -> Host:
    """Its default route leads elsewhere; etcd and the other hosts are in the network of eth0."""
    lab.etcd.put_config(config("vxlan"))
    host = lab.add_host("alpha")
    host.ip_batch(
        [
            "link add wan0 type veth peer name wan1",
            f"address add {OTHER}/24 dev wan0",
            f"address add {OTHER6}/64 dev wan0 nodad",
            "link set wan0 up",
            "link set wan1 up",
            "route replace default via 198.51.100.1 dev wan0",
            "route replace default via 2001:db8:7::1 dev wan0",
        ]
    )
    return host


def external(daemon: Daemon) -> tuple[str, list[str], str]:
    """Name, addresses and how they were chosen, as the status of a ready daemon says."""
    daemon.wait_ready()
    seen = wait_status(daemon, "an external interface", lambda status: status["external"] is not None)
    found = seen["external"]
    return found["name"], found["addresses"], found["how"]


def record(lab: Lab) -> dict[str, Any]:
    ((_, value),) = lab.etcd.leases().items()
    return dict(value)


def exits(host: Host, *args: str) -> tuple[int, str]:
    ended = subprocess.run(
        host.entered([*COMMAND, *host.flags, *args]), check=False, capture_output=True, text=True, timeout=20
    )
    return ended.returncode, ended.stderr


# --- nothing is named -----------------------------------------------------------------------------


def test_a_fresh_host_takes_the_interface_that_reaches_etcd_and_keeps_it(lab: Lab, alpha: Host) -> None:
    how = f"the route to etcd ({lab.etcd.endpoint.split('/')[2].rpartition(':')[0]})"
    daemon = alpha.start_daemon()
    assert external(daemon) == ("eth0", [alpha.address], how)
    (line,) = events(daemon, "external_interface")
    assert (line["name"], line["how"]) == ("eth0", how)
    assert record(lab)["PublicIP"] == alpha.address
    daemon.kill()
    # By its record.
    state = alpha.state_directory / "state.json"
    state.unlink()
    assert external(alpha.start_daemon()) == ("eth0", [alpha.address], how)
    alpha.daemon.terminate()
    # By what it remembers, when the record is gone.
    lab.etcd.ctl("del", "--prefix", f"{lab.etcd.prefix}/subnets/")
    assert external(alpha.start_daemon()) == ("eth0", [alpha.address], how)
    # And not by itself another one.
    alpha.ip("route", "replace", "default", "via", "192.0.2.254", "dev", "eth0")
    wait_status(alpha.daemon, "the same interface", lambda status: status["external"]["name"] == "eth0")


def test_a_host_that_has_carried_flannel_follows_the_default_route(lab: Lab, alpha: Host) -> None:
    alpha.subnet_file.write_text(
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.130.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    )
    assert external(alpha.start_daemon()) == ("wan0", [OTHER], "the default route")
    assert record(lab)["PublicIP"] == OTHER


def test_a_device_of_flannel_is_a_sign_of_it(lab: Lab, alpha: Host) -> None:  # noqa: ARG001 - the lab of alpha
    alpha.ip_batch(["link add flannel.7 type vxlan id 7 dstport 8999 local 198.51.100.7 dev wan0"])
    assert external(alpha.start_daemon())[0] == "wan0"


def test_a_record_of_flannel_names_the_interface_it_had(lab: Lab, alpha: Host) -> None:
    value = f'{{"PublicIP":"{OTHER}","PublicIPv6":null}}'
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/10.5.130.0-24", value)
    assert external(alpha.start_daemon())[0] == "wan0"


def test_etcd_on_this_host_says_nothing(alpha: Host) -> None:
    daemon = alpha.start_daemon([f"--etcd-endpoints={NOWHERE}"])
    status = wait_problem(daemon, "registry-unreachable")
    assert (status["external"]["name"], status["external"]["how"]) == ("wan0", "the default route")


def test_etcd_that_comes_later_is_waited_for(lab: Lab, alpha: Host) -> None:
    lab.underlay.drop([f"ip saddr {alpha.address} tcp dport {lab.etcd.endpoint.rpartition(':')[2]}"])
    try:
        daemon = alpha.start_daemon()
        status = wait_problem(daemon, "registry-unreachable")
        assert status["external"] is None
    finally:
        lab.underlay.drop([])
    assert external(daemon)[0] == "eth0"


def test_a_default_route_by_several_interfaces(lab: Lab, alpha: Host) -> None:  # noqa: ARG001 - the lab of alpha
    hops = ["nexthop", "via", "192.0.2.254", "dev", "eth0", "nexthop", "via", "198.51.100.1", "dev", "wan0"]
    alpha.ip("route", "replace", "default", *hops)
    alpha.ip("-6", "route", "delete", "default")
    # Without a config it may be that IPv6 is wanted, and comes.
    daemon = alpha.start_daemon([f"--etcd-endpoints={NOWHERE}"])
    said = "the IPv4 default route leads by several interfaces, eth0, wan0; set --iface to one of: eth0 ("
    wait_status(daemon, "the error", lambda status: said in str(status["problems"]))
    assert daemon.terminate() == 0
    # Here etcd decides.
    assert external(alpha.start_daemon())[0] == "eth0"


# --- named ----------------------------------------------------------------------------------------


NAMED = {
    "an address by a pattern": (
        ["--iface-regex=nothing", "--iface-regex=^198[.]51[.]"],
        ("wan0", OTHER, "--iface-regex '^198[.]51[.]'"),
    ),
    "a name by a pattern": (["--iface-regex=^eth"], ("eth0", "", "--iface-regex '^eth'")),
    "patterns after names": (["--iface=eth7", "--iface-regex=n0$"], ("wan0", OTHER, "--iface-regex 'n0$'")),
    "the way comes last": (
        ["--iface-regex=no", "--iface-can-reach=203.0.113.9"],
        ("wan0", OTHER, "--iface-can-reach 203.0.113.9"),
    ),
    "a neighbour": (["--iface-can-reach=192.0.2.200"], ("eth0", "", "--iface-can-reach 192.0.2.200")),
    "public address": ([f"--public-ip={OTHER}"], ("wan0", OTHER, f"--public-ip {OTHER}")),
    "address": ([f"--iface={OTHER}"], ("wan0", OTHER, f"--iface {OTHER}")),
}


@pytest.mark.parametrize("case", NAMED)
def test_named(alpha: Host, case: str) -> None:
    args, (name, address, how) = NAMED[case]
    assert external(alpha.start_daemon(args)) == (name, [address or alpha.address], how)


def test_the_kernels_own_address_for_that_way_is_taken(alpha: Host) -> None:
    alpha.ip_batch(
        ["address add 192.0.2.199/24 dev eth0", "route add 203.0.113.0/24 via 192.0.2.254 src 192.0.2.199"]
    )
    assert external(alpha.start_daemon(["--iface-can-reach=203.0.113.9"]))[:2] == ("eth0", ["192.0.2.199"])


def test_a_way_that_comes_and_moves_is_followed(alpha: Host) -> None:
    alpha.ip("route", "delete", "default")
    daemon = alpha.start_daemon(["--iface-can-reach=203.0.113.9"])
    wait_problem(daemon, "host-interface", "--iface-can-reach 203.0.113.9: there is no route to it")
    alpha.ip("route", "add", "203.0.113.0/24", "via", "192.0.2.254")
    assert external(daemon)[0] == "eth0"
    alpha.ip("route", "replace", "203.0.113.0/24", "via", "198.51.100.1")
    wait_status(daemon, "the other way", lambda status: status["external"]["name"] == "wan0")


def test_an_address_of_this_host_is_no_way_out(alpha: Host) -> None:
    code, said = exits(alpha, f"--iface-can-reach={OTHER}")
    assert code == 78
    assert f"--iface-can-reach {OTHER} is an address of this host itself" in said


def test_dual_stack_by_an_ipv6_address(lab: Lab, alpha: Host) -> None:
    """Go flannel crashes at this."""
    lab.etcd.put_config(config("vxlan", EnableIPv6=True, IPv6Network="fd00:5::/48"))
    assert external(alpha.start_daemon([f"--iface={OTHER6}"])) == (
        "wan0",
        [OTHER, OTHER6],
        f"--iface {OTHER6}",
    )
    assert (record(lab)["PublicIP"], record(lab)["PublicIPv6"]) == (OTHER, OTHER6)


def test_dual_stack_by_patterns_wants_an_address_of_each_family(lab: Lab, alpha: Host) -> None:
    lab.etcd.put_config(config("vxlan", EnableIPv6=True, IPv6Network="fd00:5::/48"))
    pattern = r"--iface-regex=^198\.51\.|^2001:db8:7::"
    assert external(alpha.start_daemon([pattern]))[:2] == ("wan0", [OTHER, OTHER6])


def test_public_addresses_of_both_families(lab: Lab, alpha: Host) -> None:
    lab.etcd.put_config(config("vxlan", EnableIPv6=True, IPv6Network="fd00:5::/48"))
    args = ["--iface=eth0", "--public-ip=203.0.113.5", "--public-ipv6=2001:db8:99::5"]
    daemon = alpha.start_daemon(args)
    assert external(daemon)[:2] == ("eth0", [alpha.address, alpha.address6])
    assert (record(lab)["PublicIP"], record(lab)["PublicIPv6"]) == ("203.0.113.5", "2001:db8:99::5")
    wait_for(lambda: daemon.status()["state"] == "in sync", 5, "the daemon to be in sync")
