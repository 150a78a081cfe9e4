"""A live change of the config that the kernel or this host refuses: what worked goes on working."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.netns.observing import start_pings, wait_problem
from tests.netns.oracle import actual, wait_in_order
from tests.netns.scenes import overlay
from tests.netns.test_config_changes import change, talk, vxlan_devices, wait_well

if TYPE_CHECKING:
    from flanneld_py.lab import Lab

ON_PORT_4789 = "id 1 dstport 4789"
TAKEN: dict[str, tuple[dict[str, Any], str]] = {
    "VNI": ({"VNI": 7}, "id 7 dstport 8472"),
    "port": ({"Port": 4789}, ON_PORT_4789),
    "VNI and port": ({"VNI": 7, "Port": 4789}, "id 7 dstport 4789"),
    "port, with GBP": ({"Port": 4789, "GBP": True}, ON_PORT_4789),
}
"""Name → options that the config gets, and the device of somebody else's that is in the way."""


@pytest.mark.parametrize("what", TAKEN)
def test_what_cannot_be_made_leaves_the_old_device_and_its_peers(lab: Lab, what: str) -> None:
    options, foreign = TAKEN[what]
    one, other = overlay(lab, "vxlan", "alpha", "beta")
    for host in (one, other):
        host.run(["ip", *f"link add foreign type vxlan {foreign} dev eth0".split()])
        host.run("ip link set foreign up".split())
    before = {host.name: actual(host, "vxlan") for host in (one, other)}
    pings = start_pings(one, other)
    change(lab, options=options)
    for host in (one, other):
        wait_problem(host.daemon, "apply-failed", "foreign" if options.keys() < {"VNI", "Port"} else "")
        assert actual(host, "vxlan") == before[host.name]
    assert not pings.stop().lost
    assert {*vxlan_devices(one)} == {"flannel.1", "foreign"}

    for host in (one, other):
        host.run("ip link delete foreign".split())
        os.kill(host.daemon.pid, signal.SIGHUP)
    for host in (one, other):
        wait_well(host)
        (made,) = vxlan_devices(host).values()
        assert made == (options.get("VNI", 1), options.get("Port", 8472))
    talk(one, other)


def test_a_change_that_was_refused_is_taken_back(lab: Lab) -> None:
    one, other = overlay(lab, "vxlan", "alpha", "beta")
    one.run("ip link add foreign type vxlan id 7 dstport 8472 dev eth0".split())
    change(lab, options={"VNI": 7})
    wait_problem(one.daemon, "apply-failed", "it is foreign: remove that, or choose another VNI")
    change(lab)
    for host in (one, other):
        wait_well(host)
        wait_in_order(host, "vxlan")
    talk(one, other)
