"""Settings that many tests start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.netns.oracle import wait_in_order

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

BACKENDS = ("host-gw", "vxlan")
NETWORK = "10.5.0.0/16"


def config(backend: str, **more: Any) -> dict[str, Any]:
    return {"Network": NETWORK, "Backend": {"Type": backend}, **more}


def overlay(lab: Lab, backend: str, *names: str) -> list[Host]:
    """Hosts with daemons in sync and a pod each."""
    lab.etcd.put_config(config(backend))
    hosts = lab.add_hosts(*names)
    lab.start_daemons()
    for host in hosts:
        wait_in_order(host, backend)
    return hosts
