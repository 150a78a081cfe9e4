"""What stands for a row of ours which the model cannot express.

A route of ours may have been changed into a blackhole, one without gateway or with several, an FDB entry into
one with a port or device of its own. No such row is ever wanted, so a plan replaces or deletes it.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from flanneld_py.addresses import IPAddress, IPNetwork
from flanneld_py.drivers import rtmessages as rt
from flanneld_py.model import NextHop

NOT_ONE_GATEWAY: dict[int, IPAddress] = {4: IPv4Address(0), 6: IPv6Address(0)}
"""By IP version."""
ODD_NEXTHOP = NextHop("", NOT_ONE_GATEWAY[4], onlink=False)
ODD_FDB_ATTRIBUTES = {rt.NDA_PORT, rt.NDA_VNI, rt.NDA_IFINDEX, rt.NDA_NH_ID}


def odd_hop(destination: IPNetwork) -> NextHop:
    return NextHop("", NOT_ONE_GATEWAY[destination.version], onlink=False)
