"""Several daemons on one host, each below its own prefix: neither sees, carries or disturbs the other's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import wait_for
from tests.netns.host_state import changes, host_state
from tests.netns.observing import wait_status
from tests.netns.offline import wait_kept
from tests.netns.oracle import Rows, actual, expected
from tests.netns.test_ctl import flannelctl

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

IN_ORDER_WITHIN = 5
"""Seconds."""
KINDS = ("vxlan and host-gw", "vxlan and vxlan")
FIRST: dict[str, Any] = {"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}
SECOND: dict[str, dict[str, Any]] = {
    "vxlan and host-gw": {"Network": "10.6.0.0/16", "Backend": {"Type": "host-gw"}},
    "vxlan and vxlan": {"Network": "10.6.0.0/16", "Backend": {"Type": "vxlan", "VNI": 2}},
}


class Overlay:
    """One of two overlays on the same two machines."""

    def __init__(self, config: dict[str, Any], *hosts: Host) -> None:
        self.alpha, self.beta = self.hosts = hosts
        self.backend: str = config["Backend"]["Type"]
        self.vni: int = config["Backend"].get("VNI", 1)
        self.device = f"flannel.{self.vni}" if self.backend == "vxlan" else "eth0"
        hosts[0].etcd.put_config(config)

    def start(self) -> None:
        for host in self.hosts:
            host.start_daemon()
        for host in self.hosts:
            host.daemon.wait_ready()

    def expected(self, number: int) -> Rows:
        return expected(self.hosts[number], self.backend, vni=self.vni)

    def actual(self, number: int) -> Rows:
        return actual(self.hosts[number], self.backend, vni=self.vni)


def make_overlays(lab: Lab, kind: str) -> tuple[Overlay, Overlay]:
    """With no daemons yet."""
    machines = lab.add_hosts("alpha", "beta")
    first = Overlay(FIRST, *(host.beside("one") for host in machines))
    return first, Overlay(SECOND[kind], *(host.beside("two") for host in machines))


def wait_both_in_order(first: Overlay, second: Overlay) -> None:
    """Until the kernels of both machines hold what the two registries demand, and no more."""
    for number in range(2):
        differ = partial(differences, first, second, number)
        wait_for(differ, IN_ORDER_WITHIN, "the rows of both", lambda rows: not rows, 0.05)


def differences(first: Overlay, second: Overlay, number: int) -> list[tuple[str, str]]:
    """Rows of a machine that only one side knows of: its kernel, or the two registries."""
    want = first.expected(number) | second.expected(number)
    have = first.actual(number) | second.actual(number)
    return sorted(want.items() ^ have.items())


def check_traffic(*overlays: Overlay) -> None:
    for overlay in overlays:
        assert overlay.alpha.pod.ping(overlay.beta.pod.address, count=5, size=1400, df=True).lost == 0


def answers(host: Host, device: str, target: str) -> int:
    """To pings forced out of a device of this host."""
    done = host.run(
        ["sh", "-c", 'ping -n -q -c 3 -i 0.1 -W 0.5 -I "$1" "$2" 2>&1 || true', "sh", device, target]
    )
    return int(done.split(" received")[0].rsplit(maxsplit=1)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_each_network_has_its_own_way(lab: Lab, kind: str) -> None:
    first, second = make_overlays(lab, kind)
    for overlay in (first, second):
        overlay.start()
    for overlay in (first, second):
        for host in overlay.hosts:
            host.attach_pods()
    wait_both_in_order(first, second)
    check_traffic(first, second)
    for one, other in ((first, second), (second, first)):
        for source, target in ((one.alpha, one.beta), (one.beta, one.alpha)):
            assert answers(source, one.device, target.pod.address) == 3
            assert answers(source, other.device, target.pod.address) == 0
    for overlay in (first, second):
        for host in overlay.hosts:
            status = wait_status(host.daemon, "all to be well", lambda s: s["state"] == "in sync")
            assert (status["problems"], status["peers"]["count"]) == ([], 1)
            assert status["drift"]["repaired"] == {}


def wrote(text: str | bool, keys: list[str]) -> bool:
    """Whether the file of what is known of the registry is complete."""
    return isinstance(text, str) and all(key in text for key in keys)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["the first goes", "the second goes"])
def test_a_cleanup_leaves_the_other_as_it_was(lab: Lab, kind: str, order: str) -> None:
    overlays = make_overlays(lab, kind)
    goes, stays = overlays if order == "the first goes" else overlays[::-1]
    stays.start()
    for host in stays.hosts:
        host.attach_pods()
    machine = stays.alpha
    wait_for(lambda: stays.actual(0), 5, "the rows", lambda rows: rows == stays.expected(0))
    keys = [host.daemon.status()["lease"]["key"] for host in stays.hosts]
    kept = machine.state_directory / "registry"
    wait_for(lambda: kept.exists() and kept.read_text(), 10, "its last file", lambda text: wrote(text, keys))
    before = host_state(machine)
    goes.start()
    wait_both_in_order(goes, stays)
    assert changes(before, host_state(machine)), "there is nothing to clean up"
    refused = flannelctl(goes.alpha, "cleanup")
    assert refused.code == 1, "a daemon runs on that prefix"
    goes.alpha.daemon.terminate()

    ping = stays.alpha.pod.start_ping(stays.beta.pod.address)
    cleaned = flannelctl(goes.alpha, "cleanup")
    assert cleaned.code == 0, cleaned
    assert ping.stop().lost == ()
    assert changes(before, host_state(machine)) == []
    assert stays.alpha.daemon.status()["drift"]["repaired"] == {}


@pytest.mark.parametrize("kind", KINDS)
def test_kills_and_restarts_of_one_do_not_concern_the_other(lab: Lab, kind: str) -> None:
    first, second = make_overlays(lab, kind)
    for overlay in (first, second):
        overlay.start()
    wait_both_in_order(first, second)
    steady = second.alpha.daemon.status()["drift"]["ops"]
    for overlay in (first, second):
        overlay.alpha.daemon.kill()
        overlay.alpha.start_daemon().wait_ready()
    wait_both_in_order(first, second)
    status = wait_status(second.alpha.daemon, "all to be well", lambda s: s["state"] == "in sync")
    assert status["drift"]["ops"] == {"set": 0, "del": 0}
    assert steady["del"] == 0


def test_one_vni_for_two_networks_is_a_conflict_that_is_named(lab: Lab) -> None:
    alpha, beta = lab.add_hosts("alpha", "beta")
    first = Overlay(FIRST, alpha.beside("one"), beta.beside("one"))
    first.start()
    for host in first.hosts:
        host.attach_pods()
    wait_kept(first.alpha, set(first.alpha.etcd.leases()))  # written at leisure, and no part of what follows
    second = Overlay(FIRST | {"Network": "10.6.0.0/16"}, alpha.beside("two"), beta.beside("two"))
    before = host_state(alpha)
    daemon = second.alpha.start_daemon()
    status = wait_status(
        daemon, "the conflict", lambda s: "apply-failed" in [p["code"] for p in s["problems"]]
    )
    (problem,) = status["problems"]
    taken = (
        f"device flannel.1 exists and is not ours (alias 'flanneld-py:{first.alpha.prefix}', kind 'vxlan')"
    )
    assert taken in problem["reason"]
    assert "choose another VNI" in problem["reason"]
    assert (status["state"], status["ready"]) == ("degraded", False)
    own = ("+ files: two/", "+ packet filter: ")
    assert [line for line in changes(before, host_state(alpha)) if not line.startswith(own)] == []
    check_traffic(first)
    second.alpha.etcd.put_config(SECOND["vxlan and vxlan"])
    daemon.kill()
    second.alpha.start_daemon().wait_ready()
    check_traffic(first)
