"""Three hosts join an overlay, talk through it, and lose parts of it, which come back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Network, ip_interface
from itertools import permutations

from flanneld_py.lab.capture import Capture
from flanneld_py.lab.hosts import Host
from flanneld_py.lab.narration import Finding, Narrator
from flanneld_py.lab.overlays import NETWORK, OVERLAYS, Overlay
from flanneld_py.lab.probes import tcp_throughput
from flanneld_py.lab.requirements import obstacle
from flanneld_py.lab.topology import Lab
from flanneld_py.lab.waiting import LabError, wait_for

EXIT_WELL, EXIT_FAILED, EXIT_IMPOSSIBLE = 0, 1, 2
_LOG_LINES = 15
_IPERF_SECONDS = 3


def demo(backends: Sequence[str] = tuple(OVERLAYS)) -> int:
    """Show each backend in turn; returns the exit code."""
    overlays = [OVERLAYS[backend] for backend in backends]
    links = {overlay.link for overlay in overlays if overlay.link}
    if (reason := obstacle(commands=("iperf3", "tcpdump"), links=links)) is not None:
        print(f"The demo cannot run here: {reason}")
        return EXIT_IMPOSSIBLE
    narrator = Narrator()
    findings: list[Finding] = []
    for overlay in overlays:
        narrator.heading(overlay.backend)
        with Lab() as lab:
            findings += Story(lab, overlay, narrator).tell()
    narrator.summary(findings)
    return EXIT_WELL if all(finding.passed for finding in findings) else EXIT_FAILED


class Story:
    """One backend, from the empty registry to the last repair."""

    def __init__(self, lab: Lab, overlay: Overlay, narrator: Narrator) -> None:
        self._lab = lab
        self._overlay = overlay
        self._narrator = narrator
        self._findings: list[Finding] = []

    def tell(self) -> list[Finding]:
        """All checks in order. When the overlay does not come up at all, the rest is not tried."""
        if self._check("hosts join", self._join):
            self._check("MTU", self._mtu)
            self._check("full-MTU pings, all pairs of pods", self._pings)
            self._check("on the wire", self._wire)
            self._check(f"iperf3, {_IPERF_SECONDS} s", self._throughput)
            self._check("daemon killed and restarted", self._kill)
            self._check("route deleted", self._delete_route)
            if self._overlay.device:
                self._check(f"{self._overlay.device} deleted", self._delete_device)
        return self._findings

    def _check(self, name: str, attempt: Callable[[], str]) -> bool:
        try:
            result, passed = attempt(), True
        except LabError as error:
            result, passed = str(error).partition("\n")[0], False
        finding = Finding(self._overlay.backend, name, result, passed)
        self._findings.append(finding)
        self._narrator.finding(finding)
        if not passed:
            for title, text in self._lab.report(_LOG_LINES):
                self._narrator.lines([f"--- {title}", *text.splitlines()])
        return passed

    @property
    def _hosts(self) -> tuple[Host, Host, Host]:
        a, b, c = self._lab.hosts
        return a, b, c

    def _join(self) -> str:
        tell, lab = self._narrator, self._lab
        tell.say(f"{lab.etcd.version()} answers at {lab.etcd.endpoint}")
        tell.command(["etcdctl", "put", f"{lab.etcd.prefix}/config", self._overlay.config], "ETCDCTL_API=3 ")
        lab.etcd.put_config(self._overlay.config)
        hosts = lab.add_hosts("a", "b", "c")
        addresses = ", ".join(f"{host.name} {host.address}" for host in hosts)
        tell.say(f"hosts {addresses}: network namespaces on one bridge; on each of them:")
        tell.command(["flanneld-py", *hosts[0].flags])
        for host in hosts if self._overlay.in_user_space else ():
            host.keep_descriptors()
        started = time.monotonic()
        daemons = [host.start_daemon() for host in hosts]
        ready = [daemon.wait_ready() for daemon in daemons]
        for host in hosts:
            host.attach_pods()
        rows = [
            (host.name, _subnet(host), host.subnet_env()["FLANNEL_MTU"], host.pod.address, f"{after:.2f} s")
            for host, after in zip(hosts, ready, strict=True)
        ]
        tell.table(("host", "subnet", "MTU", "pod", "ready after"), rows)
        subnets = {IPv4Network(_subnet(host)) for host in hosts}
        network = IPv4Network(NETWORK)
        if len(subnets) != len(hosts) or not all(subnet.subnet_of(network) for subnet in subnets):
            raise LabError(f"leased {subnets}: not {len(hosts)} subnets of {NETWORK}")
        for source, target in permutations(hosts, 2):
            self._wait_answer(source, target)
        if self._overlay.in_user_space:
            runs = {host.daemon.status()["data_plane"]["runs"] for host in hosts}
            tell.say(
                f"packets are carried by: {', '.join(sorted(runs))} (native: compiled; python: much slower)"
            )
        times = f"ready after {max(ready):.2f} s, pings after {_since(started)}"
        return f"{len(subnets)} subnets of {NETWORK}, {times}"

    def _wait_answer(self, source: Host, target: Host) -> None:
        wait_for(
            lambda: source.pod.ping(target.pod.address, 1, wait=0.2).received,
            10,
            f"an answer of {target.name}'s pod {target.pod.address} to {source.name}'s",
        )

    def _mtu(self) -> str:
        expected = self._lab.underlay.mtu - self._overlay.overhead
        seen = {host.name: int(host.subnet_env()["FLANNEL_MTU"]) for host in self._hosts}
        if set(seen.values()) != {expected}:
            raise LabError(f"FLANNEL_MTU is {seen}, expected {expected}")
        return f"{expected}: the underlay's {self._lab.underlay.mtu}, less {self._overlay.overhead}"

    def _pings(self) -> str:
        sent = received = 0
        for source, target in permutations(self._hosts, 2):
            mtu = int(source.subnet_env()["FLANNEL_MTU"])
            result = source.pod.ping(target.pod.address, 5, size=mtu, df=True)
            pods = f"{source.pod.address} > {target.pod.address}"
            self._narrator.lines([f"{pods}: {result.received} of {result.sent}, {result.rtt or 0:.3f} ms"])
            sent, received = sent + result.sent, received + result.received
        if received != sent:
            raise LabError(f"{sent - received} of {sent} lost")
        return f"{sent} packets with DF, 0 lost"

    def _wire(self) -> str:
        a, b, _ = self._hosts
        capture = Capture(self._lab.underlay, self._lab.underlay.port(a.name), self._overlay.expression)
        mtu = int(a.subnet_env()["FLANNEL_MTU"])
        a.pod.ping(b.pod.address, 1, size=mtu, df=True)
        capture.wait_packet()
        lines = self._overlay.decode(capture.stop(), a, b)
        self._narrator.lines(lines)
        return f"captured between {a.name} and {b.name} and decoded"

    def _throughput(self) -> str:
        a, b, _ = self._hosts
        result = tcp_throughput(a.pod, b.pod, b.pod.address, _IPERF_SECONDS)
        if not result.bits_per_second:
            raise LabError("nothing arrived")
        return f"{result.bits_per_second / 1e9:.1f} Gbit/s, one TCP stream"

    def _kill(self) -> str:
        a, b, _ = self._hosts
        subnet = _subnet(b)
        ping = a.pod.start_ping(b.pod.address)
        self._wait_more(ping.answered, "before the kill")
        self._narrator.say(f"kill -9 {b.daemon.pid}: the daemon of {b.name}, which {a.name}'s pod pings")
        b.daemon.kill()
        if self._overlay.in_user_space:
            self._narrator.say(
                "its packets wait in descriptors that the service manager keeps; starting it again"
            )
        else:
            self._wait_more(ping.answered, f"without a daemon on {b.name}")
            self._narrator.say(f"pings go on; starting it again, {ping.answered()} answers so far")
        ready = b.start_daemon().wait_ready()
        self._wait_more(ping.answered, "after the restart")
        loss = ping.stop()
        if _subnet(b) != subnet:
            raise LabError(f"the new daemon leased {_subnet(b)}; the old one had {subnet}")
        if loss.lost:
            gap = f"{loss.longest_gap * 1000:.0f} ms at most without an answer"
            raise LabError(f"{len(loss.lost)} of {loss.sent} pings lost, {gap}: {loss.lost[:20]}")
        return f"0 of {loss.sent} pings lost, ready again after {ready:.2f} s with the same subnet"

    def _wait_more(self, answered: Callable[[], int], when: str) -> None:
        enough = answered() + 40
        wait_for(answered, 10, f"pings to be answered {when}", lambda count: count >= enough)

    def _delete_route(self) -> str:
        a, b, _ = self._hosts
        subnet = NETWORK if self._overlay.in_user_space else _subnet(b)
        before = _route(a, subnet)
        command = ["ip", "route", "delete", subnet]
        return self._break(command, f"the route to {subnet}", lambda: _route(a, subnet) == before)

    def _delete_device(self) -> str:
        a, _, c = self._hosts
        device = self._overlay.device or ""
        before = _device(a, device)
        result = self._break(["ip", "link", "delete", device], device, lambda: _device(a, device) == before)
        self._wait_answer(a, c)
        return result

    def _break(self, command: Sequence[str], what: str, is_back: Callable[[], bool]) -> str:
        """Delete something on host a while its pod pings b's, and wait until all is well again."""
        a, b, _ = self._hosts
        ping = a.pod.start_ping(b.pod.address)
        self._wait_more(ping.answered, "before")
        self._narrator.command(command)
        started = time.monotonic()
        a.run(command)
        wait_for(is_back, 10, f"{what} to be back")
        back = _since(started)
        self._wait_more(ping.answered, f"after {what} is back")
        loss = ping.stop()
        outage = f"at most {loss.longest_gap * 1000:.0f} ms without an answer"
        return f"back within {back}; {len(loss.lost)} of {loss.sent} pings lost, {outage}"


def _subnet(host: Host) -> str:
    """The leased subnet: the network of FLANNEL_SUBNET."""
    return str(ip_interface(host.subnet_env()["FLANNEL_SUBNET"]).network)


def _route(source: Host, destination: str) -> list[dict[str, object]]:
    """The route of a host to a network, without the number of its nexthop object."""
    routes = source.ip("route", "show", destination)
    return [{key: value for key, value in route.items() if key != "nhid"} for route in routes]


def _device(host: Host, device: str) -> dict[str, object]:
    """Of an overlay's device MTU, and MAC, VNI, port where it has them; empty when there is none."""
    for link in host.ip("link", "show"):
        if link["ifname"] == device:
            data = link["linkinfo"]["info_data"]
            own = {name: data[name] for name in ("id", "port") if name in data}
            return {"mac": link.get("address"), "mtu": link["mtu"], **own}
    return {}


def _since(start: float) -> str:
    return f"{(time.monotonic() - start) * 1000:.0f} ms"
