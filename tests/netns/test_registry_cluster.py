"""etcd with three members: one of them dies or is cut off, the leader dies, two of them die."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from flanneld_py.errors import Unreachable
from flanneld_py.lab import wait_for
from tests.netns.etcd_cluster import Cluster
from tests.netns.etcd_servers import PREFIX, free_ports, wait_until
from tests.netns.faults.product import on_vxlan
from tests.netns.faults.rows import AFTER_A_NEW_LEADER
from tests.netns.faults.surfaces import OBSERVED
from tests.netns.observing import codes, events, start_pings, wait_answers, wait_status
from tests.netns.oracle import actual, wait_in_order
from tests.netns.peers import change_peers, make_peers
from tests.netns.registry_clients import following, seen
from tests.netns.scenes import overlay

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.drivers.etcd import EtcdRegistry
    from flanneld_py.lab import Host, Lab
    from tests.netns.etcd_cluster import Member
    from tests.netns.etcd_servers import Etcd
    from tests.netns.faults.rows import Matrix

NEW_LEASE_WITHIN = 10.0
FOUND_OUT_WITHIN = 15.0
"""Seconds until a connection that leads nowhere is given up: pings find out, not etcd."""

# --- the driver -----------------------------------------------------------------------------------


@pytest.fixture
def members(servers: Callable[..., Etcd]) -> list[Etcd]:
    """Three, on loopback."""
    ports = dict(zip(("m1", "m2", "m3"), free_ports(3), strict=True))
    made = [servers(name=name, peers=ports) for name in ports]
    for member in made:
        member.launch()
    wait_until(lambda: all(member.healthy() for member in made))
    return made


def leader_of(members: list[Etcd]) -> Etcd:
    return next(member for member in members if member.leads())


@pytest.mark.parametrize("watched", ["the leader", "another"])
def test_no_event_is_lost_when_the_leader_is_killed(
    members: list[Etcd], connect: Callable[..., EtcdRegistry], watched: str
) -> None:
    leader = leader_of(members)
    others = [member for member in members if member is not leader]
    first = leader if watched == "the leader" else others[0]
    order = [first, *(member for member in members if member is not first)]
    registry, writer = connect(*(m.url for m in order)), connect(*(m.url for m in others))
    with following(registry) as items:
        assert registry.endpoint == first.url
        written = []
        lease = writer.grant(600)
        for number in range(60):
            if number == 20:
                leader.kill()
                killed = time.monotonic()
            key, value = f"subnets/{number % 7}", str(number)
            while True:
                try:
                    writer.put(key, value)
                    break
                except Unreachable:
                    assert time.monotonic() < killed + NEW_LEASE_WITHIN
            written.append((key, value.encode()))
        wait_until(lambda: written[-1] in seen(items))
        assert writer.keep_alive(lease) == 600
        # A write whose answer was lost with the leader may have been made twice.
        came = seen(items)
        assert [change for n, change in enumerate(came) if change not in came[:n]] == written
        stored = others[0].stored(PREFIX)
        assert {f"{PREFIX}/{key}".encode(): value for key, value in came} == stored
    if watched == "the leader":
        assert registry.endpoint != leader.url


def test_endpoints_are_used_in_the_order_given_and_left_only_when_they_fail(
    members: list[Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    leader = leader_of(members)
    # Of the others, so that there is a leader at any time.
    first, second = (member for member in members if member is not leader)
    registry = connect(first.url, second.url, leader.url)
    for _ in range(3):
        registry.list()
    assert registry.endpoint == first.url
    first.kill()
    registry.list()
    assert registry.endpoint == second.url
    first.launch()
    wait_until(first.healthy)
    registry.list()
    assert registry.endpoint == second.url
    second.kill()
    registry.list()
    assert registry.endpoint == leader.url


# --- daemons --------------------------------------------------------------------------------------


@pytest.fixture
def cluster(fresh_lab: Lab) -> Cluster:
    """In the place of the lab's own etcd."""
    fresh_lab.etcd.stop()
    cluster = Cluster(fresh_lab)
    fresh_lab.etcd = cluster
    cluster.start()
    return cluster


def used_by(host: Host, cluster: Cluster) -> Member:
    """The member that a daemon watches."""
    url = host.daemon.status()["registry"]["endpoint"]
    return next(member for member in cluster.members if member.url == url)


def assert_a_new_host_joins(lab: Lab, backend: str, hosts: list[Host], name: str, began: float) -> Host:
    """Within NEW_LEASE_WITHIN of `began`, and the others see it."""
    newcomer = lab.add_host(name)
    newcomer.start_daemon(OBSERVED).wait_ready()
    assert time.monotonic() - began < NEW_LEASE_WITHIN
    newcomer.attach_pods()
    for host in (newcomer, *hosts):
        wait_in_order(host, backend, FOUND_OUT_WITHIN)
    return newcomer


@on_vxlan
def test_the_leader_is_killed(fresh_lab: Lab, cluster: Cluster, backend: str, fault: Matrix) -> None:
    alpha, beta = overlay(fresh_lab, backend, "alpha", "beta", flags=OBSERVED)
    leases = cluster.leases()
    for round_number in range(2):
        leader = cluster.leader()
        # The second time the daemons watch the one that dies.
        if round_number:
            used = used_by(alpha, cluster)
            if used is not leader:
                cluster.ctl("move-leader", member_id(cluster, used))
                leader = cluster.leader()
                assert leader is used
        name = "leader killed, of three members" + (", which we used" if round_number else "")
        more = {"expected": "a new host joins within 10 s", "back_within": AFTER_A_NEW_LEADER}
        with fault(name, backend, check=None, **more) as row:
            row.stands(alpha, beta)
            leader.kill()
            row.cured()
            newcomer = assert_a_new_host_joins(
                fresh_lab, backend, [alpha, beta], f"gamma{round_number}", time.monotonic()
            )
            row.recovered(alpha, beta, newcomer)
        cluster.start()
    for host in (alpha, beta):
        assert events(host.daemon, "lease_lost") == []
        assert events(host.daemon, "registry_relist") == [], "the watch was not resumed"
    assert leases.items() <= cluster.leases().items()


def member_id(cluster: Cluster, member: Member) -> str:
    lines = cluster.ctl("member", "list").splitlines()
    return next(line.split(",")[0] for line in lines if member.url in line)


@on_vxlan
def test_the_member_in_use_is_cut_off(fresh_lab: Lab, cluster: Cluster, backend: str, fault: Matrix) -> None:
    alpha, beta = overlay(fresh_lab, backend, "alpha", "beta", flags=OBSERVED)
    used = used_by(alpha, cluster)
    with fault(
        "member in use cut off, of three",
        backend,
        expected="another member is used",
        check="registry",
        says="unreachable",
        back_within=AFTER_A_NEW_LEADER,
    ) as row:
        row.stands(alpha, beta)
        used.cut()
        row.cured()
        row.seen(alpha, beta, passes=True)
        row.recovered(alpha, beta)
    assert_a_new_host_joins(fresh_lab, backend, [alpha, beta], "gamma", time.monotonic())
    for host in (alpha, beta):
        assert used_by(host, cluster) is not used
        assert events(host.daemon, "registry_relist") == []
    used.mend()
    (peer,) = make_peers(cluster, 1)
    change_peers(cluster, backend, put=[peer])
    for host in (alpha, beta):
        wait_in_order(host, backend)


@on_vxlan
def test_the_quorum_is_lost(fresh_lab: Lab, cluster: Cluster, backend: str, fault: Matrix) -> None:
    alpha, beta = overlay(fresh_lab, backend, "alpha", "beta", flags=OBSERVED)
    with fault(
        "quorum lost, of three members",
        backend,
        expected="all peers stay",
        check="registry",
        says="no leader",
        back_within=AFTER_A_NEW_LEADER,
    ) as row:
        row.stands(alpha, beta)
        for member in cluster.members[1:]:
            member.kill()
        row.injected()
        row.seen(alpha, beta)
        row.endures()
        cluster.start()
        row.recovered(alpha, beta)


@pytest.mark.parametrize("backend", ["vxlan"])
def test_a_daemon_that_starts_without_a_quorum_changes_nothing(
    fresh_lab: Lab, cluster: Cluster, backend: str
) -> None:
    alpha, beta = overlay(fresh_lab, backend, "alpha", "beta", flags=OBSERVED)
    rows = {host: actual(host, backend) for host in (alpha, beta)}
    ping = start_pings(alpha, beta)
    last, *others = cluster.members
    for member in others:
        member.kill()
    for host in (alpha, beta):
        status = wait_status(
            host.daemon, "the loss", lambda s: codes(s) == ["registry-unreachable"], FOUND_OUT_WITHIN
        )
        assert f"{last.url}: no leader" in status["problems"][0]["reason"]
        assert status["problems"][0]["fix"]
    # Long enough for a daemon to do something wrong: each tries again and again.
    tries = {host: len(host.daemon.log_lines()) for host in (alpha, beta)}
    wait_answers(ping)
    beta.daemon.kill()
    beta.start_daemon()
    wait_status(beta.daemon, "the reason", lambda s: codes(s) == ["registry-unreachable"], FOUND_OUT_WITHIN)
    for host in (alpha, beta):
        assert actual(host, backend) == rows[host]
    assert len(alpha.daemon.log_lines()) - tries[alpha] < 5
    cluster.start()
    for host in (alpha, beta):
        wait_status(host.daemon, "no problem", lambda s: s["state"] == "in sync", FOUND_OUT_WITHIN)
        assert actual(host, backend) == rows[host]
    assert ping.stop().lost == ()
    wait_for(lambda: actual(alpha, backend), 1, "nothing to change", lambda seen: seen == rows[alpha])
