"""A namespace with two underlays, and the driver of links in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flanneld_py.drivers.kernel import KernelLinks
from tests.netns.inside import Namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.netns.inside import Agent

PREFIX = "/coreos.com/network"


@pytest.fixture
def net() -> Iterator[Namespace]:
    """Two underlays: u0 (192.0.2.1, 192.0.2.3, fd99::1) and v0 (192.0.3.1)."""
    with Namespace() as namespace:
        namespace.run("sysctl", "-qw", "net.ipv6.conf.default.addr_gen_mode=1")
        namespace.ip(
            "link add u0 type veth peer name u1",
            "link add v0 type veth peer name v1",
            *(f"link set {dev} up" for dev in ("u0", "u1", "v0", "v1")),
            "addr add 192.0.2.1/24 dev u0",
            "addr add 192.0.2.3/24 dev u0",
            "addr add fd99::1/64 dev u0 nodad",
            "addr add 192.0.3.1/24 dev v0",
        )
        yield namespace


@pytest.fixture
def agent(net: Namespace) -> Agent:
    return net.agent()


@pytest.fixture
def links(agent: Agent) -> KernelLinks:
    return agent.make(KernelLinks, PREFIX)
