"""Why the kernel refused a row, where its own words do not tell what to do."""

from __future__ import annotations

import errno

from flanneld_py.drivers.netlink import Failure
from flanneld_py.model import NextHop, Op

NOT_ON_LINK = {errno.ENETUNREACH, errno.EHOSTUNREACH}
"""To a gateway that is behind another gateway, or nowhere: of IPv4, of IPv6."""


def explain(op: Op, refused: Failure) -> str:
    """The kernel's reason, and what to do about it if that is known."""
    hop: NextHop | None = None
    if op.verb == "set":
        hop = op.key if op.table == "nexthops" else op.value.nexthop if op.table == "routes" else None
    if hop is not None and hop.via is not None and not hop.onlink and refused.code in NOT_ON_LINK:
        return (
            f"next hop {hop.via} is not on-link, as no network of {hop.dev} contains it ({refused.reason}): "
            f"connect both hosts to one layer 2 segment, or set Backend.Type to vxlan"
        )
    return refused.reason


class UnknownReferent(Exception):
    """An op names a device or nexthop that does not exist; the text says which."""


def conflict(op: Op, what: str) -> str:
    """Why a route cannot be set; `what`: the one that stands in its way, as FoundRoute describes it."""
    other = "the lease of that subnet from etcd" if op.value.nexthop.via else "choose another Network"
    return f"a route to {op.key}{what} is not ours; remove it, or {other}"
