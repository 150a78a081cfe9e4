"""What lies below the overlay: links go down, hosts cannot reach each other, addresses change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flanneld_py.lab.underlay import ROUTER, ipv4, ipv6
from tests.chaos.fault import SOON_AFTER, Fault

if TYPE_CHECKING:
    from flanneld_py.lab import Host
    from tests.chaos.fault import Heal
    from tests.chaos.schedule import Step
    from tests.chaos.world import World

FIRST_NEW_NUMBER = 60
"""Of hosts whose address changed: each change takes the next one."""


def _routes(host: Host) -> list[str]:
    return [
        f"route replace default via {router} dev {host.interface}"
        for router in (ipv4(ROUTER, host.segment), ipv6(ROUTER, host.segment))
    ]


def _addresses(host: Host, verb: str) -> list[str]:
    nodad = " nodad" if verb != "delete" else ""
    return [
        f"address {verb} {host.address}/24 dev {host.interface}",
        f"address {verb} {host.address6}/64 dev {host.interface}{nodad}",
    ]


def take_link_down(world: World, step: Step) -> Heal:
    """And up, as a network manager does it: what the kernel dropped with the link is put back."""
    host = world.host(step.targets[0])
    host.ip("link", "set", host.interface, "down")

    def heal() -> None:
        up = [f"link set {host.interface} up", *_addresses(host, "replace"), *_routes(host)]
        host.ip_batch(up)

    return heal


def recreate_link(world: World, step: Step) -> Heal:
    """Deleted, and made again as it was."""
    host = world.host(step.targets[0])
    host.ip("link", "delete", host.interface)
    return lambda: host.underlay.attach(host, host.number, host.segment)


def rename_link(world: World, step: Step) -> Heal:
    """And back: --iface names it."""
    host = world.host(step.targets[0])
    host.ip_batch([f"link set {host.interface} down", f"link set {host.interface} name ens9"])

    def heal() -> None:
        up = [f"link set {host.interface} up", *_addresses(host, "replace"), *_routes(host)]
        host.ip_batch([f"link set ens9 name {host.interface}", *up])

    return heal


def lower_mtu(world: World, step: Step) -> Heal:
    host = world.host(step.targets[0])
    host.ip("link", "set", host.interface, "mtu", "1400")
    return lambda: host.ip_batch([f"link set {host.interface} mtu 1500"])


def add_addresses(world: World, step: Step) -> Heal:
    """Such as those of keepalived."""
    host = world.host(step.targets[0])
    floating = (f"192.0.2.{200 + step.number % 40}/32", f"2001:db8::{200 + step.number % 40:x}/128")
    host.ip_batch([f"address add {address} dev {host.interface}" for address in floating])
    return lambda: host.ip_batch([f"address del {address} dev {host.interface}" for address in floating])


def pull_cable(world: World, step: Step) -> Heal:
    host = world.host(step.targets[0])
    host.underlay.cut(host)
    return lambda: host.underlay.mend(host)


def change_address(world: World, step: Step) -> None:
    host = world.host(step.targets[0])
    commands = _addresses(host, "delete")
    host.number = FIRST_NEW_NUMBER + step.number
    host.ip_batch([*commands, *_addresses(host, "add"), *_routes(host)])


def cut_from_hosts(world: World, step: Step) -> Heal:
    """From all other hosts; etcd is reached."""
    host = world.host(step.targets[0])
    others = [world.host(name) for name in world.names if name != host.name]
    return world.drop([rule for other in others for rule in _between(host, other)])


def cut_pair(world: World, step: Step) -> Heal:
    one, other = (world.host(name) for name in step.targets)
    return world.drop(_between(one, other))


def drop_at_random(world: World, step: Step) -> Heal:
    """One packet in ten, of all that a host sends or gets, etcd's too."""
    host = world.host(step.targets[0])
    lossy = "numgen random mod 10 0"
    return world.drop(
        [
            f"ip saddr {host.address} {lossy}",
            f"ip daddr {host.address} {lossy}",
            f"ip6 saddr {host.address6} {lossy}",
            f"ip6 daddr {host.address6} {lossy}",
        ]
    )


def _between(one: Host, other: Host) -> list[str]:
    return [
        rule
        for source, target in ((one, other), (other, one))
        for rule in (
            f"ip saddr {source.address} ip daddr {target.address}",
            f"ip6 saddr {source.address6} ip6 daddr {target.address6}",
        )
    ]


UPLINK = ("uplink:{}",)
WITH_DAEMON = (*UPLINK, "daemon:{}")
"""A daemon that starts without the interface of its --iface ends: only an operator can help there."""
FAULTS = (
    Fault(
        "link deleted and recreated",
        recreate_link,
        "host",
        (1, 10),
        WITH_DAEMON,
        breaks="{}",
        needs=("daemon:{}",),
        disables=("registry:{}",),
        stirs="{}",
        told_after=8,
    ),
    Fault(
        "link renamed and back",
        rename_link,
        "host",
        (1, 10),
        WITH_DAEMON,
        breaks="{}",
        needs=("daemon:{}",),
        disables=("registry:{}",),
        stirs="{}",
        told_after=8,
    ),
    Fault("link's MTU lowered", lower_mtu, "host", (2, 10), UPLINK, needs=("daemon:{}",), stirs="{}"),
    Fault("addresses added", add_addresses, "host", (2, 10), UPLINK),
    Fault(
        "link down and up",
        take_link_down,
        "host",
        (1, 12),
        UPLINK,
        breaks="{}",
        needs=("daemon:{}",),
        disables=("registry:{}",),
        stirs="{}",
        told_after=8,
        weight=1.5,
    ),
    Fault(
        "cable pulled",
        pull_cable,
        "host",
        (1, 25),
        UPLINK,
        breaks="{}",
        disables=("registry:{}",),
        stirs="{}",
        told_after=8,
        weight=1.5,
    ),
    Fault(
        "address changed",
        change_address,
        "host",
        holds=(*UPLINK, "etcd-path:{}"),
        breaks="{}",
        needs=("daemon:*", "registry:*"),
        disables=("registry:{}",),
        stirs="{}",
        weight=1.5,
    ),
    Fault("host cut off from hosts", cut_from_hosts, "host", (1, 15), UPLINK, breaks="{}", grace=SOON_AFTER),
    Fault("two hosts cut apart", cut_pair, "pair", (1, 15), UPLINK, breaks="pair", grace=SOON_AFTER),
    Fault(
        "packets lost at random",
        drop_at_random,
        "host",
        (2, 15),
        UPLINK,
        breaks="{}",
        disables=("registry:{}",),
        grace=SOON_AFTER,
    ),
)
