"""What befalls the interface below the overlay is followed: the subnet stays, and traffic is back soon."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from functools import partial
from operator import eq
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.faults.surfaces import OBSERVED
from tests.netns.host_state import host_state
from tests.netns.observing import events, wait_status
from tests.netns.oracle import own_key, wait_in_order
from tests.netns.scenes import BACKENDS, MTU, family_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.lab import Host, Lab
    from tests.netns.faults.rows import Matrix, Row, Trial

    Step = Callable[[Host], None]

BACK_WITHIN = 3.0
"""Seconds after the host is whole again."""
ELSEWHERE = 51
"""Number of the host's later address."""
FOREIGN = (
    "link add other0 address 0a:00:00:00:01:01 type veth peer name other1",
    "link set other1 up",
    "link set other0 up",
    "address add 10.77.1.1/24 dev other0",
    "route add 10.77.2.0/24 via 10.77.1.2 dev other0 proto 96",
    "route add 10.5.250.0/24 via 10.77.1.2 dev other0",
    "neigh add 10.77.1.3 lladdr 0a:00:00:00:00:0a dev other0 nud permanent",
)
"""What is none of the daemon's business, for `ip`."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something that is done to a host in two steps: after the second one it is whole again."""

    apart: Step
    problem: str
    """What the status says between the two; empty: nothing need be wrong then."""
    whole: Step
    number: int = 0
    """Of the addresses that the host has in the end, if not those that it had."""
    interface: str = "eth0"
    """What the one in the underlay is called in the end."""
    iface: str = "eth0"
    """For --iface; empty: without it."""


ROUTES = (
    "ip route replace default via 192.0.2.254 dev {dev}; ip route replace default via 2001:db8::fe dev {dev}"
)
ADD = "ip address add 192.0.2.{number}/24 dev {dev}; ip address add 2001:db8::{v6}/64 dev {dev} nodad"
DELETE = "ip address delete 192.0.2.{number}/24 dev {dev}; ip address delete 2001:db8::{v6}/64 dev {dev}"
# As a network manager does it: what the kernel dropped with the link is put back.
UP = f"ip link set {{dev}} up; ip address replace 2001:db8::{{v6}}/64 dev {{dev}} nodad; {ROUTES}"
RENAMED = "ip link set eth0 down; ip link set eth0 name ens9"
GONE = "there is no such interface"
NO_ADDRESS = "interface eth0 has no usable IPv"
NO_ROUTE = "no default route leads out of this host"


def sh(script: str, dev: str = "eth0", number: int = 0) -> Step:
    """Done by a shell on the host; `{number}` and `{v6}` are of the addresses that it has, or shall have."""

    def step(host: Host) -> None:
        own = number or host.number
        host.run(["sh", "-ec", script.format(dev=dev, number=own, v6=f"{own:x}")])

    return step


def to_eth1(host: Host) -> None:
    """A second uplink, which takes over."""
    port = "up-alpha"
    host.underlay.ip_batch(
        [
            f"link add {port} type veth peer name eth1 address 02:00:c0:00:02:{ELSEWHERE:02x} "
            f"netns {host.holder_pid}",
            f"link set {port} master br0 up",
        ]
    )
    sh(f"ip link set {{dev}} up; {ADD}; {ROUTES}", "eth1", ELSEWHERE)(host)


CHANGES = {
    "address replaced": Change(sh(DELETE), NO_ADDRESS, sh(f"{ADD}; {ROUTES}", number=ELSEWHERE), ELSEWHERE),
    "address replaced, the new one first": Change(
        sh(f"sysctl -qw net.ipv4.conf.eth0.promote_secondaries=1; {ADD}", number=ELSEWHERE),
        "",
        sh(f"{DELETE}; {ROUTES}"),
        ELSEWHERE,
    ),
    "address lost and found": Change(sh(DELETE), NO_ADDRESS, sh(f"{ADD}; {ROUTES}")),
    "address lost and found, --iface names it": Change(
        sh(DELETE),
        "--iface 192.0.2.1: no interface has this address",
        sh(f"{ADD}; {ROUTES}"),
        iface="192.0.2.1",
    ),
    "renamed, by its default route": Change(
        sh(RENAMED), NO_ROUTE, sh(UP, "ens9"), interface="ens9", iface=""
    ),
    "renamed, --iface names the address": Change(
        sh(RENAMED), "ens9", sh(UP, "ens9"), interface="ens9", iface="192.0.2.1"
    ),
    "renamed and back": Change(sh(RENAMED), GONE, sh(f"ip link set ens9 name eth0; {UP}")),
    "down and up": Change(sh("ip link set eth0 down"), "interface eth0", sh(UP)),
    "cable pulled": Change(
        lambda host: host.underlay.cut(host),
        "interface eth0 has no carrier",
        lambda host: host.underlay.mend(host),
    ),
    "deleted and recreated": Change(
        sh("ip link delete eth0"), GONE, lambda host: host.underlay.attach(host, host.number)
    ),
    "deleted and recreated, by its default route": Change(
        sh("ip link delete eth0"), NO_ROUTE, lambda host: host.underlay.attach(host, host.number), iface=""
    ),
    "default route elsewhere": Change(
        sh("ip link set eth0 down"), NO_ROUTE, to_eth1, ELSEWHERE, interface="eth1", iface=""
    ),
    "another default route": Change(lambda _: None, "", to_eth1, ELSEWHERE, interface="eth1", iface=""),
}
FOR_BOTH_FAMILIES = (
    "address replaced",
    "address replaced, the new one first",
    "renamed, by its default route",
    "down and up",
    "deleted and recreated",
    "default route elsewhere",
)


def start(lab: Lab, backend: str, families: str = "ipv4", iface: str = "eth0") -> tuple[Host, list[Host]]:
    """Three hosts in order with a pod each; what is done is done to the first."""
    lab.etcd.put_config(family_config(backend, families))
    alpha, *others = lab.add_hosts("alpha", "beta", "gamma")
    alpha.iface = iface
    alpha.ip_batch(FOREIGN)
    lab.start_daemons(OBSERVED)
    wait_all_in_order(backend, alpha, others)
    return alpha, others


def wait_all_in_order(backend: str, alpha: Host, others: list[Host]) -> None:
    for host in (alpha, *others):
        wait_in_order(host, backend, beside=BESIDE if host is alpha else None)
        wait_status(
            host.daemon, "all to be well", lambda seen: (seen["state"], seen["problems"]) == ("in sync", [])
        )


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_change_is_followed(lab: Lab, backend: str, name: str, fault: Matrix) -> None:
    alpha, others = start(lab, backend, iface=CHANGES[name].iface)
    with host_fault(fault, name, backend) as row:
        row.took(follow(CHANGES[name], alpha, others, backend, row))


@pytest.mark.parametrize("name", FOR_BOTH_FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_change_is_followed_for_both_families(lab: Lab, backend: str, name: str, fault: Matrix) -> None:
    alpha, others = start(lab, backend, "dual-stack", CHANGES[name].iface)
    with host_fault(fault, f"{name} (dual-stack)", backend) as row:
        row.took(follow(CHANGES[name], alpha, others, backend, row))


def host_fault(fault: Matrix, name: str, backend: str) -> Trial:
    problem = CHANGES[name.removesuffix(" (dual-stack)")].problem
    expected = "followed, the subnet stays" if problem else "followed at once, the subnet stays"
    check = "interface" if problem else None
    return fault(f"interface: {name}", backend, expected=expected, check=check, says=problem)


BESIDE = {
    "route 10.77.2.0/24": "via 10.77.1.2 dev other0 onlink=False proto 96",
    "route 10.5.250.0/24": "via 10.77.1.2 dev other0 onlink=False proto boot",
}
"""What the oracle sees of FOREIGN."""


def follow(change: Change, alpha: Host, others: list[Host], backend: str, row: Row) -> float:
    """Carry out a change of `alpha` and check all that must hold; seconds until traffic was back."""
    key, env, foreign = own_key(alpha), alpha.subnet_file.read_bytes(), foreign_rows(alpha)
    mtu = int(env_of(alpha)["FLANNEL_MTU"])
    before = [(host.daemon.pid, claimed(host)) for host in (alpha, *others)]

    row.injected()
    change.apart(alpha)
    if change.problem:
        row.seen(alpha)
    change.whole(alpha)
    whole = time.monotonic()
    alpha.number, alpha.interface = change.number or alpha.number, change.interface
    for other in others:
        left = BACK_WITHIN - (time.monotonic() - whole)
        wait_for(partial(is_reached, alpha, other), left, f"traffic with {other.name}")
    took = time.monotonic() - whole
    assert took < BACK_WITHIN

    wait_for(
        lambda: alpha.etcd.leases()[key],
        BACK_WITHIN,
        "the record to name the address",
        lambda record: record["PublicIP"] == alpha.address,
    )
    wait_all_in_order(backend, alpha, others)
    row.recovered(alpha, beside=BESIDE)
    for other in others:
        for address in alpha.pod.addresses:
            assert other.pod.ping(str(address), count=20, size=mtu, df=True).lost == 0
    assert alpha.subnet_file.read_bytes() == env
    assert foreign_rows(alpha) == foreign
    assert [(host.daemon.pid, claimed(host)) for host in (alpha, *others)] == before
    assert own_key(alpha) == key
    return took


def claimed(host: Host) -> list[str]:
    """All leases so far; more than one where two hosts chose the same when they started, and one gave way."""
    return [line["key"] for line in events(host.daemon, "lease_claimed")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_gets_the_name_of_the_interface_in_use_is_not_taken_for_it(lab: Lab, backend: str) -> None:
    """--iface names it, so it stays a problem; but what there is goes on working."""
    alpha, others = start(lab, backend)
    sh(RENAMED)(alpha)
    alpha.ip_batch(["link add eth0 type bridge", "link set eth0 up"])
    sh(UP, "ens9")(alpha)
    wait_status(
        alpha.daemon,
        "the problem",
        lambda seen: (
            [(p["code"], "ens9" in p["reason"]) for p in seen["problems"]] == [("host-interface", True)]
        ),
    )
    alpha.daemon.send_signal(signal.SIGHUP)
    wait_for(lambda: all(is_reached(alpha, other) for other in others), BACK_WITHIN, "traffic", bool)
    if backend == "vxlan":
        (link,) = alpha.ip("-d", "link", "show", "type", "vxlan")
        assert link["linkinfo"]["info_data"]["link"] == "ens9"
    assert alpha.daemon.status()["drift"]["failed"] == []

    alpha.ip("link", "delete", "eth0")
    sh(f"ip link set ens9 down; ip link set ens9 name eth0; {UP}")(alpha)
    wait_all_in_order(backend, alpha, others)


@pytest.mark.parametrize("families", ["ipv4", "dual-stack"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mtu_is_followed_down_and_up(lab: Lab, backend: str, families: str, fault: Matrix) -> None:
    alpha, others = start(lab, backend, families)
    with fault(f"interface: MTU down and up ({families})", backend, expected="followed", check=None) as row:
        row.took(follow_mtu(alpha, others, backend, families))


def follow_mtu(alpha: Host, others: list[Host], backend: str, families: str) -> float:
    """Down and up and down and up; the seconds that the slowest of them took."""
    overhead = 1500 - MTU[backend, families]
    before, slowest = env_of(alpha), 0.0
    for mtu in (1400, 1500, 1340, 1490) if families == "ipv4" else (1400, 1500, 1350, 1490):
        alpha.ip("link", "set", "eth0", "mtu", str(mtu))
        changed = time.monotonic()
        wait_for(
            lambda: env_of(alpha),
            BACK_WITHIN,
            f"subnet.env for an MTU of {mtu}",
            partial(eq, before | {"FLANNEL_MTU": str(mtu - overhead)}),
        )
        slowest = max(slowest, time.monotonic() - changed)
        wait_all_in_order(backend, alpha, others)
        if backend == "vxlan":
            device = alpha.ip("link", "show", "dev", "flannel.1")[0]
            assert device["mtu"] == mtu - 50
        for other in others:
            for address in alpha.pod.addresses:
                size = mtu - overhead
                assert other.pod.ping(str(address), count=3, size=size, df=True).lost == 0
    return slowest


def test_an_mtu_below_that_of_ipv6_is_survived(lab: Lab) -> None:
    """Below 1280 a device loses IPv6 with its sysctls, and gets the defaults when it has it again."""
    alpha, others = start(lab, "vxlan")
    accept_ra = "net.ipv6.conf.flannel/1.accept_ra"
    alpha.ip("link", "set", "eth0", "mtu", "1000")
    wait_for(lambda: env_of(alpha)["FLANNEL_MTU"], BACK_WITHIN, "its MTU", lambda mtu: mtu == "950")
    wait_all_in_order("vxlan", alpha, others)
    assert others[0].pod.ping(alpha.pod.address, size=950, df=True).lost == 0
    alpha.ip("link", "set", "eth0", "mtu", "1500")
    wait_for(
        lambda: alpha.run(["sysctl", "-en", accept_ra]).strip(),
        BACK_WITHIN,
        "accept_ra",
        lambda seen: seen == "0",
    )
    alpha.ip("address", "replace", f"{alpha.address6}/64", "dev", "eth0", "nodad")
    wait_all_in_order("vxlan", alpha, others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_addresses_that_come_and_go_beside_ours_are_none_of_our_business(
    lab: Lab, backend: str, fault: Matrix
) -> None:
    """Such as those of keepalived: the kernel lists the newest IPv6 address first."""
    alpha, others = start(lab, backend, "dual-stack")
    revision = alpha.daemon.status()["registry"]["revision"]
    chosen = events(alpha.daemon, "external_interface")
    with fault("interface: second address added", backend, expected="no change", check=None) as row:
        row.stands(alpha, *others)
        for verb, resyncs in (("add", 1), ("delete", 2)):
            alpha.ip_batch(
                [
                    f"address {verb} 192.0.2.77/32 dev eth0",
                    f"address {verb} 2001:db8::77/64 dev eth0" + (" nodad" if verb == "add" else ""),
                ]
            )
            # Whatever it makes of that, it has begun to make when it takes the next thing.
            alpha.daemon.send_signal(signal.SIGHUP)
            wait_for(lambda: len(events(alpha.daemon, "resync")), 5, "SIGHUP", partial(eq, resyncs))
            wait_all_in_order(backend, alpha, others)
        row.recovered(alpha, beside=BESIDE)
    assert alpha.daemon.status()["registry"]["revision"] == revision
    assert events(alpha.daemon, "external_interface") == chosen


def env_of(host: Host) -> dict[str, str]:
    """The variables of its subnet.env."""
    return dict(line.split("=", 1) for line in host.subnet_file.read_text().splitlines())


def is_reached(host: Host, other: Host) -> bool:
    """Pod to pod, and the answer back, of every family."""
    pairs = zip(host.pod.addresses, other.pod.addresses, strict=True)
    return all(host.pod.ping(str(address), count=1, wait=0.1).received for _, address in pairs)


def foreign_rows(host: Host) -> list[str]:
    """What the host has of FOREIGN."""
    state = host_state(host)
    return [row for title, rows in state.items() if title != "files" for row in rows if "other0" in row]
