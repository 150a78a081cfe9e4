"""Thousands of hosts that exist only in etcd, put there as fast as it takes them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Self

from flanneld_py.lab.etcd import EtcdServer
from flanneld_py.lab.waiting import LabError, wait_for

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
LONGEST = 120.0
"""Seconds for any number of records."""
_END = [sys.executable, str(Path(__file__).with_name("crowd_end.py"))]
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
    """Puts and deletes the records of members. A context manager.

    Raises:
        LabError: etcd does not answer, or refuses.
    """

    def __init__(self, etcd: EtcdServer, backend: str) -> None:
        self._prefix = f"{etcd.prefix}/subnets/"
        self._backend = backend
        self._workspace = etcd.namespace.workspace
        command = [*_END, "127.0.0.1:2379", etcd.grant(LIFETIME), str(TXN_OPS)]
        entered = etcd.namespace.entered(command)
        self._end = self._workspace.spawn("crowd", entered, stdin=subprocess.PIPE)
        self._answered = 0
        try:
            self._answer()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._workspace.discard(self._end)
        self._end.stdout.unlink(missing_ok=True)

    def put(self, some: Iterable[Member]) -> float:
        """Store them; the time.monotonic() at which the last request was sent."""
        return self._write([(self._key(member), member.record(self._backend)) for member in some])

    def delete(self, some: Iterable[Member]) -> float:
        return self._write([(self._key(member), None) for member in some])

    def _key(self, member: Member) -> str:
        return f"{self._prefix}{str(member.subnet).replace('/', '-')}"

    def _write(self, rows: Sequence[tuple[str, str | None]]) -> float:
        stdin = self._end.popen.stdin
        if stdin is None:
            raise LabError("nothing puts the crowd's records")
        with suppress(BrokenPipeError):  # then no answer comes, which says why
            stdin.write(json.dumps(rows).encode() + b"\n")
            stdin.flush()
        return self._answer()

    def _answer(self) -> float:
        """The next line."""

        def found() -> list[str]:
            if not self._end.running:
                raise LabError(f"what puts the crowd's records failed: {self._end.output()[-2000:]}")
            lines = self._end.stdout.read_text().split("\n")[:-1]
            return lines[self._answered :]

        line = wait_for(found, LONGEST, "etcd to store records", interval=0.01)[0]
        self._answered += 1
        return int(line) / 1e9
