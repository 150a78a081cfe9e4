"""The ways from pod to pod that the bench compares: two hosts each, joined by routes or by daemons."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flanneld_py.lab.hosts import Host, Pod
from flanneld_py.lab.overlays import network_config
from flanneld_py.lab.topology import Lab
from flanneld_py.lab.waiting import LabError, wait_for

ROUTES = "plain routes"
BASE = "vxlan"
"""What the others are compared with."""
PATHS: Mapping[str, Mapping[str, str]] = {
    "host-gw": {},
    BASE: {},
    "udp native": {"DataPlane": "native"},
    "udp python": {"DataPlane": "python"},
}
"""Row → options of the backend that is its first word."""
PEER = "udp peer"


@dataclass(frozen=True, slots=True)
class Pair:
    """A pod on each of two hosts, and how they reach each other."""

    path: str
    hosts: tuple[Host, Host]

    @property
    def client(self) -> Pod:
        return self.hosts[0].pod

    @property
    def server(self) -> Pod:
        return self.hosts[1].pod


def routed_pair(lab: Lab) -> Pair:
    """Two hosts with hand-made routes and without a daemon: what there is to lose."""
    hosts = lab.add_hosts("routes-a", "routes-b")
    for host in hosts:
        subnet = f"10.5.{host.number}.1/24"
        host.subnet_file.write_text(f"FLANNEL_SUBNET={subnet}\nFLANNEL_MTU={lab.underlay.mtu}\n")
        host.attach_pods()
    for host, other in (hosts, hosts[::-1]):
        host.ip("route", "add", f"10.5.{other.number}.0/24", "via", other.address)
    return _joined(ROUTES, hosts)


def daemon_pair(lab: Lab, path: str) -> Pair:
    """Two hosts with our daemons, by one of PATHS."""
    backend, _, plane = path.partition(" ")
    hosts = _hosts(lab, path, plane or backend, network_config(backend, PATHS[path]))
    for daemon in [host.start_daemon() for host in hosts]:
        daemon.wait_ready()
    for host in hosts:
        _check_plane(host, plane)
        host.attach_pods()
    return _joined(path, hosts)


def _check_plane(host: Host, plane: str) -> None:
    if not plane:
        return
    told = wait_for(
        lambda: (host.daemon.status().get("data_plane") or {}).get("runs"), 10, f"a data plane of {host.name}"
    )
    if told != plane:
        raise LabError(f"the data plane of {host.name} is {told}, not {plane}")


def peer_pair(lab: Lab, program: Path) -> Pair:
    """Two hosts with another program that takes flannel's flags, and its backend udp.

    Raises:
        LabError: it cannot be executed, ended, or wrote no subnet file within 20 s.
    """
    if not os.access(program, os.X_OK) or not program.is_file():
        raise LabError(f"BENCH_PEER={program} is not a program that can be executed")
    hosts = _hosts(lab, PEER, "peer", network_config("udp"))
    for host in hosts:
        _start_peer(host, program.resolve())
    for host in hosts:
        host.attach_pods()
    return _joined(PEER, hosts)


def _start_peer(host: Host, program: Path) -> None:
    flags = {
        "etcd-endpoints": host.etcd.endpoint,
        "etcd-prefix": host.prefix,
        "iface": host.interface,
        "subnet-file": str(host.subnet_file),
        "ip-masq": "false",
    }
    process = host.spawn("peer", [str(program), *(f"-{flag}={value}" for flag, value in flags.items())])

    def joined() -> bool:
        if not process.running:
            raise LabError(f"{program} ended with {process.wait(1)}: {process.output()[-2000:]}")
        return bool(host.gateways())

    wait_for(joined, 20, f"{program} on {host.name} to write its subnet file")


def _hosts(lab: Lab, path: str, name: str, config: str) -> list[Host]:
    """Two of them, below a prefix of their own."""
    lab.etcd.prefix = f"/bench/{path.replace(' ', '-')}/network"
    lab.etcd.put_config(config)
    return lab.add_hosts(f"{name}-a", f"{name}-b")


def _joined(path: str, hosts: Sequence[Host]) -> Pair:
    first, second = hosts
    pair = Pair(path, (first, second))
    wait_for(
        lambda: pair.client.ping(pair.server.address, 1).received, 10, f"pods to reach each other by {path}"
    )
    return pair
