"""What should be: the whole State as a pure function of registry, own lease and host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from flanneld_py.core.hostfiles import SubnetEnv, render_subnet_env
from flanneld_py.model import Host, NetworkConfig, Record, State


def desired(
    backend: Callable[[Record, Sequence[Record], Host], State],
    own: Record,
    peers: Sequence[Record],
    host: Host,
    subnet_file: tuple[str, str],
    *,
    blackhole: bool = False,
) -> State:
    """All rows of all tables for this host.

    Args:
        backend: the backend's `desired`.
        own: the lease that this host holds.
        peers: the admitted records of the others.
        host: this host.
        subnet_file: path and text of subnet.env.
        blackhole: whether packets to addresses of our own subnet that no pod has end here.
    """
    state = rows_of(backend, own, peers, host)
    blackholes = dict.fromkeys(own.subnets.values() if blackhole else (), True)
    path, text = subnet_file
    return replace(state, blackholes=blackholes, files={path: text})


def rows_of(
    backend: Callable[[Record, Sequence[Record], Host], State],
    own: Record,
    peers: Sequence[Record],
    host: Host,
) -> State:
    """What comes of the backend alone; `backend`: its `desired`, or its `peer_rows`."""
    state = backend(own, peers, host)
    # An IPv6 route carries its gateway inline; only IPv4's fib_info hash needs nexthop objects.
    nexthops = {
        route.nexthop: True
        for subnet, route in state.routes.items()
        if subnet.version == 4 and route.nexthop.via is not None
    }
    return replace(state, nexthops=nexthops)


def subnet_env(config: NetworkConfig, own: Record, mtu: int, *, ipmasq: bool) -> str:
    """The text of subnet.env (FLANNEL_* lines that CNI plugins and Docker read)."""
    return render_subnet_env(
        SubnetEnv(
            networks=config.network_of,
            subnets=own.subnets,
            mtu=mtu,
            ipmasq=ipmasq,
        )
    )
