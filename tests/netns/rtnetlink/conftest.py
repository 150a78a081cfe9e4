"""A namespace with an underlay and vxlan devices of ours, and the tables in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flanneld_py.core.ownership import link_alias
from flanneld_py.drivers.rtnetlink import RtnetlinkTables
from tests.netns.inside import Namespace
from tests.netns.rtnetlink.rows import DEV, DEV6, PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def net() -> Iterator[Namespace]:
    """An underlay u0 (192.0.2.1, fd99::1) and vxlan devices of ours for both families."""
    with Namespace() as namespace:
        namespace.ip(
            "link add u0 type veth peer name u1",
            "addr add 192.0.2.1/24 dev u0",
            "addr add fd99::1/64 dev u0 nodad",
            "link set u0 up",
            "link set u1 up",
            f"link add {DEV} type vxlan id 1 dstport 8472 dev u0 local 192.0.2.1 nolearning",
            f"link set {DEV} alias {link_alias(PREFIX)} up",
            f"link add {DEV6} type vxlan id 1 dstport 8472 dev u0 local fd99::1 nolearning",
            f"link set {DEV6} alias {link_alias(PREFIX)} up",
        )
        yield namespace


@pytest.fixture
def tables(net: Namespace) -> RtnetlinkTables:
    return net.agent().make(RtnetlinkTables, PREFIX)
