"""Other programs change what is ours in a host's kernel, without heal: repairing it is the daemon's work."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import TYPE_CHECKING

from flanneld_py.lab import CommandFailed
from tests.chaos.fault import LONG_AFTER, SOON_AFTER, Fault, Impossible
from tests.chaos.foreign import rules

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.lab import Host
    from tests.chaos.fault import Heal
    from tests.chaos.schedule import Step
    from tests.chaos.world import World

    Change = Callable[[Host, str, random.Random], None]


def _devices(host: Host) -> list[str]:
    """Those of ours that stand."""
    return [link["ifname"] for link in host.ip("link", "show") if link["ifname"].startswith("flannel")]


def _on_a_device(change: Change) -> Callable[[World, Step], None]:
    def inject(world: World, step: Step) -> None:
        host, dice = world.host(step.targets[0]), random.Random(step.pick)
        devices = _devices(host)
        if not devices:
            raise Impossible("there is no device of ours")
        change(host, dice.choice(devices), dice)

    return inject


def delete_device(host: Host, device: str, _dice: random.Random) -> None:
    host.ip("link", "delete", device)


def rename_device(host: Host, device: str, dice: random.Random) -> None:
    host.ip_batch([f"link set {device} down", f"link set {device} name gone{dice.randrange(1000)}"])


def take_device_down(host: Host, device: str, _dice: random.Random) -> None:
    host.ip("link", "set", device, "down")


def readdress_device(host: Host, device: str, _dice: random.Random) -> None:
    host.ip("address", "flush", "dev", device, "scope", "global")


def change_mtu(host: Host, device: str, dice: random.Random) -> None:
    host.ip("link", "set", device, "mtu", str(dice.choice((1300, 1350, 1420))))


def change_mac(host: Host, device: str, dice: random.Random) -> None:
    host.ip("link", "set", device, "address", f"0e:77:00:00:00:{dice.randrange(256):02x}")


def flush_neighbours(host: Host, device: str, _dice: random.Random) -> None:
    host.ip("neigh", "flush", "dev", device, "nud", "permanent")


def flush_fdb(host: Host, device: str, _dice: random.Random) -> None:
    for entry in host.bridge("fdb", "show", "dev", device):
        if "dst" in entry:
            host.run(["bridge", "fdb", "del", entry["mac"], "dev", device, "dst", entry["dst"]])


def take_vni(world: World, step: Step) -> Heal:
    """Our device is deleted, and another program makes one with its VNI and port under a name of its own."""
    host, dice = world.host(step.targets[0]), random.Random(step.pick)
    version, device = dice.choice([(6 if "v6" in name else 4, name) for name in _devices(host)] or [(0, "")])
    if not device:
        raise Impossible("there is no device of ours")
    local = host.address6 if version == 6 else host.address
    make = f"link add squat0 type vxlan id 1 dstport 8472 local {local} dev {host.interface} nolearning"
    with suppress(CommandFailed):  # the daemon was faster
        host.ip_batch([f"link delete {device}", make, "link set squat0 up"])

    def heal() -> None:
        with suppress(CommandFailed):
            host.ip("link", "delete", "squat0")

    return heal


def flush_routes(world: World, step: Step) -> None:
    """All of ours, and the nexthop objects they go through."""
    host = world.host(step.targets[0])
    for version in ("-4", "-6"):
        for route in host.ip(version, "route", "show", "proto", "96"):
            if route["dst"].startswith(("10.5.", "fd00:5")):
                with suppress(CommandFailed):  # the daemon is at work, too
                    host.ip(version, "route", "delete", route["dst"], "proto", "96")


def flush_nexthops(world: World, step: Step) -> None:
    world.host(step.targets[0]).run(["ip", "nexthop", "flush", "proto", "2"])


def flush_underlay_neighbours(world: World, step: Step) -> None:
    host = world.host(step.targets[0])
    host.ip("neigh", "flush", "dev", host.interface)


def flush_rules(world: World, step: Step) -> None:
    """A firewall is loaded anew: everything goes, then its own rules are there again, in one transaction."""
    host = world.host(step.targets[0])
    if not host.pods:
        raise Impossible("it has just been booted, and its firewall is still to be loaded")
    world.count_astray(host.name)
    host.nft(f"flush ruleset\n{rules(host)}")


def stop_forwarding(world: World, step: Step) -> Heal:
    """To switch it on again is the operator's; the daemon only names it."""
    host = world.host(step.targets[0])
    host.sysctl({"net.ipv4.ip_forward": 0})
    return lambda: host.sysctl({"net.ipv4.ip_forward": 1})


DAEMON = ("daemon:{}",)
VXLAN = ("vxlan", "vxlan-direct")


def _drift(name: str, change: Change, backends: tuple[str, ...]) -> Fault:
    return Fault(
        name,
        _on_a_device(change),
        "host",
        breaks="{}",
        needs=DAEMON,
        stirs="{}",
        grace=SOON_AFTER,
        backends=backends,
    )


FAULTS = (
    _drift("device deleted", delete_device, (*VXLAN, "udp")),
    _drift("device renamed", rename_device, (*VXLAN, "udp")),
    _drift("device taken down", take_device_down, (*VXLAN, "udp")),
    _drift("device's addresses removed", readdress_device, (*VXLAN, "udp")),
    _drift("device's MTU changed", change_mtu, (*VXLAN, "udp")),
    _drift("device's MAC changed", change_mac, VXLAN),
    Fault(
        "VNI taken",
        take_vni,
        "host",
        (1, 8),
        ("vni:{}",),
        breaks="{}",
        needs=DAEMON,
        stirs="{}",
        backends=VXLAN,
        weight=0.7,
    ),
    _drift("neighbours flushed", flush_neighbours, VXLAN),
    _drift("FDB flushed", flush_fdb, VXLAN),
    Fault(
        "routes flushed",
        flush_routes,
        "host",
        breaks="{}",
        needs=DAEMON,
        stirs="{}",
        grace=SOON_AFTER,
        weight=2,
    ),
    Fault(
        "nexthops flushed",
        flush_nexthops,
        "host",
        breaks="{}",
        needs=DAEMON,
        stirs="{}",
        grace=SOON_AFTER,
    ),
    Fault("underlay's neighbours flushed", flush_underlay_neighbours, "host"),
    Fault("packet-filter rules flushed", flush_rules, "host", needs=DAEMON, grace=LONG_AFTER),
    Fault(
        "forwarding switched off",
        stop_forwarding,
        "host",
        (1, 8),
        ("forwarding:{}",),
        breaks="{}",
        grace=SOON_AFTER,
        weight=0.5,
    ),
)
