"""All of garbage.json in the registry at once: no peer is touched, and each piece is named with its reason.

What etcd holds comes from garbage.json alone, what the kernel holds is read with `ip` and `bridge`.
"""

from __future__ import annotations

import base64
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.netns.observing import codes, events, start_pings, wait_status
from tests.netns.oracle import own_key
from tests.netns.scenes import BACKENDS, NETWORK
from tests.netns.test_ctl import flannelctl

if TYPE_CHECKING:
    from flanneld_py.lab import EtcdServer, Host, Lab

CONFIG = {"Network": NETWORK, "SubnetMin": "10.5.100.0", "SubnetMax": "10.5.101.0"}
OWN, BETA = "10.5.100.0-24", "10.5.101.0-24"
GO_PEERS: dict[str, dict[str, Any]] = {
    "10.5.20.0-24&fd00:5:0:20::-64": {
        "PublicIP": "192.0.2.120",
        "PublicIPv6": "2001:db8::120",
        "BackendData": {"VNI": 1, "VtepMAC": "02:00:05:00:00:14"},
        "BackendV6Data": {"VNI": 1, "VtepMAC": "02:00:05:00:06:14"},
    },
    "10.5.22.0-24": {
        "PublicIP": "192.0.2.122",
        "PublicIPv6": None,
        "BackendData": {"VNI": 1, "VtepMAC": "02:00:05:00:00:16"},
    },
}
"""Two records as Go flannel writes them; the third good peer has a daemon."""
PEERS = len(GO_PEERS) + 1
ENDPOINT_INSIDE = "http://10.5.34.1:2379"
"""Nobody is there; the first endpoint answers."""
VIEWS = (
    ("ip", "-j", "-d", "-4", "route", "show", "table", "all"),
    ("ip", "-j", "-d", "-6", "route", "show", "root", "fd00::/8"),  # fe80:: comes and goes by itself
    ("ip", "-j", "-d", "nexthop", "show"),
    ("ip", "-j", "-d", "neigh", "show", "nud", "permanent"),
    ("ip", "-j", "-6", "neigh", "show", "nud", "permanent"),
)
VXLAN_VIEW = ("bridge", "-j", "fdb", "show", "dev", "flannel.1")
POST = """
import json, sys, urllib.request
for path, body in json.load(sys.stdin):
    request = urllib.request.Request(f"http://127.0.0.1:2379/v3/{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as answer:
        print(answer.read().decode().strip())
"""
"""Keys and values of any bytes: they go to etcd's JSON gateway as base64."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of garbage, with the names of this scene filled in."""

    name: str
    key: bytes
    value: bytes
    reason: str

    @property
    def shown_key(self) -> str:
        return self.key.decode("utf-8", "backslashreplace")


def load(backend: str, macs: dict[str, str]) -> list[Piece]:
    """The pieces that are garbage for a backend."""
    entries = json.loads(Path(__file__).with_name("garbage.json").read_text(encoding="utf-8"))
    published = "" if backend == "udp" else backend  # as flannel writes it
    names = {"$BACKEND": published, "$OTHER": next(b for b in BACKENDS if b != backend), **macs}

    def filled(text: str, fill: str = "") -> str:
        for name, value in {**names, "$FILL": fill}.items():
            text = text.replace(name, value)
        return text

    def raw(entry: dict[str, Any], field: str) -> bytes:
        if f"{field}_base64" in entry:
            return base64.b64decode(entry[f"{field}_base64"])
        text = entry[field] if isinstance(entry[field], str) else json.dumps(entry[field])
        return filled(text, entry.get("fill", "") * entry.get("times", 0)).encode()

    return [
        Piece(entry["id"], raw(entry, "key"), raw(entry, "value"), filled(reason_of(entry, backend)))
        for entry in entries
        if backend in entry.get("backends", BACKENDS)
    ]


def reason_of(entry: dict[str, Any], backend: str) -> str:
    reason: str = entry["reason"]
    return reason.replace("$BACKEND", "udp or alloc") if backend == "udp" else reason


def put_all(etcd: EtcdServer, pieces: list[Piece]) -> str:
    """Store them in their order under one etcd lease; its id in hex."""
    lease = etcd.grant(86_400)
    root = f"{etcd.prefix}/subnets/".encode()
    requests = [
        ("kv/put", {"key": _base64(root + p.key), "value": _base64(p.value), "lease": str(int(lease, 16))})
        for p in pieces
    ]
    etcd.namespace.run([sys.executable, "-c", POST], text=json.dumps(requests))
    return lease


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def kernel(host: Host, backend: str) -> str:
    """The tables that peers have rows in, to the byte."""
    views = (*VIEWS, VXLAN_VIEW) if backend == "vxlan" else VIEWS
    return "\n".join(host.run(view) for view in views)


def make_scene(lab: Lab, backend: str) -> tuple[Host, Host]:
    """Alpha and beta with their daemons, of which alpha's is to be shown the garbage, and two Go nodes."""
    lab.etcd.put_config({**CONFIG, "Backend": {"Type": backend}})
    alpha, beta = lab.add_hosts("alpha", "beta")
    if backend == "udp":
        alpha.keep_descriptors()
    alpha.ip_batch(
        [
            "link add docker0 type bridge",
            "address add 10.5.30.1/24 dev docker0",
            "address add 10.5.32.1/12 dev docker0 noprefixroute",
            "address add 198.51.100.7/32 dev docker0",
            "link set docker0 up",
            "route add default via 10.5.33.1 dev eth0 onlink metric 5000",
        ]
    )
    for host, subnet in ((alpha, "10.5.100.1/24"), (beta, "10.5.101.1/24")):
        # As after a run before: each host gets the subnet that garbage.json knows it by.
        host.subnet_file.write_text(f"FLANNEL_NETWORK={NETWORK}\nFLANNEL_SUBNET={subnet}\nFLANNEL_MTU=1400\n")
    lease = lab.etcd.grant(86_400)
    for key, record in GO_PEERS.items():
        text = json.dumps(record | ({"BackendType": backend} if backend != "udp" else {}))
        lab.etcd.ctl("put", f"--lease={lease}", f"{lab.etcd.prefix}/subnets/{key}", text)
    start(alpha)
    beta.start_daemon().wait_ready()
    for host in (alpha, beta):
        host.attach_pods()
        wait_status(host.daemon, "all peers", lambda s: s["peers"]["count"] == PEERS, timeout=20)
    assert (own_key(alpha), own_key(beta)) == (OWN, BETA)
    return alpha, beta


def start(host: Host) -> None:
    endpoints = f"--etcd-endpoints={host.etcd.endpoint},{ENDPOINT_INSIDE}"
    host.start_daemon([endpoints]).wait_ready()


def macs_of(etcd: EtcdServer) -> dict[str, str]:
    records = etcd.leases()
    named = {"$OWN_MAC": OWN, "$BETA_MAC": BETA}
    return {name: records[key].get("BackendData", {}).get("VtepMAC", "") for name, key in named.items()}


@pytest.mark.parametrize("moment", ["before the start", "while running"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_garbage_touches_no_peer_and_each_piece_is_named(lab: Lab, backend: str, moment: str) -> None:
    alpha, beta = make_scene(lab, backend)
    pieces = load(backend, macs_of(lab.etcd))
    assert len(pieces) >= 45
    before, file = kernel(alpha, backend), alpha.subnet_file.read_bytes()
    for key in (*GO_PEERS, BETA) if backend != "udp" else ():  # whose one route is for all of them
        assert key.partition("-")[0] in before
    ping = start_pings(alpha, beta)
    if moment == "before the start":
        assert alpha.daemon.terminate() == 0
        lease = put_all(lab.etcd, pieces)
        start(alpha)
    else:
        lease = put_all(lab.etcd, pieces)

    status = wait_status(
        alpha.daemon, "all the garbage", lambda s: s["peers"]["bad_count"] == len(pieces), timeout=10
    )
    assert status["peers"]["count"] == PEERS
    assert kernel(alpha, backend) == before
    assert alpha.subnet_file.read_bytes() == file
    assert_one_warning_each(alpha, pieces)
    assert_listed(alpha, pieces)
    assert kernel(alpha, backend) == before
    assert ping.stop().lost == ()

    lab.etcd.ctl("lease", "revoke", lease)
    # Some of the garbage aims at addresses that the host has inside the Network, as long as the test runs.
    wait_status(
        alpha.daemon,
        "no garbage",
        lambda s: s["peers"]["bad_count"] == 0 and codes(s) == ["config-overlaps-host"],
    )
    said = flannelctl(alpha, "leases", "--json")
    assert (said.code, said.json["bad"]) == (0, {})
    assert {row["key"] for row in said.json["leases"]} == {OWN, BETA, *GO_PEERS}
    assert kernel(alpha, backend) == before
    for host in (alpha, beta):
        assert "Traceback" not in host.daemon.log_text()


def assert_one_warning_each(host: Host, pieces: list[Piece]) -> None:
    """In the log, with the reason."""
    told = [line for event in ("bad_record", "peer_rejected") for line in events(host.daemon, event)]
    assert {line["level"] for line in told} == {"warning"}
    assert Counter(line["key"] for line in told) == Counter(piece.shown_key for piece in pieces)
    reasons = {line["key"]: line["reason"] for line in told}
    assert [(p.name, reasons[p.shown_key]) for p in pieces if p.reason not in reasons[p.shown_key]] == []


def assert_listed(host: Host, pieces: list[Piece]) -> None:
    """By flannelctl, as a table and as JSON, between the good ones."""
    said = flannelctl(host, "leases", "--json")
    assert (said.code, said.json["checked_by"]) == (1, "daemon")
    rows = {row["key"]: row for row in said.json["leases"]}
    assert len(rows) == len(said.json["leases"]) == len(pieces) + PEERS + 1
    assert {key for key, row in rows.items() if row["state"] == "ok"} == {OWN, BETA, *GO_PEERS}
    found = {piece.name: rows[piece.shown_key] for piece in pieces}
    assert [
        (piece.name, found[piece.name]["reason"])
        for piece in pieces
        if found[piece.name]["state"] != "bad" or piece.reason not in found[piece.name]["reason"]
    ] == []
    table = flannelctl(host, "leases")
    assert table.code == 1
    lines = table.out.splitlines()
    for piece in pieces:
        subnets = found[piece.name]["subnets"]
        first = subnets[0] if subnets else _printable(piece.shown_key) or '""'
        matching = [
            line
            for line in lines
            if line.startswith(f"{first} ") and f"bad: {found[piece.name]['reason']}" in line
        ]
        assert matching, piece
    assert "\x1b" not in table.out


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
