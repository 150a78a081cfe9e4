"""A host that starts while etcd is away goes by what its last run knew, until etcd answers."""

from __future__ import annotations

import re
import shutil
import time
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import LabError, wait_for
from tests.netns.faults.surfaces import OBSERVED
from tests.netns.kernel_writes import STRACE, kernel_writes
from tests.netns.observing import codes, start_pings, wait_answers, wait_held, wait_status
from tests.netns.offline import (
    IN_SYNC_WITHIN,
    TRIES,
    boot,
    boot_in_time,
    promised,
    running_on,
    switch_off,
    wait_kept,
    wait_reached,
    wait_sync,
)
from tests.netns.oracle import actual, own_key, subnet_of, wait_in_order
from tests.netns.peers import Peer, change_peers, make_peers
from tests.netns.registry_history import nothing_written, revision
from tests.netns.scenes import BACKENDS, IN_KERNEL, NETWORK, config, overlay
from tests.netns.test_ctl import flannelctl
from tests.netns.test_healthz import ask_all
from tests.netns.test_registry_auth import ROOT, set_up_users

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.lab import Host, Lab
    from tests.netns.faults.rows import Matrix

TOLD_WITHIN = 5.0


# --- the reboot -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_a_reboot_of_all_hosts_pods_reach_each_other(
    lab: Lab, backend: str, fault: Matrix, figure: Callable[[str], None]
) -> None:
    hosts = overlay(lab, backend, "alpha", "beta", "gamma")
    alpha, beta, gamma = hosts
    before = switch_off(*hosts, backend=backend)
    leases, etcd_revision = lab.etcd.leases(), revision(lab.etcd)
    with fault(
        "all hosts rebooted while etcd is stopped",
        backend,
        check="registry",
        says="unreachable, running on state of",
        expected="pods reach each other within 3 s, READY, the same subnets",
    ) as row:
        lab.etcd.stop()
        seconds = boot_in_time(*hosts, ways=((alpha, beta), (beta, gamma)), args=OBSERVED)
        figure(f"{backend}: three hosts rebooted without etcd, pods reach each other after {seconds:.2f} s")
        for host in hosts:
            running_on(host)
            assert actual(host, backend) == before[host.name].rows
            assert host.subnet_file.read_bytes() == before[host.name].env
        row.injected()
        row.seen(*hosts)
        row.stands(*hosts)
        lab.etcd.start()
        row.recovered(*hosts)
    for host in hosts:
        wait_held(host.daemon, before[host.name].key)
        assert host.subnet_file.read_bytes() == before[host.name].env
    assert lab.etcd.leases() == leases
    assert nothing_written(lab.etcd, etcd_revision)


@pytest.mark.parametrize("backend", IN_KERNEL)
def test_everything_of_ours_is_wiped_while_no_daemon_runs(lab: Lab, backend: str) -> None:
    """Pods and their bridge stand: only what the daemon made is gone, and its run directory."""
    alpha, beta = overlay(lab, backend, "alpha", "beta")
    before = switch_off(alpha, backend=backend)[alpha.name]
    lab.etcd.stop()
    took: list[float] = []
    while not took or (min(took) > promised(alpha) and len(took) < TRIES):
        alpha.daemon.kill()
        alpha.run(["ip", "nexthop", "flush", "proto", "2"])
        if backend == "vxlan":
            alpha.ip("link", "delete", "flannel.1")
        alpha.run(["nft", "flush", "ruleset"])
        shutil.rmtree(alpha.run_directory)
        assert [row for row in actual(alpha, backend) if row in before.rows] == []
        began = time.monotonic()
        alpha.start_daemon().wait_ready()
        took.append(wait_reached(alpha, beta, began))
    assert min(took) <= promised(alpha), took
    running_on(alpha)
    assert actual(alpha, backend) == before.rows


@pytest.mark.parametrize("backend", IN_KERNEL)
def test_a_restart_of_the_daemon_alone_writes_nothing(lab: Lab, backend: str) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta")
    before = switch_off(alpha, backend=backend)[alpha.name]
    lab.etcd.stop()
    ping = start_pings(beta, alpha)
    daemon = alpha.start_daemon(strace=STRACE)
    daemon.wait_ready()
    running_on(alpha)
    assert actual(alpha, backend) == before.rows
    wait_answers(ping)
    assert ping.stop().lost == ()
    assert daemon.terminate() == 0
    trace = kernel_writes(daemon.trace)
    assert trace.reads > 0
    assert trace.lines == []


def frozen(lab: Lab) -> None:
    lab.etcd.pause()


def cut_off(lab: Lab) -> None:
    """Nothing is refused: what is sent gets lost."""
    lab.underlay.drop(["tcp dport 2379", "tcp sport 2379"])


@pytest.mark.parametrize("away", [frozen, cut_off])
def test_an_etcd_that_says_nothing_keeps_nobody_waiting(
    lab: Lab, fault: Matrix, away: Callable[[Lab], None]
) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    switch_off(alpha, backend="vxlan")
    with fault(
        f"a host rebooted while etcd is {away.__name__.replace('_', ' ')}",
        "vxlan",
        check="registry",
        says="unreachable, running on state of",
        expected="pods reach each other within 3 s, READY, the same subnet",
    ) as row:
        away(lab)
        boot_in_time(alpha, ways=[(alpha, beta)], args=OBSERVED)
        running_on(alpha)
        row.injected()
        row.seen(alpha)
        row.stands(alpha, beta)
        lab.underlay.drop([])
        lab.etcd.resume()
        row.recovered(alpha)


def test_all_that_asks_hears_of_it(lab: Lab) -> None:
    """`flannelctl status`, /readyz, /metrics and the way to wait for a start."""
    alpha, _ = overlay(lab, "vxlan", "alpha", "beta")
    switch_off(alpha, backend="vxlan")
    lab.etcd.stop()
    boot(alpha, args=("--healthz-port=8471", "--healthz-ip=127.0.0.1", "--metrics-addr=127.0.0.1:8472"))
    of = running_on(alpha)
    shown = flannelctl(alpha, "status")
    assert shown.code == 1
    assert re.search(rf"  registry +unreachable .*, running on state of {of}, revision", shown.out)
    assert re.search(rf"not ready: registry: unreachable, running on state of {of}", shown.out)
    code, body = ask_all(alpha, "/readyz", address="127.0.0.1")
    assert code == 503
    assert f"[-] registry: unreachable, running on state of {of} for " in body
    assert ask_all(alpha, "/healthz", address="127.0.0.1")[0] == 200
    assert flannelctl(alpha, "wait-ready", "--timeout", "5s").code == 0, "containers may be started"
    assert "lease-unconfirmed" not in shown.out


def test_the_interface_is_that_of_the_last_run_where_no_flag_names_it(lab: Lab) -> None:
    """Else it would be that of the way to etcd, whose name perhaps nobody resolves now."""
    lab.etcd.put_config(config("vxlan"))
    alpha, _ = lab.add_hosts("alpha", "beta")
    alpha.iface = ""
    for version in ("-4", "-6"):
        alpha.ip(version, "route", "delete", "default")
    lab.start_daemons()
    assert "the route to etcd" in alpha.daemon.status()["external"]["how"]
    before = switch_off(alpha, backend="vxlan")[alpha.name]
    lab.etcd.stop()
    alpha.reboot()
    for version in ("-4", "-6"):
        alpha.ip(version, "route", "delete", "default")
    alpha.start_daemon().wait_ready()
    running_on(alpha)
    assert alpha.daemon.status()["external"]["how"] == f"the last run ({alpha.address})"
    assert actual(alpha, "vxlan") == before.rows
    lab.etcd.start()
    wait_sync(alpha)
    assert actual(alpha, "vxlan") == before.rows


# --- etcd is back ---------------------------------------------------------------------------------


def lose_lease(host: Host) -> str:
    """End the etcd lease of its record; the key."""
    key = own_key(host)
    stored = host.etcd.ctl_json("get", f"{host.etcd.prefix}/subnets/{key}")["kvs"][0]
    host.etcd.ctl("lease", "revoke", f"{stored['lease']:x}")
    wait_for(lambda: key in host.etcd.leases(), 5, "the record to be gone", lambda there: not there)
    return key


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lease_that_ended_meanwhile_is_claimed_again(lab: Lab, backend: str, fault: Matrix) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta")
    before = switch_off(alpha, beta, backend=backend)
    with fault(
        "all hosts rebooted without etcd, a lease ended meanwhile",
        backend,
        check="registry",
        says="unreachable, running on state of",
        expected="the same subnet is claimed again",
    ) as row:
        lose_lease(alpha)
        lab.etcd.stop()
        boot(alpha, beta, args=OBSERVED)
        for host in (alpha, beta):
            running_on(host)
        row.injected()
        row.seen(alpha, beta)
        row.stands(beta, alpha)
        lab.etcd.start()
        row.recovered(alpha, beta)
    assert own_key(alpha) == before["alpha"].key
    for host in (alpha, beta):
        assert host.subnet_file.read_bytes() == before[host.name].env


def taken_meanwhile(lab: Lab, alpha: Host) -> Peer:
    """Alpha is off, and another host, which exists in etcd only, has its subnet."""
    switch_off(alpha, backend="vxlan")
    subnet = subnet_of(lose_lease(alpha))
    other = Peer(subnet, "192.0.2.199", "02:00:05:00:00:99")
    change_peers(lab.etcd, "vxlan", put=[other])
    lab.etcd.stop()
    return other


def test_a_subnet_that_another_host_took_is_held_on_to_and_named(lab: Lab) -> None:
    alpha, _ = overlay(lab, "vxlan", "alpha", "beta")
    other = taken_meanwhile(lab, alpha)
    boot(alpha)
    running_on(alpha)
    rows, env = actual(alpha, "vxlan"), alpha.subnet_file.read_bytes()
    lab.etcd.start()
    status = wait_status(alpha.daemon, "a conflict", lambda s: s["lease"]["state"] == "conflict", TOLD_WITHIN)
    assert f"our subnet {other.subnet} is now held by 192.0.2.199" in status["lease"]["reason"]
    assert not status["ready"]
    assert (actual(alpha, "vxlan"), alpha.subnet_file.read_bytes()) == (rows, env)
    assert lab.etcd.leases()[other.key] == other.record("vxlan")
    change_peers(lab.etcd, "vxlan", gone=[other])
    wait_sync(alpha)
    assert own_key(alpha) == other.key


def test_a_subnet_that_another_host_took_is_given_up_where_that_is_wanted(lab: Lab) -> None:
    alpha, _ = overlay(lab, "vxlan", "alpha", "beta")
    other = taken_meanwhile(lab, alpha)
    boot(alpha, args=("--on-lease-loss=renumber",))
    running_on(alpha)
    alpha.remove_pods()  # their bridge would be outdated
    lab.etcd.start()
    wait_status(alpha.daemon, "another lease", lambda s: s["lease"]["key"] not in (None, other.key), 10)
    wait_sync(alpha)
    wait_in_order(alpha, "vxlan")
    assert lab.etcd.leases()[other.key] == other.record("vxlan")
    assert own_key(alpha) != other.key
    assert other.subnet.replace(".0/", ".1/") != alpha.subnet_env()["FLANNEL_SUBNET"]


def test_a_config_that_was_changed_meanwhile_is_taken_as_by_a_daemon_that_runs(lab: Lab) -> None:
    """Containers run by the one before, so what would cut them off waits."""
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    before = switch_off(alpha, backend="vxlan")[alpha.name]
    lab.etcd.put_config(config("vxlan", Network="10.6.0.0/16"))
    lab.etcd.stop()
    boot(alpha)
    running_on(alpha)
    ping = start_pings(alpha, beta)
    lab.etcd.start()
    status = wait_status(alpha.daemon, "the change", lambda s: "config-pending" in codes(s), IN_SYNC_WITHIN)
    assert (status["networks"], status["lease"]["key"]) == ([NETWORK], before.key)
    assert alpha.subnet_file.read_bytes() == before.env
    wait_answers(ping)
    assert ping.stop().lost == ()


def test_another_address_than_peers_send_to_is_named_and_then_published(lab: Lab) -> None:
    """By DHCP, say. It is the same machine, which its interface shows."""
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    before = switch_off(alpha, backend="vxlan")[alpha.name]
    lab.etcd.stop()
    alpha.reboot()
    alpha.ip("address", "delete", f"{alpha.address}/24", "dev", "eth0")
    alpha.ip("address", "add", "192.0.2.77/24", "dev", "eth0")
    alpha.start_daemon().wait_ready()
    alpha.attach_pods()
    status = wait_status(alpha.daemon, "it to be named", lambda s: "lease-unconfirmed" in codes(s))
    (problem,) = [one for one in status["problems"] if one["code"] == "lease-unconfirmed"]
    assert (
        f"peers know this host by {alpha.address}, and send there; it now has 192.0.2.77" in problem["reason"]
    )
    assert alpha.subnet_file.read_bytes() == before.env
    lab.etcd.start()
    wait_sync(alpha)
    assert lab.etcd.leases()[before.key]["PublicIP"] == "192.0.2.77"
    wait_for(lambda: alpha.pod.ping(beta.pod.address, count=1, wait=0.2).received, 10, "an answer")


def test_peers_that_left_meanwhile_leave_when_etcd_says_so(lab: Lab) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    (ghost,) = make_peers(lab.etcd, 1)
    change_peers(lab.etcd, "vxlan", put=[ghost])
    wait_in_order(alpha, "vxlan")
    before = switch_off(alpha, backend="vxlan")[alpha.name]
    change_peers(lab.etcd, "vxlan", gone=[ghost])
    lab.etcd.stop()
    boot(alpha)
    running_on(alpha)
    assert actual(alpha, "vxlan") == before.rows, "also the one that has left: nobody has said so"
    ping = start_pings(alpha, beta)
    lab.etcd.start()
    wait_sync(alpha)
    wait_in_order(alpha, "vxlan")
    wait_answers(ping)
    assert ping.stop().lost == ()


def test_a_peer_that_is_newer_than_the_state_stays(lab: Lab) -> None:
    """Killed before it was written: what works is not taken away over what is known to be old."""
    alpha, _ = overlay(lab, "vxlan", "alpha", "beta")
    wait_kept(alpha, set(lab.etcd.leases()))
    files = {file: file.read_bytes() for file in alpha.state_directory.iterdir() if file.name != "lock"}
    newer, gone = make_peers(lab.etcd, 2)
    change_peers(lab.etcd, "vxlan", put=[newer, gone])
    wait_in_order(alpha, "vxlan")
    rows = actual(alpha, "vxlan")
    alpha.daemon.kill()
    for file, content in files.items():
        file.write_bytes(content)
    change_peers(lab.etcd, "vxlan", gone=[gone])
    lab.etcd.stop()
    alpha.start_daemon().wait_ready()
    running_on(alpha)
    assert actual(alpha, "vxlan") == rows
    lab.etcd.start()
    wait_sync(alpha)
    wait_in_order(alpha, "vxlan")
    assert alpha.daemon.status()["drift"]["repaired"] == {}


@pytest.mark.parametrize("backend", IN_KERNEL)
def test_an_etcd_that_comes_back_empty_takes_no_peer_away(lab: Lab, backend: str) -> None:
    hosts = overlay(lab, backend, "alpha", "beta")
    (ghost,) = make_peers(lab.etcd, 1)
    change_peers(lab.etcd, backend, put=[ghost])
    for host in hosts:
        wait_in_order(host, backend)
    before = switch_off(*hosts, backend=backend)
    lab.etcd.stop()
    boot(*hosts)
    ping = start_pings(*hosts)
    lab.etcd.start(empty=True)
    lab.etcd.put_config(config(backend))
    wait_for(lambda: len(lab.etcd.leases()), IN_SYNC_WITHIN, "both to be back", lambda count: count == 2)
    wait_sync(*hosts)
    for host in hosts:
        assert own_key(host) == before[host.name].key
        assert actual(host, backend) == before[host.name].rows
    wait_answers(ping)
    assert ping.stop().lost == ()


# --- refused --------------------------------------------------------------------------------------


def test_a_host_that_is_refused_after_a_reboot_goes_by_its_state(fresh_lab: Lab) -> None:
    """A password or certificate that has expired meanwhile must not take the network from its containers."""
    alpha, beta = overlay(fresh_lab, "vxlan", "alpha", "beta")
    switch_off(alpha, backend="vxlan")
    set_up_users(fresh_lab.etcd.ctl, fresh_lab.etcd.prefix)
    fresh_lab.etcd.client_flags = ROOT
    began = boot(alpha)
    wait_reached(alpha, beta, began)
    status = wait_status(alpha.daemon, "the refusal", lambda s: codes(s) == ["registry-refused"])
    assert "running on state of" in status["problems"][0]["reason"]
    assert alpha.daemon.running
    with pytest.raises(LabError):
        alpha.daemon.wait_exit(1)
