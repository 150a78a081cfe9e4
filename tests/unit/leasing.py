"""What a host brings to the decision on its lease, and records as hosts of ours write them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from msgspec.structs import replace

from flanneld_py.addresses import Family, PerFamily
from flanneld_py.core.allocate import decide_lease
from flanneld_py.core.leasedecision import Decision, Wish
from flanneld_py.model import NetworkConfig, Record
from tests.unit import strategies
from tests.unit.strategies import host, mac, per_family, snapshot_of, subnet, underlay


def wish(number: int, families: Sequence[Family] = (4,), **more: Any) -> Wish:
    """What the host of a number asks for."""
    return Wish(
        backend_type="vxlan",
        public_ips=per_family({family: underlay(family, number) for family in families}),
        backend_data=per_family(
            {family: {"VNI": 1, "VtepMAC": mac(16 * number + family)} for family in families}
        ),
        **more,
    )


def record(number: int, holder: int, **more: Any) -> Record:
    """The lease of a subnet as a host of ours would have written it."""
    made = wish(holder).record(PerFamily(subnet(4, number)), f"node-{holder}")
    return replace(made, **{"create_revision": number, "mod_revision": number, "etcd_lease": 7, **more})


def decide(
    *records: Record, by: Wish | None = None, config: NetworkConfig | None = None, **more: Any
) -> Decision:
    """What host 1 does about these records."""
    return decide_lease(
        config or strategies.config(), snapshot_of(records), host(1, **more), by or wish(1), Random(1)
    )
