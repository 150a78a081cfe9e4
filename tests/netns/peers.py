"""Peers that exist only in etcd: records as a Go flannel node writes them, under its own etcd lease."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flanneld_py.lab import EtcdServer

LIFETIME = 86_400
"""Seconds; of a lease of flannel's."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A node as it appears to others."""

    subnet: str
    public: str
    mac: str

    @property
    def base(self) -> str:
        return self.subnet.partition("/")[0]

    @property
    def key(self) -> str:
        return self.subnet.replace("/", "-")

    def record(self, backend: str) -> dict[str, Any]:
        record: dict[str, Any] = {"PublicIP": self.public, "PublicIPv6": None}
        if backend != "udp":  # flannel writes no type then
            record["BackendType"] = backend
        return record | ({"BackendData": {"VNI": 1, "VtepMAC": self.mac}} if backend == "vxlan" else {})


def make_peers(etcd: EtcdServer, count: int) -> list[Peer]:
    """Peers at 192.0.2.100 and up, in subnets of 10.5.0.0/16 that nobody has leased; not stored yet."""
    taken = {key.partition("&")[0] for key in etcd.leases()}
    free = [number for number in range(1, 255) if f"10.5.{number}.0-24" not in taken]
    return [
        Peer(f"10.5.{number}.0/24", f"192.0.2.{100 + n}", f"02:00:05:00:00:{n:02x}")
        for n, number in enumerate(free[:count])
    ]


def change_peers(
    etcd: EtcdServer, backend: str, *, put: Iterable[Peer] = (), gone: Iterable[Peer] = ()
) -> None:
    """Store and remove records, all in one revision."""
    lease = etcd.grant(LIFETIME)
    requests = [f"del {etcd.prefix}/subnets/{peer.key}" for peer in gone]
    for peer in put:
        value = json.dumps(peer.record(backend), separators=(",", ":"))
        # Quoted twice: in a transaction etcdctl takes Go strings, and cuts off what is in single quotes.
        requests.append(f"put --lease={lease} {etcd.prefix}/subnets/{peer.key} {json.dumps(value)}")
    etcd.ctl("txn", text="\n" + "\n".join(requests) + "\n\n\n")
