"""What an overlay costs: throughput and round trips between pods, by each backend and by plain routes.

All pairs of hosts stand side by side and take turns, so that noise of the machine meets all of them, and each
figure is also given as a ratio to the plain routes of the same round. The hosts share this machine's CPUs and
memory: read the ratios, not the absolute figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from flanneld_py.lab.cnibench import BRIDGE, add_overhead
from flanneld_py.lab.hosts import Host, Pod
from flanneld_py.lab.overlays import OVERLAYS, Overlay
from flanneld_py.lab.probes import tcp_throughput
from flanneld_py.lab.requirements import obstacle
from flanneld_py.lab.topology import Lab
from flanneld_py.lab.waiting import LabError, wait_for

_PINGS = 1000
PATHS = [
    variant
    for overlay in OVERLAYS.values()
    for variant in (
        [replace(overlay, options={"DataPlane": plane}) for plane in ("native", "python")]
        if overlay.backend == "udp"
        else [overlay]
    )
]
"""What is measured besides plain routes."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A pod on each of two hosts, and how they reach each other."""

    path: str
    client: Pod
    server: Pod


@dataclass(frozen=True, slots=True)
class Sample:
    """TCP throughput of one stream in Gbit/s; average round trip in µs."""

    throughput: float
    round_trip: float


def routed_pair(lab: Lab) -> Pair:
    """Two hosts with hand-made routes and without a daemon: what there is to lose."""
    hosts = lab.add_hosts("routes-a", "routes-b")
    for host in hosts:
        subnet = f"10.5.{host.number}.1/24"
        host.subnet_file.write_text(f"FLANNEL_SUBNET={subnet}\nFLANNEL_MTU={lab.underlay.mtu}\n")
        host.attach_pods()
    for host, other in (hosts, hosts[::-1]):
        host.ip("route", "add", f"10.5.{other.number}.0/24", "via", other.address)
    return _joined("plain routes", hosts)


def name_of(overlay: Overlay) -> str:
    """Of its row: `vxlan`, `udp-native`."""
    return "-".join((overlay.backend, *map(str, overlay.options.values())))


def overlay_pair(lab: Lab, overlay: Overlay) -> Pair:
    """Two hosts below a prefix of their own, joined by their daemons."""
    name = name_of(overlay)
    lab.etcd.prefix = f"/bench/{name}/network"
    lab.etcd.put_config(overlay.config)
    hosts = lab.add_hosts(f"{name}-a"[-12:], f"{name}-b"[-12:])
    for daemon in [host.start_daemon() for host in hosts]:
        daemon.wait_ready()
    for host in hosts:
        host.attach_pods()
    return _joined(name, hosts)


def _joined(path: str, hosts: Sequence[Host]) -> Pair:
    client, server = (host.pod for host in hosts)
    wait_for(lambda: client.ping(server.address, 1).received, 10, f"pods to reach each other by {path}")
    return Pair(path, client, server)


def measure(pair: Pair, seconds: int) -> Sample:
    """One sample, which takes about a second more than `seconds`.

    Raises:
        LabError: pings were lost.
    """
    address = pair.server.address
    pings = pair.client.ping(address, _PINGS, 0.001)
    if pings.lost or pings.rtt is None:
        raise LabError(f"{pings.lost} of {pings.sent} pings were lost by {pair.path}")
    stream = tcp_throughput(pair.client, pair.server, address, seconds)
    return Sample(stream.bits_per_second / 1e9, pings.rtt * 1000)


def bench(rounds: int = 5, seconds: int = 2, say: Callable[[str], None] = print) -> None:
    """Measure all paths `rounds` times in turn and print medians, ranges, and ratios.

    Args:
        rounds: samples of each path.
        seconds: length of each TCP stream (iperf3 takes whole seconds, and 0 for endless).
        say: prints one line.

    Raises:
        LabError: this machine cannot do it, or pings were lost.
    """
    links = {overlay.link for overlay in OVERLAYS.values() if overlay.link}
    if (reason := obstacle(commands=["iperf3", str(BRIDGE)], links=links)) is not None:
        raise LabError(f"The bench cannot run here: {reason}")
    with Lab() as lab:
        for line in add_overhead(lab):
            say(line)
        pairs = [routed_pair(lab), *(overlay_pair(lab, overlay) for overlay in PATHS)]
        say(f"{rounds} rounds of {len(pairs)} paths, {seconds} s of TCP and {_PINGS} pings each")
        samples: dict[str, list[Sample]] = {pair.path: [] for pair in pairs}
        for number in range(1, rounds + 1):
            for pair in pairs:
                samples[pair.path].append(measure(pair, seconds))
            latest = ", ".join(f"{path} {taken[-1].throughput:.1f}" for path, taken in samples.items())
            say(f"round {number}: {latest} Gbit/s")
    for line in table(samples):
        say(line)


def table(samples: dict[str, list[Sample]]) -> list[str]:
    """Path by path: median (lowest to highest) of each figure, and its median ratio to the first path's."""
    lines = [f"{'':<13}{'TCP, Gbit/s':>20}{'ratio':>8}{'round trip, µs':>22}{'ratio':>8}"]
    base = next(iter(samples.values()))
    for path, taken in samples.items():
        throughput = _columns([s.throughput for s in taken], [s.throughput for s in base], 1)
        round_trip = _columns([s.round_trip for s in taken], [s.round_trip for s in base], 0)
        lines.append(f"{path:<13}{throughput:>28}{round_trip:>30}")
    return lines


def _columns(values: Sequence[float], base: Sequence[float], digits: int) -> str:
    ratio = median(value / plain for value, plain in zip(values, base, strict=True))
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({least} to {most}){ratio:>8.2f}"
