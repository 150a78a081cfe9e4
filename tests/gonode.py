"""A host that runs Go flannel, played from the compatibility contract alone; imports nothing of the product.

As a process in a host's namespace it leases a subnet, programs the kernel, and follows the others as flannel
0.28 does, IPv4 with vxlan, host-gw or udp, its defects included:

* one unreadable event under the prefix counts as an empty listing, so that all peers go (S1);
* every later listing reports the own lease as removed (S2) and misses changed attributes (S3);
* a lost race for a key ends the process (S9), and every write but that one is blind (S11).

With `--fleet N` it leases subnets for N such hosts, without a kernel, and ends.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tests.goproxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

LEASE_SECONDS = 86_400
CANDIDATES = 100
RECHECK_SECONDS = 10.0
VXLAN_OVERHEAD = 50
UDP_OVERHEAD, UDP_PORT = 28, 8285
KEY = re.compile(r"(\d+\.\d+\.\d+\.\d+)-(\d+)(?:&([a-f0-9:]+)-(\d+))?$")


# --- etcd -----------------------------------------------------------------------------------------


class Etcd:
    """etcd's JSON gateway."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint.split(",", maxsplit=1)[0])
        self._address = (parts.hostname or "127.0.0.1", parts.port or 2379)

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection(*self._address, timeout=10)
        try:
            connection.request("POST", f"/v3/{path}", json.dumps(body))
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer
        finally:
            connection.close()

    def grant(self) -> str:
        return str(self.call("lease/grant", {"TTL": LEASE_SECONDS})["ID"])

    def put(self, key: str, value: str) -> None:
        self.call("kv/put", {"key": _b64(key), "value": _b64(value), "lease": self.grant()})

    def create(self, key: str, value: str) -> bool:
        absent = {"key": _b64(key), "target": "VERSION", "result": "EQUAL", "version": "0"}
        put = {"key": _b64(key), "value": _b64(value), "lease": self.grant()}
        return "succeeded" in self.call("kv/txn", {"compare": [absent], "success": [{"requestPut": put}]})

    def delete(self, key: str) -> None:
        self.call("kv/deleterange", {"key": _b64(key)})

    def get(self, key: str) -> str | None:
        kvs = self.call("kv/range", {"key": _b64(key)}).get("kvs", [])
        return _text(kvs[0]["value"]) if kvs else None

    def list(self, prefix: str) -> tuple[int, list[tuple[str, str]]]:
        """Revision, and keys with values."""
        answer = self.call("kv/range", {"key": _b64(prefix), "range_end": _b64(_end(prefix))})
        pairs = [(_text(kv["key"]), _text(kv.get("value", ""))) for kv in answer.get("kvs", [])]
        return int(answer["header"]["revision"]), pairs

    def watch(self, prefix: str, revision: int) -> Iterator[dict[str, Any]]:
        """Results of one stream, until it ends."""
        connection = http.client.HTTPConnection(*self._address)
        request = {"key": _b64(prefix), "range_end": _b64(_end(prefix)), "start_revision": str(revision)}
        try:
            connection.request("POST", "/v3/watch", json.dumps({"create_request": request}))
            answer = connection.getresponse()
            while line := answer.readline():
                yield json.loads(line).get("result", {})
        finally:
            connection.close()


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _text(coded: str) -> str:
    return base64.b64decode(coded).decode(errors="replace")


def _end(prefix: str) -> str:
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


# --- registry -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lease:
    subnet: IPv4Network
    public: str
    backend: str = ""
    data: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        return str(self.subnet).replace("/", "-")

    @property
    def value(self) -> str:
        fields: dict[str, Any] = {"PublicIP": self.public, "PublicIPv6": None}
        if self.backend:
            fields["BackendType"] = self.backend
        if self.data:
            fields["BackendData"] = self.data
        return json.dumps(fields, separators=(",", ":"))


def parse_key(key: str) -> IPv4Network:
    """Anchored at the end only, as flannel reads it."""
    found = KEY.search(key)
    if found is None:
        raise ValueError(key)
    return IPv4Network(f"{found[1]}/{found[2]}", strict=False)


def parse_lease(key: str, value: str) -> Lease:
    fields = {name.lower(): given for name, given in json.loads(value).items()}
    public = str(IPv4Address(fields.get("publicip", "0.0.0.0")))  # noqa: S104 - as it stands for "none"
    return Lease(parse_key(key), public, fields.get("backendtype", ""), fields.get("backenddata") or {})


@dataclass(frozen=True)
class Config:
    network: IPv4Network
    length: int
    lowest: int
    highest: int
    backend: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Config:
        fields = {name.lower(): given for name, given in json.loads(text).items()}
        network = IPv4Network(fields["network"], strict=False)
        length = fields.get("subnetlen") or max(24, network.prefixlen + 2)
        size = 1 << 32 - length
        lowest = int(IPv4Address(fields.get("subnetmin", str(network[0] + size))))
        highest = int(IPv4Address(fields.get("subnetmax", str(network[-1] - size + 1))))
        backend = {name.lower(): given for name, given in fields.get("backend", {"Type": "udp"}).items()}
        return cls(network, length, lowest, highest, backend)

    @property
    def type(self) -> str:
        return str(self.backend["type"]).lower()

    @property
    def published(self) -> str:
        """Records of udp bear no type."""
        return "" if self.type == "udp" else self.type

    def allows(self, subnet: IPv4Network) -> bool:
        return subnet.prefixlen == self.length and self.lowest <= int(subnet[0]) <= self.highest

    def candidates(self, taken: Iterable[IPv4Network]) -> list[IPv4Network]:
        """The lowest free ones."""
        taken, free = set(taken), []
        others = [subnet for subnet in taken if subnet.prefixlen != self.length]
        for base in range(self.lowest, self.highest + 1, 1 << 32 - self.length):
            subnet = IPv4Network((base, self.length))
            if subnet not in taken and not any(subnet.overlaps(other) for other in others):
                free.append(subnet)
            if len(free) == CANDIDATES:
                break
        return free


class Registry:
    def __init__(self, etcd: Etcd, prefix: str) -> None:
        self.etcd, self.prefix = etcd, prefix.rstrip("/")

    def config(self) -> Config:
        while (text := self.etcd.get(f"{self.prefix}/config")) is None:
            time.sleep(1)
        return Config.parse(text)

    def leases(self) -> tuple[int, list[Lease]]:
        """Revision and leases; what cannot be read is passed over."""
        revision, pairs = self.etcd.list(f"{self.prefix}/subnets")
        leases = []
        for key, value in pairs:
            try:
                leases.append(parse_lease(key, value))
            except (ValueError, AttributeError):
                continue
        return revision, leases

    def path(self, lease: Lease) -> str:
        return f"{self.prefix}/subnets/{lease.key}"

    def acquire(
        self, config: Config, public: str, data: dict[str, Any], previous: IPv4Network | None
    ) -> Lease:
        _, leases = self.leases()
        for lease in leases:
            if lease.public == public:
                if config.allows(lease.subnet):
                    return self._write(Lease(lease.subnet, public, config.published, data))
                self.etcd.delete(self.path(lease))
                leases.remove(lease)
                break
        taken = [lease.subnet for lease in leases]
        if previous is not None and previous not in taken and config.allows(previous):
            subnet = previous
        else:
            subnet = random.choice(config.candidates(taken))
        lease = Lease(subnet, public, config.published, data)
        if not self.etcd.create(self.path(lease), lease.value):
            sys.exit("lost the race for a subnet")
        return lease

    def _write(self, lease: Lease) -> Lease:
        self.etcd.put(self.path(lease), lease.value)
        return lease


# --- kernel ---------------------------------------------------------------------------------------


def ip(*args: str) -> Any:
    done = subprocess.run(["ip", "-j", "-d", *args], capture_output=True, text=True, check=True)
    return json.loads(done.stdout or "[]")


def batch(tool: str, lines: Sequence[str]) -> None:
    """Carry out many commands; one that fails keeps no other from being tried."""
    if lines:
        text = "".join(f"{line}\n" for line in lines)
        subprocess.run(
            [tool, "-force", "-batch", "-"], input=text, capture_output=True, text=True, check=False
        )


class Vxlan:
    def __init__(self, config: Config, iface: str, address: str, mtu: int) -> None:
        self.vni, self.port = config.backend.get("vni", 1), config.backend.get("port", 0)
        self.device, self.network = f"flannel.{self.vni}", config.network
        self.mtu = config.backend.get("mtu", mtu) - VXLAN_OVERHEAD
        index = ip("link", "show", "dev", iface)[0]["ifname"]
        links = {link["ifname"]: link for link in ip("link", "show")}
        if self.device in links and not self._fits(links[self.device], index, address):
            subprocess.run(["ip", "link", "delete", self.device], check=True)
            del links[self.device]
        if self.device not in links:
            mac = bytes([random.randrange(256) & 0xFC | 2, *os.urandom(5)]).hex(":")
            port = ["dstport", str(self.port or 8472)]
            subprocess.run(
                [
                    *("ip", "link", "add", self.device, "address", mac, "mtu", str(self.mtu)),
                    *("txqueuelen", "0", "type", "vxlan", "id", str(self.vni), "dev", iface),
                    *("local", address, *port, "nolearning"),
                ],
                check=True,
            )
        self.mac = ip("link", "show", "dev", self.device)[0]["address"]

    def _fits(self, link: dict[str, Any], iface: str, address: str) -> bool:
        data = link.get("linkinfo", {}).get("info_data", {})
        return (
            link.get("linkinfo", {}).get("info_kind") == "vxlan"
            and data["id"] == self.vni
            and data.get("link") == iface
            and data.get("local") == address
            and (not self.port or data["port"] == self.port)
        )

    @property
    def data(self) -> dict[str, Any]:
        return {"VNI": self.vni, "VtepMAC": self.mac}

    def configure(self, own: Lease) -> None:
        wanted = f"{own.subnet[0]}/32"
        for entry in ip("address", "show", "dev", self.device)[0]["addr_info"]:
            held = f"{entry['local']}/{entry['prefixlen']}"
            inside = entry["family"] == "inet" and IPv4Address(entry["local"]) in self.network
            if inside and held != wanted:
                subprocess.run(["ip", "address", "delete", held, "dev", self.device], check=True)
        batch("ip", [f"address add {wanted} dev {self.device}"])
        subprocess.run(["ip", "link", "set", self.device, "up"], check=True)

    def add(self, leases: Iterable[Lease]) -> None:
        rows = [(lease.subnet, lease.data["VtepMAC"], lease.public) for lease in leases if lease.data]
        batch("ip", [f"neigh replace {s[0]} lladdr {m} dev {self.device} nud permanent" for s, m, _ in rows])
        batch("bridge", [f"fdb replace {m} dev {self.device} dst {p} self permanent" for _, m, p in rows])
        batch("ip", [f"route replace {s} via {s[0]} dev {self.device} onlink" for s, _, _ in rows])

    def remove(self, leases: Iterable[Lease]) -> None:
        rows = [(lease.subnet, lease.data["VtepMAC"], lease.public) for lease in leases if lease.data]
        batch("ip", [f"neigh delete {s[0]} dev {self.device}" for s, _, _ in rows])
        batch("bridge", [f"fdb delete {m} dev {self.device} dst {p} self" for _, m, p in rows])
        batch("ip", [f"route delete {s} via {s[0]} dev {self.device} onlink" for s, _, _ in rows])

    def recheck(self) -> None:
        """Nothing is."""


class HostGw:
    data: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def __init__(self, _config: Config, iface: str, _address: str, mtu: int) -> None:
        self.iface, self.mtu = iface, mtu
        self._wanted: dict[str, str] = {}
        self._lock = threading.Lock()

    def configure(self, own: Lease) -> None:
        """There is no device."""

    def add(self, leases: Iterable[Lease]) -> None:
        with self._lock:
            new = {str(lease.subnet): lease.public for lease in leases}
            self._wanted |= new
            found = self._routes()
            batch("ip", [f"route delete {s}" for s, via in new.items() if found.get(s, via) != via])
            self._add_missing(new)

    def remove(self, leases: Iterable[Lease]) -> None:
        with self._lock:
            gone = {str(lease.subnet): lease.public for lease in leases}
            for subnet in gone:
                self._wanted.pop(subnet, None)
            batch("ip", [f"route delete {s} via {via} dev {self.iface}" for s, via in gone.items()])

    def recheck(self) -> None:
        with self._lock:
            self._add_missing(self._wanted)

    def _routes(self) -> dict[str, str]:
        return {r["dst"]: r.get("gateway", "") for r in ip("route", "show", "table", "main")}

    def _add_missing(self, wanted: dict[str, str]) -> None:
        found = self._routes()
        missing = [(s, via) for s, via in wanted.items() if found.get(s) != via]
        batch("ip", [f"route add {s} via {via} dev {self.iface}" for s, via in missing])


class Udp:
    data: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def __init__(self, config: Config, _iface: str, address: str, mtu: int) -> None:
        self.network, self.mtu = config.network, mtu - UDP_OVERHEAD
        self._proxy = Proxy(address, config.backend.get("port") or UDP_PORT, self.mtu)

    def configure(self, own: Lease) -> None:
        device = self._proxy.device
        batch(
            "ip",
            [
                f"address add {own.subnet[0]}/32 dev {device}",
                f"link set {device} mtu {self.mtu} up",
                f"route add {self.network} dev {device} scope global",  # there being one is fine
            ],
        )
        self._proxy.start(own.subnet[0])

    def add(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            self._proxy.set(lease.subnet, lease.public)

    def remove(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            self._proxy.delete(lease.subnet)

    def recheck(self) -> None:
        """Nothing is."""


Backend = Vxlan | HostGw | Udp


# --- the host -------------------------------------------------------------------------------------


class Node:
    """Follows the registry in one thread."""

    def __init__(self, registry: Registry, backend: Backend, own: Lease, options: argparse.Namespace) -> None:
        self._registry, self._backend, self._own = registry, backend, own
        self._s1, self._s2, self._s3 = (name not in options.without for name in ("S1", "S2", "S3"))
        self._known: dict[str, Lease] = {}

    def run(self) -> None:
        while True:
            revision, leases = self._registry.leases()
            self._take_listing(leases)
            try:
                self._follow(revision + 1)
            except (OSError, ValueError, http.client.HTTPException):
                time.sleep(0.1)

    def _follow(self, revision: int) -> None:
        for result in self._registry.etcd.watch(f"{self._registry.prefix}/subnets", revision):
            if result.get("canceled"):
                return
            for event in result.get("events", []):
                self._take_event(event)

    def _take_event(self, event: dict[str, Any]) -> None:
        key = _text(event["kv"]["key"])
        try:
            if event.get("type") == "DELETE":
                gone = self._known.pop(str(parse_key(key)), None)
                self._backend.remove([gone] if gone and gone.key != self._own.key else [])
                if parse_key(key) == self._own.subnet:
                    os._exit(0)  # its lease was revoked
                return
            lease = parse_lease(key, _text(event["kv"].get("value", "")))
        except (ValueError, AttributeError):
            if self._s1:
                self._take_listing([])
            return
        self._known[str(lease.subnet)] = lease
        self._backend.add([lease] if self._is_peer(lease) else [])

    def _take_listing(self, leases: Sequence[Lease]) -> None:
        listed = {str(lease.subnet): lease for lease in leases}
        added = [
            lease
            for subnet, lease in listed.items()
            if subnet not in self._known or (not self._s3 and self._known[subnet] != lease)
        ]
        gone = [
            lease
            for subnet, lease in self._known.items()
            if (self._s2 and lease.key == self._own.key) or (subnet not in listed and self._is_peer(lease))
        ]
        self._known = listed
        self._backend.remove(gone)
        self._backend.add([lease for lease in added if self._is_peer(lease)])

    def _is_peer(self, lease: Lease) -> bool:
        alike = isinstance(self._backend, Udp) or lease.backend == self._own.backend
        return lease.key != self._own.key and alike


def play(options: argparse.Namespace) -> None:
    registry = Registry(Etcd(options.etcd_endpoints), options.etcd_prefix)
    config = registry.config()
    link = ip("address", "show", "dev", options.iface)[0]
    address = next(entry["local"] for entry in link["addr_info"] if entry["family"] == "inet")
    kinds: dict[str, type[Backend]] = {"vxlan": Vxlan, "host-gw": HostGw, "udp": Udp}
    backend = kinds[config.type](config, options.iface, address, link["mtu"])
    own = registry.acquire(config, address, backend.data, previous_subnet(options.subnet_file))
    backend.configure(own)
    write_subnet_file(options.subnet_file, config, own, backend.mtu)
    node = Node(registry, backend, own, options)
    threading.Thread(target=node.run, daemon=True).start()
    next_check = time.monotonic()
    next_put = time.monotonic() + options.renew_every
    while True:
        time.sleep(0.1)
        if time.monotonic() >= next_check:
            backend.recheck()
            next_check += RECHECK_SECONDS
        if time.monotonic() >= next_put:
            registry.etcd.put(registry.path(own), own.value)
            next_put += options.renew_every


def previous_subnet(path: Path) -> IPv4Network | None:
    try:
        found = re.search(r"^FLANNEL_SUBNET=(\S+)$", path.read_text(), re.MULTILINE)
    except FileNotFoundError:
        return None
    return IPv4Network(found[1], strict=False) if found else None


def write_subnet_file(path: Path, config: Config, own: Lease, mtu: int) -> None:
    lines = {
        "FLANNEL_NETWORK": config.network,
        "FLANNEL_SUBNET": f"{own.subnet[1]}/{own.subnet.prefixlen}",
        "FLANNEL_MTU": mtu,
        "FLANNEL_IPMASQ": "false",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    temporary.replace(path)


def play_fleet(options: argparse.Namespace) -> None:
    registry = Registry(Etcd(options.etcd_endpoints), options.etcd_prefix)
    config = registry.config()
    taken = {lease.subnet for lease in registry.leases()[1]}
    for number in range(options.fleet):
        mac = bytes([2, 0x60, 0, 0, number >> 8, number & 255]).hex(":")
        data = {"VNI": config.backend.get("vni", 1), "VtepMAC": mac} if config.type == "vxlan" else {}
        subnet = random.choice(config.candidates(taken))
        lease = Lease(subnet, str(IPv4Address(options.fleet_from) + number), config.published, data)
        if not registry.etcd.create(registry.path(lease), lease.value):
            sys.exit("lost the race for a subnet")
        taken.add(subnet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--etcd-endpoints", default="http://127.0.0.1:2379")
    parser.add_argument("--etcd-prefix", default="/coreos.com/network")
    parser.add_argument("--iface", default="eth0")
    parser.add_argument("--subnet-file", type=Path, default=Path("/run/flannel/subnet.env"))
    parser.add_argument("--renew-every", type=float, default=LEASE_SECONDS - 3600.0)
    parser.add_argument("--without", nargs="*", default=[], help="defects to leave out: S1, S2, S3")
    parser.add_argument("--fleet", type=int, default=0)
    parser.add_argument("--fleet-from", default="198.18.0.1", help="first address of the fleet")
    options, _ = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # everything stays behind
    (play_fleet if options.fleet else play)(options)


if __name__ == "__main__":
    main()
