"""Backends and what they publish, for the tests of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flanneld_py.addresses import Family
from flanneld_py.backends import backend_of
from flanneld_py.backends.base import Backend
from flanneld_py.core.leasedecision import Wish
from flanneld_py.core.records import decode, encode, format_key
from flanneld_py.model import Entry, Host, Record
from tests.unit import strategies
from tests.unit.strategies import host, per_family, subnet


def can(name: str, families: Sequence[Family]) -> bool:
    """Udp needs IPv4 to carry IPv6."""
    return name != "udp" or 4 in families


def backend(name: str, families: Sequence[Family] = (4,), **options: Any) -> Backend:
    lower = {key.lower(): value for key, value in options.items()}
    return backend_of(strategies.config(name, families, lower))


def published_record(one: Backend, here: Host, number: int, families: Sequence[Family] = (4,)) -> Record:
    """What the registry gives back of the lease of subnet `number` that a host publishes."""
    subnets = per_family({family: subnet(family, number) for family in families})
    found = one.published(here, None)
    asked = Wish(found.backend_type, found.public_ips, found.backend_data)
    value = encode(asked.record(subnets, here.node_id))
    return decode(Entry(f"subnets/{format_key(subnets)}", value.encode(), number, number, 7))


def network(name: str, count: int, families: Sequence[Family] = (4,)) -> tuple[Backend, Host, list[Record]]:
    """A backend, the host of number 1, and the records of the hosts 1 to `count`."""
    one = backend(name, families)
    records = [published_record(one, host(n, families), n, families) for n in range(1, count + 1)]
    return one, host(1, families), records


def data(one: Backend, here: Host, own: Record | None = None, family: Family = 4) -> Any:
    """BackendData or BackendV6Data as published."""
    return one.published(here, own).backend_data.get(family)
