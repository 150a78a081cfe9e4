"""Checksum offload of vxlan devices: TxChecksum on, off and auto."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import pytest

from flanneld_py.drivers.counters import read_udp_checksum_errors
from flanneld_py.drivers.offloads import Offloads
from flanneld_py.lab import wait_for
from flanneld_py.model import Op, Scope, State
from tests.netns.inside import Namespace
from tests.netns.observing import events, wait_status
from tests.netns.oracle import own_key, wait_in_order
from tests.netns.scenes import FAMILIES, family_config

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

DEV = "flannel.1"
BROKEN_PACKETS = """
import socket, struct, sys
source, target, count = sys.argv[1:]
v6 = ":" in target
family = socket.AF_INET6 if v6 else socket.AF_INET
sock = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_UDP)
if v6:
    sock.setsockopt(socket.IPPROTO_IPV6, 7, -1)  # IPV6_CHECKSUM: none by the kernel
for _ in range(int(count)):
    sock.sendto(struct.pack(">HHHH", 40000, 8472, 12, 0xBAD) + b"data", (target, 0))
"""


def send_broken(source: Host, target: Host, count: int, family: int = 4) -> None:
    """UDP packets with a wrong checksum, from host to host."""
    addresses = (source.address, target.address) if family == 4 else (source.address6, target.address6)
    source.run([sys.executable, "-I", "-c", BROKEN_PACKETS, *addresses, str(count)])


def offload(host: Host, device: str = DEV) -> str:
    """`on` or `off`, as ethtool has it."""
    (state,) = re.findall(r"tx-checksum-ip-generic: (\w+)", host.run(["ethtool", "-k", device]))
    return str(state)


def start(lab: Lab, option: str | None, families: str = "ipv4") -> list[Host]:
    """Two hosts in sync, with this TxChecksum."""
    more = {} if option is None else {"TxChecksum": option}
    lab.etcd.put_config(family_config("vxlan", families, **more))
    hosts = lab.add_hosts("alpha", "beta", families=FAMILIES[families])
    lab.start_daemons()
    for host in hosts:
        wait_in_order(host, "vxlan")
    return hosts


# --- the driver -----------------------------------------------------------------------------------


def test_the_driver_reads_and_sets_a_feature() -> None:
    with Namespace() as net:
        net.ip("link add v0 type vxlan id 7 dstport 8472 nolearning")
        driver = net.agent().make(Offloads)
        scope = Scope("/p", (), offloads=frozenset({"v0", "absent"}))
        assert driver.observe(Scope("/p", ())) == State()
        assert driver.observe(scope) == State(offloads={"v0": True})
        ((_, error),) = driver.apply([Op("set", "offloads", "v0", value=False)])
        assert error is None
        assert "tx-checksum-ip-generic: off" in net.run("ethtool", "-k", "v0")
        assert driver.observe(scope) == State(offloads={"v0": False})
        ((_, error),) = driver.apply([Op("del", "offloads", "v0")])
        assert error is None
        assert "tx-checksum-ip-generic: on" in net.run("ethtool", "-k", "v0")
        outcomes = driver.apply(
            [Op("set", "offloads", "absent", value=True), Op("del", "offloads", "absent")]
        )
        assert [error for _, error in outcomes] == [
            "cannot turn the checksum offload of absent on: No such device (ENODEV)",
            None,
        ]


@pytest.mark.parametrize("family", [4, 6])
def test_the_counter_counts_broken_packets(lab: Lab, family: int) -> None:
    alpha, beta = lab.add_hosts("alpha", "beta")
    code = f"from {read_udp_checksum_errors.__module__} import *; print(read_udp_checksum_errors())"

    def count() -> int:
        return int(beta.run([sys.executable, "-c", code]))

    before = count()
    send_broken(alpha, beta, 3, family)
    wait_for(lambda: count() - before, 5, "three errors", lambda seen: seen == 3)


# --- the daemon -----------------------------------------------------------------------------------


@pytest.mark.parametrize("families", ["dual-stack", "ipv6"])
def test_off_holds_for_the_device_of_each_family(lab: Lab, families: str) -> None:
    alpha, beta = start(lab, "off", families)
    devices = {DEV: 4, "flannel-v6.1": 6}
    for device, family in devices.items():
        if family in FAMILIES[families]:
            assert offload(alpha, device) == "off"
    for address in beta.pod.addresses:
        assert alpha.pod.ping(str(address)).lost == 0


@pytest.mark.parametrize(("option", "wrong"), [("off", "on"), ("on", "off")])
def test_what_others_change_is_put_back(lab: Lab, option: str, wrong: str) -> None:
    alpha, _ = start(lab, option)
    assert offload(alpha) == option
    assert alpha.daemon.status()["offloads"] == {DEV: option}
    alpha.run(["ethtool", "-K", DEV, "tx-checksum-ip-generic", wrong])
    wait_for(lambda: offload(alpha), 3, "the repair", lambda seen: seen == option)
    wait_status(alpha.daemon, "it to be counted", lambda seen: "offloads" in seen["drift"]["repaired"])


def test_a_device_made_anew_gets_it_too(lab: Lab) -> None:
    alpha, beta = start(lab, "off")
    alpha.run(["ip", "link", "delete", DEV])
    wait_in_order(alpha, "vxlan")
    wait_for(lambda: offload(alpha), 3, "the offload to be off", lambda seen: seen == "off")
    assert alpha.pod.ping(beta.pod.address).lost == 0


def test_auto_leaves_it_as_it_is(lab: Lab) -> None:
    alpha, _ = start(lab, None)
    assert (offload(alpha), alpha.daemon.status()["offloads"]) == ("on", {})
    alpha.run(["ethtool", "-K", DEV, "tx-checksum-ip-generic", "off"])
    subnet = own_key(alpha)
    alpha.daemon.terminate()
    alpha.start_daemon().wait_ready()
    wait_in_order(alpha, "vxlan")
    assert (offload(alpha), own_key(alpha)) == ("off", subnet)


@pytest.mark.parametrize("family", [4, 6])
def test_auto_turns_it_off_when_the_counter_rises_and_says_why(lab: Lab, family: int) -> None:
    alpha, beta = start(lab, "auto", "dual-stack")
    # Of what came before the daemon looked nothing is known, so it must look once.
    send_broken(beta, alpha, 5, family)
    assert offload(alpha) == "on"

    def more() -> str:
        send_broken(beta, alpha, 5, family)
        return offload(alpha)

    wait_for(more, 10, "the offload to be off", lambda seen: seen == "off", 0.5)
    assert offload(alpha, "flannel-v6.1") == "off"
    status = wait_status(alpha.daemon, "a problem", lambda seen: "bad-checksums" in str(seen["problems"]), 5)
    (problem,) = status["problems"]
    assert "turned off the checksum offload" in problem["reason"]
    assert '"TxChecksum": "off"' in problem["fix"]
    (said,) = events(alpha.daemon, "bad_checksums")
    assert said["reason"] == problem["reason"]
    alpha.run(["ip", "link", "delete", DEV])
    wait_in_order(alpha, "vxlan")
    wait_for(lambda: offload(alpha), 3, "the offload to be off again", lambda seen: seen == "off")
