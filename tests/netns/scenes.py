"""Settings that many tests start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.netns.oracle import wait_in_order

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

BACKENDS = ("host-gw", "vxlan")
NETWORK = "10.5.0.0/16"


LEASED = {"SubnetMin": "10.5.100.0", "SubnetMax": "10.5.239.0"}
"""What hosts lease from, so that tests have the rest of the Network for subnets of their own choice."""


def config(backend: str, **more: Any) -> dict[str, Any]:
    leased = {} if "Network" in more else LEASED
    return {"Network": NETWORK, **leased, "Backend": {"Type": backend}, **more}


def overlay(lab: Lab, backend: str, *names: str) -> list[Host]:
    """Hosts with daemons in sync and a pod each."""
    lab.etcd.put_config(config(backend))
    hosts = lab.add_hosts(*names)
    lab.start_daemons()
    for host in hosts:
        wait_in_order(host, backend)
    return hosts
