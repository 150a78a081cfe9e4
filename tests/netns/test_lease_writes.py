"""How often a lease is written, what happens meanwhile, and what becomes of the old one before the new."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import CommandFailed, wait_for
from tests.netns.observing import codes, events, start_pings, wait_answers, wait_problem, wait_status
from tests.netns.oracle import actual, own_key, wait_in_order
from tests.netns.registry_history import Stored, stored
from tests.netns.scenes import config, overlay
from tests.netns.test_config_changes import apply, change, wait_well
from tests.netns.test_ctl import flannelctl

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

TTL = 5
"""Seconds, the shortest: less than a write may have to wait."""
BURST = 5
"""Writes beyond the first that are made at once."""


def delete_and_await(host: Host, times: int = BURST) -> Stored:
    """Delete the host's key as soon as it is back, again and again; the last record."""
    key = own_key(host)

    def is_back(before: Stored) -> bool:
        now = stored(host.etcd, key)
        return now is not None and now.created > before.created

    for _ in range(times):
        before = stored(host.etcd, key)
        assert before is not None
        host.etcd.ctl("del", f"{host.prefix}/subnets/{key}")
        wait_for(lambda seen=before: is_back(seen), 5, "the key to be back", bool)  # type: ignore[misc]
    last = stored(host.etcd, key)
    assert last is not None
    return last


def test_a_lease_is_renewed_however_often_it_was_just_written(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    alpha.start_daemon([f"--subnet-lease-ttl={TTL}s"]).wait_ready()
    last = delete_and_await(alpha)

    def left() -> int:
        seconds: int = lab.etcd.ctl_json("lease", "timetolive", f"{last.lease:x}")["ttl"]
        return seconds

    for _ in range(2):
        wait_for(left, TTL, "the lease to grow old", lambda ttl: 0 <= ttl < TTL - 1, interval=0.1)
        wait_for(left, TTL, "the lease to be renewed", lambda ttl: ttl >= TTL - 1, interval=0.1)
    assert stored(lab.etcd, last.key) == last
    status = alpha.daemon.status()
    assert (status["lease"]["state"], status["problems"]) == ("held", [])

    lab.etcd.ctl("del", f"{lab.etcd.prefix}/subnets/{last.key}")
    told = wait_problem(alpha.daemon, "lease-waiting", "a lease is to be claimed, within 10 s")
    assert (told["ready"], told["lease"]["state"]) == (False, "waiting")
    assert told["subnets"] == [last.key.replace("-", "/")], "the data plane stays"
    assert stored(lab.etcd, last.key) is None
    seen = wait_status(alpha.daemon, "the lease", lambda s: s["lease"]["state"] == "held", 12)
    assert (seen["lease"]["key"], seen["problems"]) == (last.key, [])


def test_the_old_lease_stays_while_the_new_one_may_not_be_written_yet(lab: Lab) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    before = delete_and_await(alpha)
    wait_well(alpha)
    pings = start_pings(beta, alpha)
    change(lab, Network="10.6.0.0/16")
    wait_problem(alpha.daemon, "config-pending")
    with pytest.raises(
        CommandFailed, match=r"taken over, but not carried out yet: .* another lease is to take"
    ):
        apply(alpha)
    told = wait_problem(alpha.daemon, "lease-waiting", f"is to take the place of {before.key}, within 10 s")
    assert (told["lease"]["state"], told["networks"]) == ("waiting", ["10.5.0.0/16"])
    assert told["subnets"] == [before.key.replace("-", "/")]
    assert flannelctl(alpha, "plan").out.strip() == "nothing to change"
    assert alpha.subnet_env()["FLANNEL_NETWORK"] == "10.5.0.0/16"
    assert stored(lab.etcd, before.key) == before
    wait_answers(pings)
    assert stored(lab.etcd, before.key) == before
    assert pings.stop().lost == ()

    held = wait_status(alpha.daemon, "the other lease", lambda s: s["lease"]["state"] == "held", 12)
    assert held["networks"] == ["10.6.0.0/16"]
    assert stored(lab.etcd, before.key) is None
    rejected = {line.get("key") for line in events(alpha.daemon, "peer_rejected")}
    assert held["lease"]["key"] not in rejected, "it took its own record for a stranger's"


def test_into_another_network_without_room_the_lease_stays_until_there_is(lab: Lab) -> None:
    """Whether it is applied or found at a start; what the message advises helps."""
    alpha, beta, gamma = overlay(lab, "vxlan", "alpha", "beta", "gamma")
    change(lab, Network="10.6.0.0/16", SubnetMin="10.6.5.0", SubnetMax="10.6.5.0")
    for host in (alpha, beta, gamma):
        wait_problem(host.daemon, "config-pending")
    before, rows = stored(lab.etcd, own_key(alpha)), actual(alpha, "vxlan")
    assert before is not None
    apply(beta)
    pings = start_pings(gamma, alpha)
    with pytest.raises(CommandFailed, match="not applied, the config in force stays: no free subnet"):
        apply(alpha)
    alpha.daemon.kill()
    alpha.start_daemon()
    waiting = wait_problem(alpha.daemon, "lease-waiting", "no free subnet: 10.6.0.0/16 gives 1 subnet")
    assert "widen Network or SubnetMax" in waiting["problems"][0]["fix"]
    wait_answers(pings)
    assert stored(lab.etcd, before.key) == before
    assert {what: how for what, how in actual(alpha, "vxlan").items() if what in rows} == {
        what: how for what, how in rows.items() if what in actual(alpha, "vxlan")
    }
    assert pings.stop().lost == ()

    change(lab, Network="10.6.0.0/16", SubnetMin="10.6.5.0", SubnetMax="10.6.9.0")
    # It still leaves gamma out, and says so.
    wait_status(alpha.daemon, "the new Network", lambda seen: "10.6." in str(seen["subnets"]))
    assert stored(lab.etcd, before.key) is None
    apply(gamma)
    for host in (alpha, beta, gamma):
        wait_in_order(host, "vxlan")


def test_a_registry_of_an_earlier_time_does_not_take_the_host_back_to_its_subnet_of_then(lab: Lab) -> None:
    """As after a restore from a backup: pods have addresses of the lease that is missing there."""
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    now = stored(lab.etcd, own_key(alpha))
    assert now is not None
    assert now.text is not None
    pings = start_pings(beta, alpha)
    then = f"{lab.etcd.prefix}/subnets/10.5.90.0-24"
    lease = lab.etcd.grant(600)
    gone = f"del {lab.etcd.prefix}/subnets/{now.key}"
    lab.etcd.ctl("txn", text=f"\n{gone}\nput --lease={lease} {then} {json.dumps(now.text)}\n\n\n")
    wait_status(alpha.daemon, "the lease", lambda s: s["lease"]["etcd_lease"] == lease)
    assert own_key(alpha) == now.key
    assert set(lab.etcd.leases()) == {now.key, own_key(beta)}
    for host in (alpha, beta):
        wait_in_order(host, "vxlan")
    # Lost may be what was sent while etcd said that this host has another subnet.
    wait_answers(pings)
    pings.stop()


def test_a_config_that_demands_another_lease_is_not_applied_while_etcd_is_away(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    alpha.remove_pods()  # their bridge would be outdated by the move
    key, rows = own_key(alpha), actual(alpha, "vxlan")
    change(lab, Network="10.6.0.0/16")
    wait_problem(alpha.daemon, "config-pending")
    lab.etcd.stop()
    wait_status(alpha.daemon, "the outage", lambda s: s["registry"]["state"] == "unreachable")
    with pytest.raises(
        CommandFailed, match=f"not applied, the config in force stays: .* than {key}, and etcd is unreachable"
    ):
        apply(alpha)
    told = alpha.daemon.status()
    assert sorted(codes(told)) == ["config-pending", "registry-unreachable"]
    assert (told["networks"], told["lease"]["key"]) == (["10.5.0.0/16"], key)
    assert flannelctl(alpha, "plan").out.strip() == "nothing to change"
    assert actual(alpha, "vxlan") == rows
    lab.etcd.start()
    wait_problem(alpha.daemon, "config-pending")
    assert "is in force" in apply(alpha)
    wait_well(alpha, networks=["10.6.0.0/16"])


def test_a_config_applied_when_etcd_hangs_is_told_to_be_awaited_until_it_answers(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    alpha.remove_pods()  # their bridge would be outdated by the move
    key, rows = own_key(alpha), actual(alpha, "vxlan")
    change(lab, Network="10.6.0.0/16")
    wait_problem(alpha.daemon, "config-pending")
    lab.etcd.pause()
    with pytest.raises(
        CommandFailed, match=f"not carried out yet: it does not allow {key}, and etcd has not"
    ):
        apply(alpha)
    told = wait_status(alpha.daemon, "what is awaited", lambda s: "lease-waiting" in codes(s))
    (problem,) = [p for p in told["problems"] if p["code"] == "lease-waiting"]
    assert f"vxlan in 10.6.0.0/16, does not allow {key}" in problem["reason"]
    assert (told["ready"], told["networks"], told["lease"]["key"]) == (False, ["10.5.0.0/16"], key)
    assert flannelctl(alpha, "plan").out.strip() == "nothing to change"
    assert actual(alpha, "vxlan") == rows
    lab.etcd.resume()
    wait_status(alpha.daemon, "it", lambda s: s["networks"] == ["10.6.0.0/16"] and not s["problems"], 20)
