"""What a subnet must be to count as a lease at all."""

from __future__ import annotations

from flanneld_py.addresses import IPAddress, IPNetwork

FEWEST_BITS = 2
"""A Network holds at least four subnets (flannel refuses a SubnetLen below its length + 2)."""


def leasable(subnet: IPNetwork, network: IPNetwork) -> bool:
    """Whether `subnet` lies in the Network and is as small as a lease must be.

    Anybody may write a key for half of the Network; it must not keep the others out.
    """
    return subnet.prefixlen >= network.prefixlen + FEWEST_BITS and subnet.network_address in network


def inside(address: IPAddress, network: IPNetwork) -> bool:
    return address.version == network.version and address in network
