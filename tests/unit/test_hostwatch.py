"""What is said of the interface below the overlay."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.daemon.hostwatch import link_problem
from flanneld_py.model import External, HostFacts, LinkFacts

LINK = LinkFacts("eth0", 2, 1500, "02:00:00:00:00:01", up=True)
EXTERNAL = External("eth0", 1500, PerFamily(ip_address("192.0.2.1")), PerFamily(ip_address("192.0.2.1")))


@pytest.mark.parametrize(
    ("link", "said"),
    [
        (LINK, None),
        (replace(LINK, up=False), "interface eth0 is down"),
        (replace(LINK, up=False, carrier=False), "interface eth0 is down"),
        (replace(LINK, carrier=False), "interface eth0 has no carrier"),
    ],
)
def test_why_the_interface_carries_nothing(link: LinkFacts, said: str | None) -> None:
    others = LinkFacts("eth1", 3, 1500, "02:00:00:00:00:02", up=False)
    problem = link_problem(HostFacts((others, link)), EXTERNAL)
    assert (problem.reason if problem else None) == said
