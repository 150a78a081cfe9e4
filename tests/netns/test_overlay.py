"""The main job: pods on different hosts reach each other."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import Transfer
from tests.netns.scenes import BACKENDS, overlay

if TYPE_CHECKING:
    from flanneld_py.lab import Lab

MTU = {"host-gw": 1500, "udp": 1472, "vxlan": 1450}
TRANSFER = 2_000_000
"""Bytes."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_pods_on_three_hosts_reach_each_other(lab: Lab, backend: str) -> None:
    hosts = overlay(lab, backend, "alpha", "beta", "gamma")
    assert {host.subnet_env()["FLANNEL_MTU"] for host in hosts} == {str(MTU[backend])}
    for one, other in itertools.permutations(hosts, 2):
        result = one.pod.ping(other.pod.address, count=3, size=MTU[backend], df=True)
        assert result.lost == 0, f"{one.name} to {other.name}"
        assert Transfer(one.pod, other.pod, other.pod.address, TRANSFER).finish() == TRANSFER


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packet_over_the_mtu_is_refused_not_lost(lab: Lab, backend: str) -> None:
    one, other = overlay(lab, backend, "alpha", "beta")
    assert one.pod.ping(other.pod.address, count=1, size=MTU[backend] + 1, df=True).received == 0
