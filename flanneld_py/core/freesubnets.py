"""Free subnets of a range: found by their gaps, as a range may hold more subnets than fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from random import Random

from flanneld_py.addresses import IPNetwork
from flanneld_py.model import SubnetRange


def random_free(allowed: SubnetRange, taken: Iterable[IPNetwork], rng: Random) -> IPNetwork | None:
    """One of the subnets of `allowed` that overlap nothing in `taken`, each with equal chance.

    O(n log n) in the number of taken networks, whatever the size of the range.
    """
    gaps = list(_gaps(allowed, taken))
    free = sum(last - first + 1 for first, last in gaps)
    if not free:
        return None
    pick = rng.randrange(free)
    for first, last in gaps:
        if pick <= last - first:
            return _subnet(allowed, first + pick)
        pick -= last - first + 1
    raise AssertionError("pick lies within the free subnets")


def count_free(allowed: SubnetRange, taken: Iterable[IPNetwork]) -> int:
    """How many subnets of `allowed` overlap nothing in `taken`."""
    return sum(last - first + 1 for first, last in _gaps(allowed, taken))


def _gaps(allowed: SubnetRange, taken: Iterable[IPNetwork]) -> Iterator[tuple[int, int]]:
    """Runs of free subnets, as first and last index from subnet_min."""
    version, bits = allowed.network.version, allowed.network.max_prefixlen
    shift = bits - allowed.subnet_len
    origin = int(allowed.subnet_min) >> shift
    used = sorted(
        ((base >> shift) - origin, (base + (1 << bits - net.prefixlen) - 1 >> shift) - origin)
        for net in taken
        if net.version == version
        for base in (int(net.network_address),)
    )
    total = count_subnets(allowed)
    free_from = 0
    for first, last in used:
        if first > free_from:
            yield free_from, min(first, total) - 1
        free_from = max(free_from, last + 1)
        if free_from >= total:
            return
    yield free_from, total - 1


def count_subnets(allowed: SubnetRange) -> int:
    """How many subnets a range holds, free or not."""
    shift = allowed.network.max_prefixlen - allowed.subnet_len
    return ((int(allowed.subnet_max) - int(allowed.subnet_min)) >> shift) + 1


def _subnet(allowed: SubnetRange, index: int) -> IPNetwork:
    shift = allowed.network.max_prefixlen - allowed.subnet_len
    base = int(allowed.subnet_min) + (index << shift)
    return type(allowed.network)((base, allowed.subnet_len))
