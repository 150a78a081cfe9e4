"""Packets made to do harm, from the wire and into the TUN, through whole daemons of either data plane.

What becomes of each stands in docs/operations.md: counted by its reason, or forwarded to whom it is for.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import ExitStack
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import wait_for
from tests.netns.observing import wait_status
from tests.netns.oracle import own_key, subnets_of
from tests.netns.scenes import family_config
from tests.netns.test_ctl import flannelctl
from tests.netns.udp_crafted import (
    BAD,
    GOOD,
    LONE,
    malformed,
    mutated,
    no_single_sender,
    silent,
    wrong_on_arrival,
)
from tests.netns.udp_packets import (
    DF,
    EXPERIMENT,
    FRAGMENT,
    HOP_BY_HOP,
    ICMPV6,
    IPV4_IN,
    MF,
    OPTIONS6,
    UNSPECIFIED,
    fragment6,
    ipv4,
    ipv6,
    padding,
)
from tests.netns.udp_scene import (
    METRICS,
    PORT,
    Scene,
    Watch,
    destination,
    drops,
    from_wire,
    holding,
    into_tun,
    misled,
    passed,
    wait_drops,
)
from tests.netns.udp_traffic import IcmpErrors, send_raw

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanneld_py.lab import Host, Lab
    from tests.netns.udp_crafted import Crafted

PLANES = ("native", "python")
NARROW = 1400
"""Of the path to one host, in bytes outside."""
MTU = 1472
STRANGER = "192.0.2.254"
"""The router between the hosts."""
OF_LONG = 3
"""Packets that GOOD * 500 needs."""
MUTATED = 3000
FLOOD = 1.0
"""Seconds."""


@pytest.fixture(params=PLANES)
def scene(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Scene]:
    lab.etcd.put_config(family_config("udp", "dual-stack", DataPlane=request.param))
    alpha, beta, gamma = lab.add_hosts("alpha", "beta", "gamma")
    lab.start_daemons([f"--metrics-addr={METRICS}"])
    plain = lab.add_host("plain")
    subnets = {4: "10.5.9.0/24", 6: "fd00:5:0:9::/64"}
    record = json.dumps({"PublicIP": plain.address, "PublicIPv6": plain.address6})
    key = "10.5.9.0-24&fd00:5:0:9::-64"
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/{key}", text=record)
    for host in (alpha, beta, gamma):
        wait_status(host.daemon, "its peers", lambda s: (s["peers"]["count"], s["state"]) == (3, "in sync"))
    status = alpha.daemon.status()["data_plane"]
    yield Scene(alpha, beta, gamma, plain, subnets)
    said: Any = flannelctl(alpha, "status", "--json")
    assert said.json["data_plane"]["pid"] == status["pid"]
    assert said.json["data_plane"]["runs"] == request.param
    for host in (alpha, beta, gamma):
        assert host.daemon.status()["data_plane"]["restarts"] == 0
        assert host.pod.ping((beta if host is alpha else alpha).pod.address).lost == 0


# --- from the wire --------------------------------------------------------------------------------


def misdirected(scene: Scene) -> Crafted:
    """What a peer, beta, may not send to alpha."""
    source, source6 = scene.pod(scene.beta), scene.pod(scene.beta, 6)
    target, target6 = scene.pod(scene.alpha), scene.pod(scene.alpha, 6)
    elsewhere = [
        scene.pod(scene.gamma),
        source,
        scene.alpha.address,
        "10.5.250.1",
        "8.8.8.8",
        "127.0.0.1",
        "224.0.0.1",
        "255.255.255.255",
        UNSPECIFIED,
    ]
    elsewhere6 = [scene.pod(scene.gamma, 6), source6, scene.alpha.address6, "::1", "::", "ff02::1", "fe80::1"]
    others = [scene.pod(scene.gamma), target, "10.5.250.1", "10.5.255.255"]
    others6 = [scene.pod(scene.gamma, 6), target6, "fd00:5:0:fff::1"]
    return [
        *(("inner-destination", ipv4(source, address, BAD)) for address in elsewhere),
        *(("inner-destination", ipv6(source6, address, BAD)) for address in elsewhere6),
        *(("inner-source", ipv4(address, target, BAD)) for address in others),
        *(("inner-source", ipv6(address, target6, BAD)) for address in others6),
        ("inner-destination", ipv4(scene.pod(scene.gamma), scene.pod(scene.gamma), BAD)),
    ]


def forwarded(scene: Scene) -> list[bytes]:
    """What beta may send to alpha's pod, odd as it is."""
    source, source6 = scene.pod(scene.beta), scene.pod(scene.beta, 6)
    target, target6 = scene.pod(scene.alpha), scene.pod(scene.alpha, 6)
    within = ipv4(source, scene.pod(scene.gamma), GOOD)
    return [
        ipv4(source, target, GOOD),
        ipv4("203.0.113.5", target, GOOD),  # outside the Network: a host without masquerade
        ipv4(source, target, GOOD, ttl=255),
        ipv4(source, target, GOOD, options=b"\1\1\1\0"),
        ipv4(source, target, GOOD * 3, field=MF),
        ipv4(source, target, GOOD, field=3),
        ipv4(source, target, within, protocol=IPV4_IN),  # the pod's affair
        ipv4(source, target, GOOD * 500),  # longer than the MTU, and may be fragmented
        ipv6(source6, target6, GOOD),
        ipv6(source6, target6, padding(OPTIONS6) + padding(EXPERIMENT) + GOOD, following=HOP_BY_HOP),
        ipv6(source6, target6, fragment6(EXPERIMENT, 0, more=True) + GOOD, following=FRAGMENT),
        ipv6(source6, target6, fragment6(EXPERIMENT, 8, more=False) + GOOD, following=FRAGMENT),
    ]


def left_to_the_kernel(scene: Scene) -> list[bytes]:
    """Sources outside the Network pass SourceCheck, but nothing comes from these."""
    target, target6 = scene.pod(scene.alpha), scene.pod(scene.alpha, 6)
    martians = ["127.0.0.1", "224.0.0.1", "255.255.255.255", UNSPECIFIED, scene.alpha.address]
    return [
        *(ipv4(address, target, LONE) for address in martians),
        *(ipv6(address, target6, LONE) for address in ("::1", "ff02::1")),
    ]


def test_from_the_wire(lab: Lab, scene: Scene) -> None:
    alpha, beta = scene.alpha, scene.beta
    ends = (scene.pod(beta), scene.pod(alpha), scene.pod(beta, 6), scene.pod(alpha, 6))
    watches = [Watch(host) for host in (alpha, scene.gamma)]
    before = drops(alpha, "rx")
    expected: Counter[str] = Counter()

    bad = wrong_on_arrival(*ends)
    from_wire(beta, beta.address, alpha, (packet for _, packet in bad + misdirected(scene)))
    expected.update(reason for reason, _ in bad + misdirected(scene))
    from_wire(lab.underlay, STRANGER, alpha, (packet for _, packet in bad))
    expected.update(reason for reason, _ in bad)

    spoofed = [packet.replace(GOOD, BAD) for packet in forwarded(scene)]
    from_wire(lab.underlay, STRANGER, alpha, spoofed)  # as beta's pod would, but it is not beta
    expected["outer-source-unknown"] += len(spoofed)
    own6 = ipv6(str(ip_network(scene.plain_subnets[6])[9]), scene.pod(alpha, 6), BAD)
    from_wire(scene.plain, scene.plain.address, alpha, [own6])
    expected["ipv6-not-agreed"] += 1

    good = forwarded(scene)
    from_wire(beta, beta.address, alpha, good + left_to_the_kernel(scene))
    wait_drops(alpha, "rx", before, expected)

    answers = IcmpErrors(beta.pod)
    with ExitStack() as stack:
        stack.callback(answers.close)
        wide = ipv4(scene.pod(beta), scene.pod(alpha), LONE * 500, field=DF)
        from_wire(beta, beta.address, alpha, [wide])
        assert answers.next()[1:4] == (3, 4, MTU)
        from_wire(beta, beta.address, alpha, [ipv4(scene.pod(beta), scene.pod(alpha), LONE, ttl=1)])
        assert answers.next()[1:3] == (11, 0)

    for watch in watches:
        watch.stop()
    assert len(holding(watches[0].arrived, GOOD)) == len(good) - 1 + OF_LONG
    assert max(len(packet) for packet in watches[0].arrived) <= MTU + 14
    assert not holding(watches[1].arrived, GOOD)
    for watch in watches:
        assert not holding(watch.arrived, BAD) + holding(watch.arrived, LONE)
        assert not holding(watch.sent, BAD)
        assert misled(watch.sent, scene.owners) == []


def seen(host: Host, direction: str) -> int:
    return passed(host, direction) + sum(drops(host, direction).values())


def overflow(host: Host) -> int:
    """What the TUN's queue had no room for."""
    number: int = host.ip("-s", "link", "show", "dev", "flannel0")[0]["stats64"]["tx"]["dropped"]
    return number


def test_of_mutated_packets_each_is_forwarded_or_counted(scene: Scene) -> None:
    """In both directions; the same pump still runs afterwards, which the fixture looks at."""
    alpha, beta = scene.alpha, scene.beta
    there = [packet for packet in forwarded(scene) if len(packet) < 200]
    back = [
        ipv4(scene.pod(alpha), scene.pod(beta), GOOD * 4),
        ipv6(scene.pod(alpha, 6), scene.pod(beta, 6), GOOD * 4),
    ]
    watches = [Watch(host) for host in (alpha, scene.gamma)]
    some = mutated(there, MUTATED, 1)
    before = seen(alpha, "rx")
    from_wire(beta, beta.address, alpha, some)
    wait_for(lambda: seen(alpha, "rx") - before, 5, "all of them", lambda number: number >= len(some))
    some = mutated(back, MUTATED, 2)
    before = seen(alpha, "tx")
    into_tun(alpha, some)
    wait_for(
        lambda: seen(alpha, "tx") - before + overflow(alpha),
        5,
        "all of them",
        lambda number: number >= len(some),
    )
    for watch in watches:
        watch.stop()
        assert misled(watch.sent, scene.owners) == []


# --- into the TUN ---------------------------------------------------------------------------------


def not_to_be_sent(scene: Scene) -> Crafted:
    """What alpha's pump drops whoever has written it to the TUN."""
    source, source6 = scene.pod(scene.alpha), scene.pod(scene.alpha, 6)
    target, target6 = scene.pod(scene.gamma), scene.pod(scene.gamma, 6)
    nobodys = ["10.5.250.1", source, "8.8.8.8", "127.0.0.1", "224.0.0.251", "255.255.255.255", UNSPECIFIED]
    nobodys6 = [source6, "fd00:5:0:fff::1", "::", "::1", "ff02::fb", "fe80::1"]
    return [
        *malformed(source, target, source6, target6)[1:],  # a TUN takes no packet without a byte
        *(("no-route", ipv4(source, address, BAD)) for address in nobodys),
        *(("no-route", ipv6(source6, address, BAD)) for address in nobodys6),
        *(("ttl-exceeded", ipv4(source, target, BAD, ttl=ttl)) for ttl in (0, 1)),
        *(("ttl-exceeded", ipv6(source6, target6, BAD, hops=hops)) for hops in (0, 1)),
        ("ipv6-not-agreed", ipv6(source6, str(ip_network(scene.plain_subnets[6])[9]), BAD)),
    ]


def test_into_the_tun(scene: Scene) -> None:
    alpha, gamma = scene.alpha, scene.gamma
    watches = [Watch(host) for host in (alpha, scene.beta, gamma)]
    before = drops(alpha, "tx")
    bad = not_to_be_sent(scene)
    source, source6 = scene.pod(alpha), scene.pod(alpha, 6)
    target, target6 = scene.pod(gamma), scene.pod(gamma, 6)
    good = [
        ipv4(source, target, GOOD, ttl=2),
        ipv4(source, target, GOOD, options=b"\1\1\1\0"),
        ipv4(source, target, GOOD, field=3),
        ipv4(source, target, ipv4(source, scene.pod(scene.beta), GOOD), protocol=IPV4_IN),
        ipv6(source6, target6, padding(EXPERIMENT) + GOOD, following=HOP_BY_HOP),
        ipv6(source6, target6, fragment6(EXPERIMENT, 8, more=False) + GOOD, following=FRAGMENT),
    ]
    into_tun(alpha, [packet for _, packet in bad])
    into_tun(alpha, good)
    expected = Counter(reason for reason, _ in bad)

    def counted(found: Counter[str]) -> bool:
        # The kernel itself looks for IPv6 routers by multicast, in the first seconds of a device.
        others = found["no-route"] - expected["no-route"]
        return 0 <= others <= 4 and found - Counter({"no-route": others}) == expected

    wait_for(lambda: drops(alpha, "tx") - before, 5, "drops", counted)
    scene.alpha.pod.ping(target)
    for watch in watches:
        watch.stop()
    _, beta, theirs = watches
    assert not holding(beta.arrived, GOOD)
    assert len(holding(theirs.arrived, GOOD)) == len(good) - 1, "the first one's TTL ends with its next hop"
    for watch in watches:
        assert not holding((p for p in watch.sent if p.haslayer("UDP")), BAD)
        assert misled(watch.sent, scene.owners) == []


# --- what its sender hears ------------------------------------------------------------------------


def answered(
    source: str, source6: str, target: str, target6: str, tun: str, tun6: str
) -> list[tuple[bytes, tuple[str, int, int, int]]]:
    """Packet, and who says what: type, code, MTU."""
    nobody, nobody6, narrow = "10.5.250.1", "fd00:5:0:fff::1", NARROW - 28
    return [
        (ipv4(source, nobody, GOOD), (tun, 3, 0, 0)),
        (ipv4(source, nobody, GOOD, field=MF), (tun, 3, 0, 0)),
        (ipv4(source, nobody, GOOD, options=b"\1\1\1\0"), (tun, 3, 0, 0)),
        (ipv4(source, nobody, bytes([8]) + bytes(7), protocol=1), (tun, 3, 0, 0)),
        (ipv4(source, target, GOOD, ttl=2), (tun, 11, 0, 0)),
        (ipv4(source, target, GOOD * 170, field=DF), (tun, 3, 4, narrow)),
        (ipv4(source, target, GOOD * 171, field=DF), (tun, 3, 4, narrow)),
        (ipv6(source6, nobody6, GOOD), (tun6, 1, 0, 0)),
        (ipv6(source6, nobody6, padding(EXPERIMENT) + GOOD, following=HOP_BY_HOP), (tun6, 1, 0, 0)),
        (ipv6(source6, nobody6, bytes([128]) + bytes(7), following=ICMPV6), (tun6, 1, 0, 0)),
        (ipv6(source6, target6, GOOD, hops=2), (tun6, 3, 0, 0)),
        (ipv6(source6, target6, GOOD * 170), (tun6, 2, 0, narrow)),
    ]


def test_what_a_sender_is_told_and_what_not(scene: Scene) -> None:
    """From pods, so with one hop more: their host's."""
    alpha, gamma = scene.alpha, scene.gamma
    nets = subnets_of(own_key(alpha))
    tun, tun6 = (str(ip_network(nets[family]).network_address) for family in (4, 6))
    source, source6 = scene.pod(alpha), scene.pod(alpha, 6)
    alpha.ip("route", "add", gamma.address, "dev", "eth0", "mtu", str(NARROW))
    watch = Watch(alpha)
    before = drops(alpha, "tx")
    with ExitStack() as stack:
        errors = {family: IcmpErrors(alpha.pod, family) for family in (4, 6)}
        for family in errors.values():
            stack.callback(family.close)
        quiet = silent(source, source6, "10.5.250.1", "fd00:5:0:fff::1")
        quiet6 = no_single_sender("10.5.250.1", "fd00:5:0:fff::1")
        for packet in quiet:
            send_raw(alpha.pod, packet, destination(packet))
        into_tun(alpha, quiet6)
        for packet, answer in answered(source, source6, scene.pod(gamma), scene.pod(gamma, 6), tun, tun6):
            send_raw(alpha.pod, packet, destination(packet))
            *told, quoted = errors[packet[0] >> 4].next()
            assert tuple(told) == answer
            addresses = 12 if packet[0] >> 4 == 4 else 8
            assert quoted[addresses:] == packet[addresses : len(quoted)]
            assert len(quoted) >= min(len(packet), 548)
        asked = len(quiet) + len(quiet6) + 7
        wait_for(lambda: drops(alpha, "tx") - before, 5, "the drops", lambda n: n["no-route"] >= asked)
        # There was one allowance of a hundred ICMP errors a second for all, which a scan took.
        scan = [ipv4("203.0.113.9", "10.5.250.1", BAD)] * 300
        wide = ipv4(source, scene.pod(gamma), GOOD * 170, field=DF)
        for _ in range(2):
            into_tun(alpha, [*scan, wide])
            assert errors[4].next()[1:4] == (3, 4, NARROW - 28)
    watch.stop()
    assert not [
        packet for packet in watch.sent if packet.haslayer("ICMP") and packet["IP"].dst != "203.0.113.9"
    ], "nobody else is told"


# --- a flood --------------------------------------------------------------------------------------


def test_a_flood_of_small_packets_from_a_stranger(lab: Lab, scene: Scene) -> None:
    """As beta's pod would send them, each 64 bytes long and right in itself."""
    alpha, beta = scene.alpha, scene.beta
    watch = Watch(alpha)
    packet = ipv4(scene.pod(beta), scene.pod(alpha), BAD.ljust(44, b"."))
    assert len(packet) == 64
    program = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        f"s.connect(('{alpha.address}', {PORT}))\n"
        f"packet = bytes.fromhex('{packet.hex()}')\n"
        "while True:\n for _ in range(1000): s.send(packet)\n"
    )
    before = drops(alpha, "rx")
    flood = lab.underlay.spawn("flood", ["python3", "-c", program])
    deadline, slowest = time.monotonic() + FLOOD, 0.0
    try:
        while time.monotonic() < deadline:
            began = time.monotonic()
            said: Any = flannelctl(alpha, "status", "--json")
            slowest = max(slowest, time.monotonic() - began)
            assert said.json["data_plane"]["pid"]
    finally:
        lab.underlay.discard(flood)
    assert slowest < 3
    wait_for(
        lambda: (drops(alpha, "rx") - before)["outer-source-unknown"], 5, "the flood", lambda n: n > 1000
    )
    wait_for(
        lambda: beta.pod.ping(alpha.pod.address, 1, wait=1).lost, 2, "no loss behind it", lambda n: n == 0
    )
    assert beta.pod.ping(alpha.pod.address, wait=3).lost == 0
    watch.stop()
    assert not holding(watch.arrived, BAD)
    assert not holding(watch.sent, BAD)
