"""What befalls a lease while its host is not looking, and clocks: no subnet ever has two owners.

Keys deleted and etcd leases revoked: test_leases.py. Loss and what the operator wants then:
test_lease_policy.py. More of clones: test_clones.py.
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import wait_for
from tests.netns.false_clock import FalseClock
from tests.netns.faults.injecting import stopped
from tests.netns.faults.product import on_vxlan
from tests.netns.faults.surfaces import OBSERVED
from tests.netns.observing import events, wait_held, wait_status
from tests.netns.oracle import own_key, subnet_of, wait_in_order
from tests.netns.peers import Peer, change_peers, make_peers
from tests.netns.registry_history import Stored, history, nothing_written, record_at, revision, stored
from tests.netns.scenes import config, overlay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flanneld_py.lab import Daemon, Host, Lab
    from tests.netns.faults.rows import Matrix

SHORT = 5
"""Seconds; the lowest TTL there is."""
SHORT_TTL = f"--subnet-lease-ttl={SHORT}s"
ENDS_WITHIN = 3 * SHORT + 5.0
"""Seconds in which etcd certainly ends an etcd lease of that TTL, on a busy machine too."""
RETURNS_WITHIN = 10.0


def lease_at(host: Host) -> Stored:
    """The host's record in etcd."""
    return record_at(host.etcd, own_key(host))


def wait_ended(host: Host, key: str) -> None:
    wait_for(lambda: stored(host.etcd, key), ENDS_WITHIN, "the lease to end", lambda found: found is None)


def take(host: Host, key: str, backend: str) -> Peer:
    """Another node, which lives, leases that subnet as soon as it is free."""
    taker = Peer(subnet_of(key), "192.0.2.77", "02:00:05:00:00:01")
    text = json.dumps(taker.record(backend) | {"NodeID": "another-node"})
    lease = host.etcd.grant(3600)
    host.etcd.ctl("put", f"--lease={lease}", f"{host.prefix}/subnets/{key}", "--", text)
    return taker


def owners(host: Host, key: str, since: int) -> list[str | None]:
    """Who owned a subnet one after the other, None where nobody did."""
    found = history(host.etcd, since)
    return [event.record.get("NodeID") for event in found if event.key == key]


# --- not looking ------------------------------------------------------------------------------------


@on_vxlan
def test_the_ttl_ends_while_the_daemon_is_frozen(lab: Lab, backend: str, fault: Matrix) -> None:
    """It wakes up believing that it holds its lease, and has it again."""
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=(*OBSERVED, SHORT_TTL))
    held, since = lease_at(alpha), revision(lab.etcd) + 1
    expected = "the same subnet is claimed again"
    with fault("TTL ends while the daemon is frozen", backend, expected=expected, check=None) as row:
        with stopped(alpha.daemon):
            wait_ended(alpha, held.key)
        row.cured()
        again = wait_for(lambda: stored(lab.etcd, held.key), 5, "the same key")
        wait_held(alpha.daemon, held.key)
        row.recovered(alpha, beta)
    assert again is not None
    assert (again.text, again.lease) == (held.text, lease_at(alpha).lease)
    assert owners(alpha, held.key, since) == [None, alpha.node_id]


@on_vxlan
def test_the_ttl_ends_while_the_daemon_is_frozen_and_another_node_takes_the_subnet(
    lab: Lab, backend: str, fault: Matrix
) -> None:
    """What it wakes up with is old; it must not write by it."""
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=(*OBSERVED, SHORT_TTL))
    key, since, env = own_key(alpha), revision(lab.etcd) + 1, alpha.subnet_file.read_bytes()
    expected = "the new owner is named and left alone; claimed when it ends"
    with fault(
        "TTL ends while the daemon is frozen, subnet taken",
        backend,
        expected=expected,
        check="lease",
        says="192.0.2.77",
    ) as row:
        with stopped(alpha.daemon):
            wait_ended(alpha, key)
            taker = take(alpha, key, backend)
            wait_in_order(beta, backend)
        row.injected()
        row.seen(alpha)
        row.endures(alpha)
        assert alpha.subnet_file.read_bytes() == env, "the data plane stays"
        change_peers(lab.etcd, backend, gone=[taker])
        wait_held(alpha.daemon, key)
        row.recovered(alpha, beta)
    assert owners(alpha, key, since) == [None, "another-node", None, alpha.node_id]


@contextmanager
def cut_off_from_etcd(lab: Lab, host: Host) -> Iterator[None]:
    """One host; the others reach it, and etcd."""
    lab.underlay.drop(
        [f"ip saddr {host.address} tcp dport 2379", f"ip6 saddr {host.address6} tcp dport 2379"]
    )
    try:
        yield
    finally:
        lab.underlay.drop([])


@on_vxlan
@pytest.mark.parametrize("taken", [False, True], ids=["free", "taken"])
def test_a_partition_longer_than_the_ttl(lab: Lab, backend: str, taken: bool, fault: Matrix) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=(*OBSERVED, SHORT_TTL))
    key, since = own_key(alpha), revision(lab.etcd) + 1
    expected = "the new owner is left alone" if taken else "the same subnet is claimed again"
    name = f"cut off from etcd for longer than the TTL{', subnet taken' if taken else ''}"
    with fault(
        name, backend, expected=expected, check="lease", says="was not renewed", told_within=60
    ) as row:
        with cut_off_from_etcd(lab, alpha):
            row.injected()
            wait_ended(alpha, key)
            taker = take(alpha, key, backend) if taken else None
            row.seen(alpha)
            assert alpha.daemon.status()["subnets"] == [subnet_of(key)], "the data plane stays"
        if taker is not None:
            status = wait_status(
                alpha.daemon, "the new owner", lambda s: s["lease"]["state"] == "conflict", RETURNS_WITHIN
            )
            assert taker.public in status["lease"]["reason"]
            change_peers(lab.etcd, backend, gone=[taker])
        wait_status(
            alpha.daemon,
            "the lease",
            lambda s: (s["lease"]["state"], s["lease"]["key"]) == ("held", key),
            RETURNS_WITHIN,
        )
        row.recovered(alpha, beta)
    between = ["another-node", None] if taken else []
    assert owners(alpha, key, since) == [None, *between, alpha.node_id]


# --- one identity -----------------------------------------------------------------------------------


@on_vxlan
def test_a_golden_image_that_was_booted_twice(lab: Lab, backend: str, fault: Matrix) -> None:
    """Two hosts with one node id, the state directory with it."""
    lab.etcd.put_config(config(backend))
    alpha, gamma = lab.add_hosts("alpha", "gamma")
    lab.start_daemons((*OBSERVED, "--node-id="))
    wait_in_order(alpha, backend)
    original = lab.etcd.leases()
    beta = lab.add_host("beta")
    shutil.copytree(alpha.state_directory, beta.state_directory, dirs_exist_ok=True)
    expected = "the clone takes another id and another subnet"
    with fault("two hosts with one node id", backend, expected=expected, check=None) as row:
        row.stands(alpha, gamma)
        beta.start_daemon((*OBSERVED, "--node-id=")).wait_ready()
        row.cured()
        row.recovered(alpha, beta, gamma)
    leases = lab.etcd.leases()
    assert {key: leases[key] for key in original} == original, "the original has lost nothing"
    assert len({record["NodeID"] for record in leases.values()}) == len(leases) == len(original) + 1


@on_vxlan
def test_two_hosts_that_publish_one_address(lab: Lab, backend: str, fault: Matrix) -> None:
    """As behind a NAT: the first one keeps what it has, the second one gets nothing and says why."""
    alpha, gamma = overlay(lab, backend, "alpha", "gamma", flags=OBSERVED)
    before = revision(lab.etcd)
    beta = lab.add_host("beta")
    expected = "the first keeps its lease, the second names it"
    with fault(
        "two hosts with one public address", backend, expected=expected, check="lease", says=alpha.address
    ) as row:
        row.stands(alpha, gamma)
        beta.start_daemon((*OBSERVED, f"--public-ip={alpha.address}"))
        row.injected()
        row.seen(beta)
        row.endures(beta)
        assert nothing_written(lab.etcd, before)
        beta.daemon.terminate()
        beta.start_daemon(OBSERVED)
        row.cured()
        beta.daemon.wait_ready()
        row.recovered(alpha, beta, gamma)


# --- a short TTL ------------------------------------------------------------------------------------

BUSY = "end=$(($(date +%s) + 25)); while [ $(date +%s) -lt $end ]; do seq 20000 >/dev/null; done"


@on_vxlan
def test_a_ttl_of_ten_seconds_under_load(lab: Lab, backend: str, fault: Matrix) -> None:
    """Four busy programs for two cores, and a registry in which something changes all the time."""
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=(*OBSERVED, "--subnet-lease-ttl=10s"))
    records = [lease_at(alpha), lease_at(beta)]
    peers = make_peers(lab.etcd, 20)
    expected = "no lease is lost, none is written"
    with fault("TTL of 10 s under load", backend, expected=expected, check=None) as row:
        busy = [alpha.spawn(f"busy-{n}", ["sh", "-c", BUSY]) for n in range(4)]
        deadline = time.monotonic() + 25
        while time.monotonic() < deadline:
            change_peers(lab.etcd, backend, put=peers)
            change_peers(lab.etcd, backend, gone=peers)
        for process in busy:
            assert process.wait(30) == 0
        row.cured()
        row.recovered(alpha, beta, kernel=False)
    assert [lease_at(alpha), lease_at(beta)] == records
    for host in (alpha, beta):
        assert not [*events(host.daemon, "lease_lost"), *events(host.daemon, "lease_expired")]


# --- clocks -----------------------------------------------------------------------------------------

HOUR, YEAR = 3600, 365 * 86_400
JUMPS = {"an hour back": -HOUR, "an hour ahead": HOUR, "a year back": -YEAR, "a year ahead": YEAR}


def seconds_ahead(daemon: Daemon) -> float:
    """Of the true time, by the last line of its log."""
    last: dict[str, Any] = daemon.log_lines()[-1]
    return datetime.fromisoformat(last["ts"]).timestamp() - time.time()


@on_vxlan
@pytest.mark.parametrize("jump", JUMPS)
def test_the_wall_clock_jumps(lab: Lab, backend: str, jump: str, tmp_path: Path, fault: Matrix) -> None:
    lab.etcd.put_config(config(backend))
    alpha, beta = lab.add_hosts("alpha", "beta")
    clock, flags = FalseClock(tmp_path), (*OBSERVED, SHORT_TTL)
    alpha.start_daemon(flags, env=clock.environment).wait_ready()
    beta.start_daemon(flags).wait_ready()
    for host in (alpha, beta):
        host.attach_pods()
        wait_in_order(host, backend)
    record, before = lease_at(alpha), lab.etcd.requests()["Lease/LeaseKeepAlive"]
    expected = "nothing: the lease is renewed, peers come and go"
    with fault(f"wall clock jumps {jump}", backend, expected=expected, check=None) as row:
        row.stands(alpha, beta)
        clock.turn(JUMPS[jump])
        row.endures(alpha, beta, seconds=2 * SHORT)  # longer than the lease lives
        assert lease_at(alpha) == record
        row.cured()
        row.recovered(alpha, beta)
    renewals = lab.etcd.requests()["Lease/LeaseKeepAlive"] - before
    assert 2 <= renewals <= 60, "neither forgotten nor without a pause"
    (peer,) = make_peers(lab.etcd, 1)
    change_peers(lab.etcd, backend, put=[peer])
    wait_in_order(alpha, backend)
    assert abs(seconds_ahead(alpha.daemon) - JUMPS[jump]) < 60, "it has not believed in that clock"
