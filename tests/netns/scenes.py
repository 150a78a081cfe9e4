"""Settings that many tests start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.netns.oracle import wait_in_order

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flanneld_py.lab import Host, Lab

BACKENDS = ("host-gw", "udp", "vxlan")
IN_KERNEL = ("host-gw", "vxlan")
"""Those that forward packets while no daemon runs."""
NETWORK = "10.5.0.0/16"
NETWORK6 = "fd00:5::/48"
FAMILIES: dict[str, tuple[int, ...]] = {"ipv4": (4,), "dual-stack": (4, 6), "ipv6": (6,)}
"""Name → IP versions, of the overlay and of its underlay."""
MTU = {
    ("host-gw", "ipv4"): 1500,
    ("host-gw", "dual-stack"): 1500,
    ("host-gw", "ipv6"): 1500,
    ("udp", "ipv4"): 1472,
    ("udp", "dual-stack"): 1472,
    ("vxlan", "ipv4"): 1450,
    ("vxlan", "dual-stack"): 1430,
    ("vxlan", "ipv6"): 1430,
}
"""FLANNEL_MTU over an interface of 1500 bytes: the lowest of the families in use; udp needs IPv4."""

LEASED = {"SubnetMin": "10.5.100.0", "SubnetMax": "10.5.239.0"}
"""What hosts lease from, so that tests have the rest of the Network for subnets of their own choice."""


def config(backend: str, **more: Any) -> dict[str, Any]:
    leased = {} if "Network" in more else LEASED
    return {"Network": NETWORK, **leased, "Backend": {"Type": backend}, **more}


def family_config(backend: str, families: str, **options: Any) -> dict[str, Any]:
    """The same for one of FAMILIES, with options of the backend."""
    fields = config(backend)
    fields["Backend"] |= options
    used = FAMILIES[families]
    if 4 not in used:
        fields = {"EnableIPv4": False, "Backend": fields["Backend"]}
    return fields | ({"EnableIPv6": True, "IPv6Network": NETWORK6} if 6 in used else {})


def overlay(lab: Lab, backend: str, *names: str, flags: Sequence[str] = ()) -> list[Host]:
    """Hosts with daemons in sync and a pod each."""
    lab.etcd.put_config(config(backend))
    hosts = lab.add_hosts(*names)
    if backend == "udp":
        for host in hosts:
            host.keep_descriptors()
    lab.start_daemons(flags)
    for host in hosts:
        wait_in_order(host, backend)
    return hosts
