"""`flannelctl cleanup` after everything that can happen: the host is as it was before the first start."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.netns.host_state import add_foreign_objects, changes, host_state
from tests.netns.oracle import actual, own_key, wait_in_order
from tests.netns.peers import change_peers, make_peers
from tests.netns.registry_history import stored
from tests.netns.scenes import BACKENDS, NETWORK, config, overlay
from tests.netns.test_ctl import flannelctl

if TYPE_CHECKING:
    from flanneld_py.lab import Lab

FOREIGN_CHANGES = {
    "link": "ip link set flannel.9 mtu 1300",
    "alias": "ip link set flannel.9 alias other",
    "link down": "ip link set flannel.9 down",
    "address": "ip address add 10.77.9.0/32 dev flannel.9",
    "route": "ip route replace 10.77.2.0/24 via 10.77.3.0 dev flannel.9 onlink",
    "route metric": "ip route add 172.21.0.0/16 via 192.0.2.254 metric 5",
    "rule": "ip rule add from 192.0.2.77 table 77",
    "neighbour": "ip neigh replace 10.77.2.0 lladdr 0a:00:00:00:00:0b dev flannel.9 nud permanent",
    "nexthop": "ip nexthop delete id 7",
    "fdb": "bridge fdb replace 0a:00:00:00:00:0a dev flannel.9 dst 192.0.2.10",
    "packet filter": "nft add rule ip filter FORWARD accept",
}


DEVICES = {"udp": "flannel0", "vxlan": "flannel.1"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_a_run_with_all_of_it_the_host_is_as_it_was(lab: Lab, backend: str) -> None:
    lab.etcd.put_config(config(backend))
    alpha, beta = lab.add_hosts("alpha", "beta")
    add_foreign_objects(alpha)
    shutil.rmtree(alpha.run_directory)
    before, foreign = host_state(alpha), actual(alpha, backend)
    steady, moved, gone, late = make_peers(lab.etcd, 4)
    change_peers(lab.etcd, backend, put=[steady, moved, gone])
    beta.start_daemon().wait_ready()
    alpha.start_daemon().wait_ready()
    wait_in_order(alpha, backend, beside=foreign)

    moved_to = replace(moved, mac="02:00:05:00:00:99", public="192.0.2.199")
    change_peers(lab.etcd, backend, put=[moved_to, late], gone=[gone])
    wait_in_order(alpha, backend, beside=foreign)
    alpha.ip("route", "delete", NETWORK if backend == "udp" else steady.subnet)
    if backend in DEVICES:
        wait_in_order(alpha, backend, beside=foreign)
        alpha.ip("link", "delete", DEVICES[backend])
    wait_in_order(alpha, backend, beside=foreign)
    alpha.daemon.kill()
    change_peers(lab.etcd, backend, gone=[late])
    alpha.start_daemon().wait_ready()
    wait_in_order(alpha, backend, beside=foreign)
    alpha.daemon.kill()
    assert changes(before, host_state(alpha)), "nothing to clean up"

    said = flannelctl(alpha, "cleanup")
    assert said.code == 0, said
    assert changes(before, host_state(alpha)) == []


@pytest.mark.parametrize("kind", FOREIGN_CHANGES)
def test_the_comparison_sees_a_foreign_change(lab: Lab, kind: str) -> None:
    alpha = lab.add_host("alpha")
    add_foreign_objects(alpha)
    before = host_state(alpha)
    assert changes(before, host_state(alpha)) == []
    alpha.run(FOREIGN_CHANGES[kind].split())
    assert changes(before, host_state(alpha))


def test_the_comparison_sees_changed_files(lab: Lab) -> None:
    alpha = lab.add_host("alpha")
    alpha.subnet_file.write_text("one")
    before = host_state(alpha)
    alpha.subnet_file.write_text("two")
    assert changes(before, host_state(alpha))
    alpha.subnet_file.write_text("one")
    assert changes(before, host_state(alpha)) == []
    alpha.subnet_file.chmod(0o600)
    assert changes(before, host_state(alpha))


# --- the lease ------------------------------------------------------------------------------------


def lease_left(lab: Lab, lease: int) -> int:
    """Seconds; -1 when it has ended."""
    left: int = lab.etcd.ctl_json("lease", "timetolive", f"{lease:x}")["ttl"]
    return left


def test_the_lease_is_kept_unless_it_is_to_be_released(lab: Lab) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    kept, released = (stored(lab.etcd, own_key(host)) for host in (alpha, beta))
    assert kept is not None
    assert released is not None
    for flag in ("--release-lease", "--keep-lease"):
        said = flannelctl(beta, "cleanup", flag)
        assert said.code != 0, "its daemon runs"
    for host in (alpha, beta):
        host.daemon.terminate()

    said = flannelctl(alpha, "cleanup", "--keep-lease")
    assert (said.code, f"{kept.key} stays in etcd" in said.out) == (0, True), said
    assert stored(lab.etcd, kept.key) == kept

    line = f"del lease {lab.etcd.prefix}/subnets/{released.key}"
    said = flannelctl(beta, "cleanup", "--release-lease", "--dry-run")
    assert (said.code, line in said.out) == (0, True), said
    assert stored(lab.etcd, released.key) == released
    said = flannelctl(beta, "cleanup", "--release-lease")
    assert (said.code, line in said.out, "stays in etcd" in said.out) == (0, True, False), said
    assert stored(lab.etcd, released.key) is None
    assert lease_left(lab, released.lease) == -1
    assert flannelctl(beta, "cleanup", "--release-lease").out == "nothing to remove\n"


def test_a_clone_does_not_release_the_lease_of_its_original(lab: Lab) -> None:
    alpha, _ = overlay(lab, "vxlan", "alpha", "beta")
    beta = lab.add_host("gamma")
    shutil.copytree(alpha.state_directory, beta.state_directory, dirs_exist_ok=True)
    before = stored(lab.etcd, own_key(alpha))
    said = flannelctl(beta, "cleanup", "--release-lease")
    assert said.code == 1
    assert f"it is the lease of {alpha.address}, no address of this host, which may be a clone" in said.err
    assert stored(lab.etcd, own_key(alpha)) == before
    assert flannelctl(beta, "cleanup").code == 0


def test_without_etcd_a_release_can_be_repeated(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    key = own_key(alpha)
    alpha.daemon.terminate()
    lab.etcd.stop()
    said = flannelctl(alpha, "cleanup", "--release-lease")
    assert said.code == 1
    assert "release the lease: etcd could not be asked" in said.err
    assert not alpha.ip("link", "show", "type", "vxlan")
    lab.etcd.start()
    said = flannelctl(alpha, "cleanup", "--release-lease")
    assert said.code == 0, said
    assert stored(lab.etcd, key) is None
    assert not alpha.state_directory.exists()
