"""What the kernel of a host must hold, from etcd and the compatibility rules alone.

It reads `ip -j`, `bridge -j` and etcdctl, knows flannel's registry format and scheme of rows by itself, and
imports nothing of the product: an error there cannot hide here.
"""

from __future__ import annotations

from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

from flanneld_py.lab import wait_for

if TYPE_CHECKING:
    from flanneld_py.lab import Host

PROTOCOL = "96"
VXLAN_OVERHEAD = 50
Rows = dict[str, str]
"""What → how; one dict for all tables, so that a difference reads as a line."""


def subnet_of(key: str) -> str:
    return key.split("&", maxsplit=1)[0].replace("-", "/")


def own_key(host: Host) -> str:
    """The key of the host's record, by the address it publishes."""
    return next(k for k, record in host.etcd.leases().items() if record["PublicIP"] == host.address)


def expected(host: Host, backend: str, *, device: str = "flannel.1") -> Rows:
    """The rows that the registry demands of this host."""
    records = host.etcd.leases()
    own = own_key(host)
    rows: Rows = {}
    for key, record in records.items():
        if key == own:
            continue
        subnet, public = subnet_of(key), record["PublicIP"]
        if backend == "host-gw":
            rows[f"route {subnet}"] = f"via {public} dev eth0 onlink=False proto {PROTOCOL}"
            rows[f"nexthop {public}"] = "dev eth0 onlink=False"
            continue
        base, mac = str(ip_network(subnet).network_address), record["BackendData"]["VtepMAC"]
        rows[f"route {subnet}"] = f"via {base} dev {device} onlink=True proto {PROTOCOL}"
        rows[f"nexthop {base}"] = f"dev {device} onlink=True"
        rows[f"neigh {base}"] = mac
        rows[f"fdb {mac}"] = public
    if backend == "vxlan":
        base = str(ip_network(subnet_of(own)).network_address)
        rows[f"address {base}/32"] = device
        rows[f"link {device}"] = (
            f"vni={int(device.rpartition('.')[2])} port=8472 dev=eth0 local={host.address} "
            f"mtu={external_mtu(host) - VXLAN_OVERHEAD} mac={records[own]['BackendData']['VtepMAC']} up=True "
            f"learning=False"
        )
    return rows


def external_mtu(host: Host) -> int:
    mtu: int = host.ip("link", "show", "dev", "eth0")[0]["mtu"]
    return mtu


def actual(host: Host, backend: str, *, device: str = "flannel.1") -> Rows:
    """The rows of the same kinds that stand in the host's kernel, whoever made them."""
    rows: Rows = {}
    for route in host.ip("route", "show", "table", "main"):
        if "gateway" in route and route["dst"] != "default":
            onlink = "onlink" in route.get("flags", [])
            rows[f"route {route['dst']}"] = (
                f"via {route['gateway']} dev {route['dev']} onlink={onlink} proto {route.get('protocol')}"
            )
    for hop in host.ip("nexthop", "show"):
        onlink = "onlink" in hop.get("flags", [])
        rows[f"nexthop {hop.get('gateway')}"] = f"dev {hop.get('dev')} onlink={onlink}"
    return rows | (_vxlan_rows(host, device) if backend == "vxlan" else {})


def _vxlan_rows(host: Host, device: str) -> Rows:
    rows: Rows = {}
    links = [link for link in host.ip("link", "show") if link["ifname"] == device]
    for link in links:
        rows[f"link {device}"] = _link(link)
        for found in host.ip("address", "show", "dev", device):
            rows |= {
                f"address {address['local']}/{address['prefixlen']}": device
                for address in found["addr_info"]
                if address["family"] == "inet"
            }
        for neigh in host.ip("neigh", "show", "dev", device, "nud", "permanent"):
            rows[f"neigh {neigh['dst']}"] = neigh["lladdr"]
        for entry in host.bridge("fdb", "show", "dev", device):
            rows[f"fdb {entry['mac']}"] = entry.get("dst", "?")
    return rows


def _link(link: dict[str, Any]) -> str:
    data = link["linkinfo"]["info_data"]
    return (
        f"vni={data['id']} port={data['port']} dev={data.get('link')} local={data.get('local')} "
        f"mtu={link['mtu']} mac={link['address']} up={'UP' in link['flags']} learning={data['learning']}"
    )


def differences(host: Host, backend: str) -> list[str]:
    """Where kernel and registry disagree, a line each; empty when all is well."""
    want, have = expected(host, backend), actual(host, backend)
    lines = [f"- {what}: {want[what]}" for what in want if have.get(what) != want[what]]
    lines += [f"+ {what}: {have[what]}" for what in have if have[what] != want.get(what)]
    return lines


def wait_in_order(host: Host, backend: str, timeout: float = 5, beside: Rows | None = None) -> None:
    """Wait until the kernel holds exactly what the registry demands, and the rows `beside` as they are."""
    foreign = {f"+ {what}: {how}" for what, how in (beside or {}).items()}
    wait_for(
        lambda: differences(host, backend),
        timeout,
        f"the kernel of {host.name} to equal the registry",
        lambda lines: set(lines) == foreign,
        0.05,
    )
