"""What the operator wants of the lease: its TTL, what its loss means, and writing again for Go flannel."""

from __future__ import annotations

import json
import re
import time
from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.faults.surfaces import OBSERVED
from tests.netns.observing import events, start_pings, wait_answers, wait_held, wait_status
from tests.netns.oracle import own_key, subnet_of, wait_in_order
from tests.netns.peers import Peer, change_peers
from tests.netns.registry_history import Stored, history, nothing_written, revision, stored
from tests.netns.scenes import BACKENDS, config, overlay

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab
    from tests.netns.faults.rows import Matrix

# --- loss -----------------------------------------------------------------------------------------


def take_away(host: Host, backend: str) -> Peer:
    """Another node, with an id of its own, writes itself over the host's record."""
    taker = Peer(subnet_of(own_key(host)), "192.0.2.77", "02:00:05:00:00:01")
    text = json.dumps(taker.record(backend) | {"NodeID": "another-node"})
    host.etcd.ctl("put", f"{host.prefix}/subnets/{taker.key}", "--", text)
    return taker


@pytest.mark.parametrize("backend", BACKENDS)
def test_hold_keeps_the_data_plane_and_claims_the_subnet_when_it_is_free(
    lab: Lab, backend: str, fault: Matrix
) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=OBSERVED)
    key, before, since = own_key(alpha), alpha.subnet_env(), revision(lab.etcd) + 1
    expected = "the taker is named, the data plane stays; claimed when it is free"
    with fault(
        "key taken by another node", backend, expected=expected, check="lease", says="another-node"
    ) as row:
        row.stands(alpha)
        taker = take_away(alpha, backend)
        status = wait_status(alpha.daemon, "a conflict", lambda s: s["lease"]["state"] == "conflict")
        for part in (subnet_of(key), taker.public, "another-node", key):
            assert part in status["lease"]["reason"]
        assert "--on-lease-loss" in status["problems"][0]["fix"]
        assert status["subnets"] == [subnet_of(key)], "the data plane stays"
        row.seen(alpha)
        row.endures()
        assert alpha.subnet_env() == before
        assert [event.record.get("NodeID") for event in history(lab.etcd, since)] == ["another-node"]

        change_peers(lab.etcd, backend, gone=[taker])
        row.cured()
        wait_held(alpha.daemon, key)
        row.recovered(alpha, beta)
    ping = start_pings(alpha, beta)
    wait_answers(ping)
    assert ping.stop().lost == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_renumber_leaves_the_subnet_to_the_other_and_takes_another(lab: Lab, backend: str) -> None:
    lab.etcd.put_config(config(backend))
    alpha, beta = lab.add_hosts("alpha", "beta")
    alpha.start_daemon(["--on-lease-loss=renumber"]).wait_ready()
    beta.start_daemon().wait_ready()
    alpha.attach_pods()
    key, since = own_key(alpha), revision(lab.etcd) + 1
    take_away(alpha, backend)
    status = wait_status(alpha.daemon, "another subnet", lambda s: s["lease"]["key"] not in (None, key))
    assert status["lease"]["state"] == "held"
    wait_in_order(beta, backend)
    # Our bridge still has the old subnet, and so its route: it goes to the new owner when the pods are gone.
    wait_status(
        alpha.daemon, "the subnet to be ours", lambda s: "own network" in s["peers"]["bad"].get(key, "")
    )
    alpha.remove_pods()
    wait_in_order(alpha, backend)
    assert subnet_of(own_key(alpha)) == status["subnets"][0]
    network = ip_network(status["subnets"][0])
    assert alpha.subnet_env()["FLANNEL_SUBNET"] == f"{network[1]}/24"
    assert [(event.key, event.version) for event in history(lab.etcd, since)] == [
        (key, 2),
        (own_key(alpha), 1),
    ]
    (lost,) = events(alpha.daemon, "lease_lost")
    assert (lost["key"], lost["claiming"]) == (key, own_key(alpha))


def test_exit_ends_with_75_and_a_line_that_names_the_holder(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    alpha.start_daemon(["--on-lease-loss=exit"]).wait_ready()
    wait_in_order(alpha, "vxlan")
    rows = alpha.ip("address", "show", "dev", "flannel.1")[0]["addr_info"]
    taker = take_away(alpha, "vxlan")
    assert alpha.daemon.wait_exit() == 75
    said = alpha.daemon.log_text().splitlines()[-1]
    assert said.startswith(
        f"flanneld-py: our subnet {taker.subnet} is now held by 192.0.2.77 "
        f"(node id another-node, {taker.key}); the data plane stays; "
    )
    assert "Traceback" not in alpha.daemon.log_text()
    (stop,) = events(alpha.daemon, "stop")
    assert "signal" not in stop, "nobody has sent one"
    assert stop["reason"] in said
    told = alpha.daemon.status()
    assert (told["state"], told["ready"], told["problems"][0]["code"]) == ("stopped", False, "ended")
    assert told["problems"][0]["reason"] in said
    left = alpha.ip("address", "show", "dev", "flannel.1")[0]["addr_info"]
    assert [a["local"] for a in left] == [a["local"] for a in rows], "the data plane stays"
    # Whoever starts it again gets another subnet.
    alpha.start_daemon(["--on-lease-loss=exit"]).wait_ready()
    assert own_key(alpha) != taker.key


@pytest.mark.parametrize("policy", ["hold", "renumber", "exit"])
def test_a_lease_that_nobody_has_taken_is_claimed_again_whatever_the_policy(lab: Lab, policy: str) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    alpha.start_daemon([f"--on-lease-loss={policy}"]).wait_ready()
    before = stored(lab.etcd, own_key(alpha))
    assert before is not None
    lab.etcd.ctl("del", f"{lab.etcd.prefix}/subnets/{before.key}")
    after = wait_for(lambda: stored(lab.etcd, before.key), 5, "the same key")
    assert after is not None
    assert (after.text, after.created > before.created) == (before.text, True)


# --- TTL ------------------------------------------------------------------------------------------


def lease_of(host: Host) -> tuple[Stored, int, int]:
    """The host's record, and what its etcd lease was granted and how many keys hang on it."""
    found = stored(host.etcd, own_key(host))
    assert found is not None
    told = host.etcd.ctl_json("lease", "timetolive", f"{found.lease:x}", "--keys")
    return found, told["granted-ttl"], len(told["keys"])


def test_a_short_ttl_is_granted_and_renewed_and_the_subnet_is_free_after_it(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    alpha.start_daemon(["--subnet-lease-ttl=5s"]).wait_ready()
    held, granted, _ = lease_of(alpha)
    assert granted == 5
    before = lab.etcd.requests()["Lease/LeaseKeepAlive"]
    # Longer than the lease lives: it is renewed, and not written.
    wait_for(lambda: lab.etcd.requests()["Lease/LeaseKeepAlive"], 15, "4 renewals", lambda n: n >= before + 4)
    assert stored(lab.etcd, held.key) == held
    assert alpha.daemon.status()["lease"]["ttl"] == 5
    alpha.daemon.kill()
    wait_for(lambda: stored(lab.etcd, held.key), 15, "the lease to end", lambda kv: kv is None)


def test_another_ttl_over_a_restart_moves_the_record_to_a_new_etcd_lease(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    alpha.start_daemon(["--subnet-lease-ttl=600s"]).wait_ready()
    first, granted, _ = lease_of(alpha)
    assert granted == 600
    alpha.daemon.terminate()
    alpha.start_daemon(["--subnet-lease-ttl=1h"]).wait_ready()
    wait_held(alpha.daemon, first.key)
    second, granted, _ = lease_of(alpha)
    assert granted == 3600
    assert (second.text, second.created, second.version) == (first.text, first.created, first.version + 1)
    wait_for(
        lambda: lab.etcd.ctl_json("lease", "timetolive", f"{first.lease:x}")["ttl"],
        5,
        "the old etcd lease to be revoked",
        lambda ttl: ttl == -1,
    )
    assert alpha.daemon.status()["lease"]["ttl"] == 3600
    alpha.daemon.terminate()
    alpha.start_daemon(["--subnet-lease-ttl=1h"]).wait_ready()
    wait_held(alpha.daemon, first.key)
    assert stored(lab.etcd, first.key) == second, "nothing changed, nothing written"


def test_the_old_etcd_lease_stays_while_another_key_hangs_on_it(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    alpha.start_daemon(["--subnet-lease-ttl=600s"]).wait_ready()
    first, _, _ = lease_of(alpha)
    lab.etcd.ctl("put", f"--lease={first.lease:x}", "/of-the-operator", "value")
    alpha.daemon.terminate()
    alpha.start_daemon(["--subnet-lease-ttl=1h"]).wait_ready()
    wait_status(alpha.daemon, "the new TTL", lambda s: s["lease"]["ttl"] == 3600)
    assert lab.etcd.ctl("get", "/of-the-operator", "--print-value-only").strip() == "value"


# --- writing again --------------------------------------------------------------------------------

GO = Peer("10.5.9.0/24", "192.0.2.99", "02:00:05:00:00:99")
TTL, MARGIN = 10, 7
"""So that a record is written again every 3 s ± 10 %, at least half its TTL: every 5 s."""
PERIOD = 5.0


def start_short(host: Host) -> Stored:
    host.start_daemon([f"--subnet-lease-ttl={TTL}s", f"--subnet-lease-renew-margin={MARGIN}s"]).wait_ready()
    return lease_of(host)[0]


def test_without_a_host_of_go_flannel_nothing_is_ever_written_again(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    records = [start_short(host) for host in (alpha, beta)]
    # Garbage is no reason either: there is nobody to heal.
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/10.5.77.0-24", "garbage")
    since = revision(lab.etcd)
    time.sleep(2.5 * PERIOD)
    assert nothing_written(lab.etcd, since)
    assert [stored(lab.etcd, record.key) for record in records] == records


def test_with_one_each_record_is_put_again_in_time_unchanged_and_under_its_lease(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    records = [start_short(host) for host in (alpha, beta)]
    wait_in_order(beta, "vxlan")
    ops = beta.daemon.status()["drift"]["ops"]
    change_peers(lab.etcd, "vxlan", put=[GO])
    begun = time.monotonic()
    for before in records:
        after = wait_for(
            lambda key=before.key: stored(lab.etcd, key),  # type: ignore[misc]
            30,
            "two more puts",
            lambda kv, v=before.version: kv and kv.version >= v + 2,  # type: ignore[misc]
        )
        assert after is not None
        assert (after.text, after.lease, after.created) == (before.text, before.lease, before.created)
    took = time.monotonic() - begun
    assert 2 * 0.9 * PERIOD - 1 <= took <= 2 * 1.1 * PERIOD + 3
    wait_in_order(beta, "vxlan")
    assert beta.daemon.status()["drift"]["ops"]["set"] <= ops["set"] + 4, "only the Go host's rows"

    change_peers(lab.etcd, "vxlan", gone=[GO])
    wait_for(
        lambda: [host.daemon.status()["peers"]["count"] for host in (alpha, beta)],
        5,
        "the Go host to be gone",
        lambda n: n == [1, 1],
    )
    since = revision(lab.etcd)
    time.sleep(1.5 * PERIOD)
    assert nothing_written(lab.etcd, since), "and no more after it has gone"


def routes_of_go(events: list[Stored], own: str) -> set[str]:
    """The peers of a Go flannel host: an event that it cannot read takes all of them away (defect S1)."""
    peers: set[str] = set()
    for event in events:
        if not re.fullmatch(r"[0-9.]+-[0-9]+", event.key) or (event.text or "{").startswith("garbage"):
            peers.clear()
        elif event.text is None:
            peers.discard(event.key)
        elif event.key != own:
            peers.add(event.key)
    return peers


def test_s1_hosts_of_go_get_their_routes_back_and_each_record_is_put_once(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    since = revision(lab.etcd) + 1
    hosts = lab.add_hosts("alpha", "beta")
    change_peers(lab.etcd, "vxlan", put=[GO])
    for host in hosts:
        host.start_daemon().wait_ready()
    records = [lease_of(host)[0] for host in hosts]
    ours = {record.key for record in records}
    assert routes_of_go(history(lab.etcd, since), GO.key) == ours
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/no-subnet", "garbage")
    begun = time.monotonic()
    assert routes_of_go(history(lab.etcd, since), GO.key) == set()
    wait_for(
        lambda: routes_of_go(history(lab.etcd, since), GO.key), 40, "the routes", lambda r: r == ours, 0.5
    )
    assert 5 <= time.monotonic() - begun <= 33
    for before in records:
        after = stored(lab.etcd, before.key)
        assert after is not None
        assert (after.version, after.text, after.lease) == (2, before.text, before.lease)
