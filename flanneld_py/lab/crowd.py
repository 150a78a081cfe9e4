"""Thousands of hosts that exist only in etcd, put there over one connection as fast as it takes them."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Self

from flanneld_py.lab.entering import inside
from flanneld_py.lab.etcd import EtcdServer
from flanneld_py.lab.waiting import LabError

NETWORK = IPv4Network("10.0.0.0/8")
"""The overlay: 65,536 subnets, of which ours is one of the last and the crowd's are the first."""
CONFIG = {
    "Network": str(NETWORK),
    "SubnetLen": 24,
    "SubnetMin": "10.250.0.0",
    "SubnetMax": "10.255.255.0",
}
UNDERLAY = IPv4Network("198.18.0.0/15")
"""Of the crowd (RFC 2544)."""
MOST = 63_000
TXN_OPS = 128
"""etcd's limit (--max-txn-ops)."""
LIFETIME = 86_400
_BACKEND_TYPES = {"vxlan": "vxlan", "host-gw": "host-gw", "udp": ""}


@dataclass(frozen=True, slots=True)
class Member:
    """One of the crowd, by its number from 0 to MOST - 1."""

    number: int

    @property
    def subnet(self) -> IPv4Network:
        return IPv4Network((int(NETWORK.network_address) + (self.number + 256 << 8), 24))

    @property
    def address(self) -> IPv4Address:
        return UNDERLAY[self.number + 256]

    def record(self, backend: str) -> str:
        """As a host with flanneld-py writes it; one without would be Go flannel."""
        number = self.number
        mac = f"02:00:05:{number >> 16:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"
        record: dict[str, Any] = {"PublicIP": str(self.address), "PublicIPv6": None}
        if _BACKEND_TYPES[backend]:
            record["BackendType"] = _BACKEND_TYPES[backend]
        if backend == "vxlan":
            record["BackendData"] = {"VNI": 1, "VtepMAC": mac}
        return json.dumps(record | {"NodeID": f"{number:032x}"}, separators=(",", ":"))


def members(count: int, first: int = 0) -> list[Member]:
    """So many in turn.

    Raises:
        LabError: there is no room for them.
    """
    if first + count > MOST:
        raise LabError(f"{count} leases from the {first}th on: expected at most {MOST} in all")
    return [Member(number) for number in range(first, first + count)]


class Crowd:
    """Puts and deletes the records of members, in etcd's own JSON (docs: grpc gateway). A context manager."""

    def __init__(self, etcd: EtcdServer, backend: str) -> None:
        self._prefix = f"{etcd.prefix}/subnets/"
        self._backend = backend
        self._connection = http.client.HTTPConnection("127.0.0.1", 2379, timeout=30)
        with inside(etcd.namespace):
            self._connection.connect()
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lease = self._ask("lease/grant", {"TTL": LIFETIME})["ID"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def put(self, some: Sequence[Member]) -> float:
        """Store them; the time.monotonic() at which the last request was sent."""
        return self._write([{"requestPut": self._put(member)} for member in some])

    def delete(self, some: Iterable[Member]) -> float:
        return self._write([{"requestDeleteRange": {"key": self._key(member)}} for member in some])

    def _put(self, member: Member) -> dict[str, str]:
        value = base64.b64encode(member.record(self._backend).encode()).decode()
        return {"key": self._key(member), "value": value, "lease": self._lease}

    def _key(self, member: Member) -> str:
        key = f"{self._prefix}{str(member.subnet).replace('/', '-')}"
        return base64.b64encode(key.encode()).decode()

    def _write(self, operations: Sequence[Mapping[str, Any]]) -> float:
        requests = [
            json.dumps({"success": operations[start : start + TXN_OPS]}).encode()
            for start in range(0, len(operations), TXN_OPS)
        ]
        sent = time.monotonic()
        for request in requests:
            sent = time.monotonic()
            self._post("kv/txn", request)
        return sent

    def _ask(self, what: str, request: Mapping[str, Any]) -> dict[str, Any]:
        return self._post(what, json.dumps(request).encode())

    def _post(self, what: str, body: bytes) -> dict[str, Any]:
        self._connection.request("POST", f"/v3/{what}", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise LabError(f"etcd: {what}: {answer.status} {text.decode(errors='replace')[:300]}")
        parsed: dict[str, Any] = json.loads(text)
        return parsed
