"""What the kernel of a host must hold, from etcd and the compatibility rules alone.

It reads `ip -j`, `bridge -j` and etcdctl, knows flannel's registry format and scheme of rows by itself, and
imports nothing of the product: an error there cannot hide here.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any

from flanneld_py.lab import CommandFailed, wait_for
from tests.netns.forwarded import forwarded

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from flanneld_py.lab import Host

PROTOCOL = "96"
TUN = "flannel0"
UDP_OVERHEAD = 28
VXLAN_OVERHEAD = {4: 50, 6: 70}
PUBLIC = {4: "PublicIP", 6: "PublicIPv6"}
DATA = {4: "BackendData", 6: "BackendV6Data"}
NOT_YET = {"VtepMAC": "none, as the record is still one of another backend"}
NO_IPV4 = "0.0.0.0-0"
"""In the place of the IPv4 subnet of a key."""
_KEY = re.compile(r"\d+\.\d+\.\d+\.\d+-\d+(&|$)")
_SEEN: dict[str, set[str]] = {}
"""Prefix → keys, of all looks: only a packet tells whether some still leave for a peer that is gone."""
Rows = dict[str, str]
"""What → how; one dict for all tables, so that a difference reads as a line."""


def subnets_of(key: str) -> dict[int, str]:
    """IP version → subnet, of those the key of a record names."""
    v4, _, v6 = key.partition("&")
    halves = {4: "" if v4 == NO_IPV4 else v4, 6: v6}
    return {family: "/".join(half.rsplit("-", 1)) for family, half in halves.items() if half}


def subnet_of(key: str) -> str:
    """The IPv4 subnet, or the only one there is."""
    return next(iter(subnets_of(key).values()))


def own_key(host: Host) -> str:
    """The key of the host's record, by an address it publishes."""
    ours = {"PublicIP": host.address, "PublicIPv6": host.address6}
    return next(
        key
        for key, record in host.etcd.leases().items()
        if any(record.get(name) == address for name, address in ours.items())
    )


def device_of(family: int, vni: int = 1) -> str:
    return f"flannel.{vni}" if family == 4 else f"flannel-v6.{vni}"


def expected(host: Host, backend: str, *, vni: int = 1, direct: Sequence[str] = ()) -> Rows:
    """The rows that the registry demands of this host.

    Args:
        host: the host.
        backend: host-gw, udp or vxlan.
        vni: of vxlan.
        direct: prefixes of the underlay whose hosts vxlan reaches without the tunnel (DirectRouting).
    """
    records = host.etcd.leases()
    own = own_key(host)
    rows: Rows = {}
    if backend == "udp":
        return _udp_rows(host, own, records)
    for key, record in records.items():
        for family in subnets_of(own) if key != own else ():
            if family in subnets_of(key):
                subnet, public = subnets_of(key)[family], record[PUBLIC[family]]
                if backend == "host-gw" or any(_inside(public, prefix) for prefix in direct):
                    rows |= _direct_rows(subnet, public, host.interface)
                else:
                    rows |= _tunnel_rows(subnet, public, record.get(DATA[family]), device_of(family, vni))
    if backend == "vxlan":
        for family, subnet in subnets_of(own).items():
            device = device_of(family, vni)
            base = ip_network(subnet).network_address
            rows[f"address {base}/{base.max_prefixlen}"] = device
            local = {4: host.address, 6: host.address6}[family]
            mac = (records[own].get(DATA[family]) or NOT_YET)["VtepMAC"]
            rows[f"link {device}"] = (
                f"vni={vni} port=8472 dev={host.interface} local={local} "
                f"mtu={external_mtu(host) - VXLAN_OVERHEAD[family]} mac={mac} up=True learning=False"
            )
    return rows


def _udp_rows(host: Host, own: str, records: dict[str, dict[str, Any]]) -> Rows:
    """Whatever the peers are, the kernel holds the same; where packets for them go only packets can tell."""
    mtu = external_mtu(host) - UDP_OVERHEAD
    rows = {f"link {TUN}": f"mtu={mtu} queue=1000 up=True alias=flanneld-py:{host.prefix} runs=True"}
    for key, record in records.items():
        for family, subnet in subnets_of(key).items() if key != own else ():
            agreed = family == 4 or (record.get(DATA[6]) or {}).get("IPv6") is True
            if agreed and family in subnets_of(own):
                rows[f"packets to {subnet}"] = record[PUBLIC[4]]
    networks = _networks(host)
    for family, subnet in subnets_of(own).items():
        base = ip_network(subnet).network_address
        rows[f"address {base}/{base.max_prefixlen}"] = TUN
        rows[f"route {networks[family]}"] = f"dev {TUN} proto {PROTOCOL}"
    return rows


def _networks(host: Host) -> dict[int, str | None]:
    """IP version → Network of the config; where that is garbage, the one that containers were told."""
    text = host.etcd.ctl("get", f"{host.etcd.prefix}/config", "--print-value-only")
    try:
        stored = json.loads(text)
    except ValueError:
        told = host.subnet_env()
        return {4: told.get("FLANNEL_NETWORK"), 6: told.get("FLANNEL_IPV6_NETWORK")}
    return {4: stored.get("Network"), 6: stored.get("IPv6Network")}


def _others(host: Host, ours: Collection[str]) -> list[str]:
    """The subnets that do not begin with our addresses, also of keys that went since the first look."""
    prefix = f"{host.etcd.prefix}/subnets/"
    seen = _SEEN.setdefault(host.prefix, set())
    with suppress(CommandFailed):  # etcd may be away: then nothing new is in it
        listed = host.etcd.ctl("get", "--prefix", "--keys-only", "--command-timeout=2s", prefix).split()
        seen.update(line.removeprefix(prefix) for line in listed)
    subnets = [subnet for key in sorted(seen) if _KEY.match(key) for subnet in subnets_of(key).values()]
    return [subnet for subnet in subnets if subnet.partition("/")[0] not in ours]


def _actual_udp_rows(host: Host) -> Rows:
    rows: Rows = {}
    for link in host.ip("-d", "link", "show"):
        if link["ifname"] != TUN:
            continue
        # A TUN has a carrier as long as somebody reads it.
        rows[f"link {TUN}"] = (
            f"mtu={link['mtu']} queue={link['txqlen']} up={'UP' in link['flags']} "
            f"alias={link.get('ifalias')} runs={'LOWER_UP' in link['flags']}"
        )
        addresses = [
            address
            for found in host.ip("address", "show", "dev", TUN)
            for address in found["addr_info"]
            if address["scope"] == "global"
        ]
        rows |= {f"address {address['local']}/{address['prefixlen']}": TUN for address in addresses}
        others = _others(host, [address["local"] for address in addresses])
        rows |= {f"packets to {subnet}": peer for subnet, peer in forwarded(host, others).items()}
    for version in ("-4", "-6"):
        for route in _main_routes(host, version):
            if route.get("dev") == TUN and "gateway" not in route and route.get("protocol") != "kernel":
                rows[f"route {route['dst']}"] = f"dev {TUN} proto {route.get('protocol')}"
    return rows


def _direct_rows(subnet: str, public: str, dev: str) -> Rows:
    rows = {f"route {subnet}": f"via {public} dev {dev} onlink=False proto {PROTOCOL}"}
    # IPv6 routes bear their gateway themselves.
    return rows | ({} if ":" in subnet else {f"nexthop {public}": f"dev {dev} onlink=False"})


def _tunnel_rows(subnet: str, public: str, data: dict[str, Any] | None, dev: str) -> Rows:
    base, mac = str(ip_network(subnet).network_address), (data or NOT_YET)["VtepMAC"]
    rows = {
        f"route {subnet}": f"via {base} dev {dev} onlink=True proto {PROTOCOL}",
        f"neigh {base}": mac,
        f"fdb {mac}": public,
    }
    return rows | ({} if ":" in subnet else {f"nexthop {base}": f"dev {dev} onlink=True"})


def _inside(address: str, prefix: str) -> bool:
    return ip_address(address) in ip_network(prefix)


def external_mtu(host: Host) -> int:
    mtu: int = host.ip("link", "show", "dev", host.interface)[0]["mtu"]
    return mtu


def actual(host: Host, backend: str, *, vni: int = 1) -> Rows:
    """The rows of the same kinds that stand in the host's kernel, whoever made them."""
    rows: Rows = {}
    for route in (*_main_routes(host, "-4"), *_main_routes(host, "-6")):
        if "gateway" in route and route["dst"] != "default":
            onlink = "onlink" in route.get("flags", [])
            rows[f"route {route['dst']}"] = (
                f"via {route['gateway']} dev {route['dev']} onlink={onlink} proto {route.get('protocol')}"
            )
    for hop in host.ip("nexthop", "show"):
        onlink = "onlink" in hop.get("flags", [])
        rows[f"nexthop {hop.get('gateway')}"] = f"dev {hop.get('dev')} onlink={onlink}"
    if backend == "udp":
        rows |= _actual_udp_rows(host)
    if backend == "vxlan":
        for family in (4, 6):
            rows |= _vxlan_rows(host, device_of(family, vni))
    return rows


def _main_routes(host: Host, version: str) -> list[dict[str, Any]]:
    return host.ip(version, "route", "show", "table", "main")


def _vxlan_rows(host: Host, device: str) -> Rows:
    rows: Rows = {}
    links = [link for link in host.ip("link", "show") if link["ifname"] == device]
    for link in links:
        rows[f"link {device}"] = _link(link)
        for found in host.ip("address", "show", "dev", device):
            rows |= {
                f"address {address['local']}/{address['prefixlen']}": device
                for address in found["addr_info"]
                if address["scope"] == "global"
            }
        for neigh in host.ip("neigh", "show", "dev", device, "nud", "permanent"):
            rows[f"neigh {neigh['dst']}"] = neigh["lladdr"]
        for entry in host.bridge("fdb", "show", "dev", device):
            rows[f"fdb {entry['mac']}"] = entry.get("dst", "?")
    return rows


def _link(link: dict[str, Any]) -> str:
    data = link["linkinfo"]["info_data"]
    return (
        f"vni={data['id']} port={data['port']} dev={data.get('link')} "
        f"local={data.get('local', data.get('local6'))} mtu={link['mtu']} mac={link['address']} "
        f"up={'UP' in link['flags']} learning={data['learning']}"
    )


def differences(host: Host, backend: str, **options: Any) -> list[str]:
    """Where kernel and registry disagree, a line each; empty when all is well. Options as for `expected`."""
    vni = {name: value for name, value in options.items() if name == "vni"}
    want, have = expected(host, backend, **options), actual(host, backend, **vni)
    lines = [f"- {what}: {want[what]}" for what in want if have.get(what) != want[what]]
    lines += [f"+ {what}: {have[what]}" for what in have if have[what] != want.get(what)]
    return lines


def wait_in_order(
    host: Host, backend: str, timeout: float = 5, beside: Rows | None = None, **options: Any
) -> None:
    """Wait until the kernel holds exactly what the registry demands, and the rows `beside` as they are."""
    foreign = {f"+ {what}: {how}" for what, how in (beside or {}).items()}
    wait_for(
        lambda: differences(host, backend, **options),
        timeout,
        f"the kernel of {host.name} to equal the registry",
        lambda lines: set(lines) == foreign,
        0.05,
    )
