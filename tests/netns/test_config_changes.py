"""A network config that is changed while daemons run: followed, kept waiting, or refused."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import CommandFailed, wait_for
from tests.netns.observing import codes, events, start_pings, wait_problem, wait_status
from tests.netns.oracle import actual, own_key, wait_in_order
from tests.netns.peers import change_peers, make_peers
from tests.netns.scenes import config, overlay
from tests.netns.test_ctl import flannelctl

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab


def change(lab: Lab, backend: str = "vxlan", options: dict[str, Any] | None = None, **fields: Any) -> None:
    document = config(backend, **fields)
    document["Backend"] |= options or {}
    lab.etcd.put_config(document)


def apply(host: Host) -> str:
    """Flannelctl config apply, with the flags of the host's daemon that flannelctl knows."""
    argv = [
        sys.executable,
        "-m",
        "flanneld_py.cli.ctl.main",
        f"--subnet-file={host.subnet_file}",
        f"--etcd-prefix={host.prefix}",
        "config",
        "apply",
    ]
    return host.run(argv)


def wait_well(host: Host, **told: Any) -> dict[str, Any]:
    """Until the status has these values, and no problem."""
    return wait_status(
        host.daemon,
        f"{told} and no problem",
        lambda seen: not seen["problems"] and all(seen[name] == value for name, value in told.items()),
    )


def talk(one: Host, other: Host) -> None:
    wait_for(lambda: one.pod.ping(other.pod.address, count=1).received, 5, "an answer", bool)


def vxlan_devices(host: Host) -> dict[str, tuple[int, int]]:
    """Name → VNI and port."""
    links = host.ip("-d", "link", "show", "type", "vxlan")
    data = {link["ifname"]: link["linkinfo"]["info_data"] for link in links}
    return {name: (found["id"], found["port"]) for name, found in data.items()}


# --- live -----------------------------------------------------------------------------------------


def test_the_mtu_is_followed_at_once(lab: Lab) -> None:
    one, other = overlay(lab, "vxlan", "alpha", "beta")
    keys = {own_key(one), own_key(other)}
    pings = start_pings(one, other)
    change(lab, options={"MTU": 1400})
    for host in (one, other):
        wait_well(host, mtu=1350)
        assert host.ip("link", "show", "dev", "flannel.1")[0]["mtu"] == 1350
        assert host.subnet_env()["FLANNEL_MTU"] == "1350"
    assert not pings.stop().lost
    assert set(lab.etcd.leases()) == keys


def test_a_range_that_contains_the_lease_is_followed_without_a_write(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    key, before = own_key(host), actual(host, "vxlan")
    revision = lab.etcd.ctl_json("get", f"{lab.etcd.prefix}/subnets/{key}")["kvs"][0]["mod_revision"]
    base = key.partition("-")[0]
    change(lab, SubnetMin=base, SubnetMax=base)
    wait_for(
        lambda: len(events(host.daemon, "config")), 5, "the config to be taken", lambda count: count == 2
    )
    wait_well(host)
    assert lab.etcd.ctl_json("get", f"{lab.etcd.prefix}/subnets/{key}")["kvs"][0]["mod_revision"] == revision
    assert actual(host, "vxlan") == before


@pytest.mark.parametrize(
    "options", [{"VNI": 7}, {"Port": 4789}, {"VNI": 7, "Port": 4789, "GBP": True}], ids=str
)
def test_vni_and_port_are_followed_among_ours(lab: Lab, options: dict[str, Any]) -> None:
    one, other = overlay(lab, "vxlan", "alpha", "beta")
    keys = {own_key(one), own_key(other)}
    change(lab, options=options)
    vni = options.get("VNI", 1)

    for host in (one, other):
        wait_for(
            partial(vxlan_devices, host),
            5,
            "the new device alone",
            lambda devices: devices == {f"flannel.{vni}": (vni, options.get("Port", 8472))},
        )
        wait_well(host)
    talk(one, other)
    assert set(lab.etcd.leases()) == keys


def test_from_vxlan_to_host_gw_and_back(lab: Lab) -> None:
    one, other = overlay(lab, "vxlan", "alpha", "beta")
    keys = {own_key(one), own_key(other)}
    for backend, mtu in (("host-gw", 1500), ("vxlan", 1450)):
        change(lab, backend)
        for host in (one, other):
            wait_well(host, backend=backend, mtu=mtu)
            wait_in_order(host, backend)
        talk(one, other)
    assert set(lab.etcd.leases()) == keys


# --- pending --------------------------------------------------------------------------------------


def test_a_vni_waits_for_the_last_host_of_flannel(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    peers = make_peers(lab.etcd, 1)
    change_peers(lab.etcd, "vxlan", put=peers)
    wait_status(host.daemon, "the peer", lambda seen: seen["peers"]["count"] == 1)
    change(lab, options={"VNI": 7})
    told = wait_problem(host.daemon, "config-pending", "Backend.VNI 1 becomes 7: hosts of flannel")[
        "problems"
    ][0]
    assert peers[0].key in told["reason"]
    assert "flannelctl config apply" in told["fix"]
    wait_in_order(host, "vxlan")
    change_peers(lab.etcd, "vxlan", gone=peers)
    wait_well(host, backend="vxlan")
    wait_in_order(host, "vxlan", vni=7)


def test_another_network_waits_until_it_is_applied(lab: Lab) -> None:
    hosts = one, other = overlay(lab, "vxlan", "alpha", "beta")
    change(lab, Network="10.6.0.0/16")
    before = {host.name: actual(host, "vxlan") for host in hosts}
    for host in hosts:
        wait_problem(host.daemon, "config-pending", "Network 10.5.0.0/16 becomes 10.6.0.0/16")
        assert host.subnet_env()["FLANNEL_NETWORK"] == "10.5.0.0/16"
        assert actual(host, "vxlan") == before[host.name]
    talk(one, other)
    for host in hosts:
        host.remove_pods()
        assert "is in force" in apply(host)
    for host in hosts:
        wait_well(host, networks=["10.6.0.0/16"])
        wait_in_order(host, "vxlan")
        assert host.subnet_env()["FLANNEL_SUBNET"].startswith("10.6.")
        host.attach_pods()
    talk(one, other)
    assert all(key.startswith("10.6.") for key in lab.etcd.leases())


def test_applied_and_killed_in_the_middle_nothing_stays_behind(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    peers = make_peers(lab.etcd, 2)
    change_peers(lab.etcd, "vxlan", put=peers)
    wait_in_order(host, "vxlan")
    change(lab, Network="10.6.0.0/16")
    wait_problem(host.daemon, "config-pending")
    lab.etcd.pause()
    with pytest.raises(CommandFailed, match="is taken over, but not carried out yet"):
        apply(host)
    host.daemon.kill()
    lab.etcd.resume()
    host.start_daemon().wait_ready()
    rows = wait_for(
        lambda: actual(host, "vxlan"),
        5,
        "no row of the old Network",
        lambda seen: not any("10.5." in r for r in seen),
    )
    assert any("10.6." in row for row in rows)


def test_a_subnet_length_is_taken_over_by_a_restart(lab: Lab) -> None:
    (host,) = overlay(lab, "host-gw", "alpha")
    change(lab, "host-gw", SubnetLen=26)
    wait_problem(host.daemon, "config-pending", "SubnetLen 24 becomes 26")
    host.remove_pods()
    host.daemon.terminate()
    host.start_daemon().wait_ready()
    wait_well(host)
    assert host.subnet_env()["FLANNEL_SUBNET"].endswith("/26")


def narrow_to(lab: Lab, host: Host) -> str:
    """Leave room for this host's lease alone; its key."""
    key = own_key(host)
    change(lab, SubnetMin=key.partition("-")[0], SubnetMax=key.partition("-")[0])
    return key


def test_a_config_without_room_for_this_host_is_not_applied(lab: Lab) -> None:
    one, other = overlay(lab, "vxlan", "alpha", "beta")
    leases, pings = lab.etcd.leases(), start_pings(one, other)
    base = own_key(one).partition("-")[0]
    said = flannelctl(one, "config", "set", json.dumps(config("vxlan", SubnetMin=base, SubnetMax=base)))
    assert said.code == 1
    assert "gives 1 subnet of /24" in said.err
    assert "2 hosts hold leases" in said.err
    narrow_to(lab, one)
    wait_problem(other.daemon, "config-pending", "lies outside")
    with pytest.raises(
        CommandFailed, match=r"not applied, the config in force stays: no free subnet: .* 1 lease"
    ):
        apply(other)
    status = other.daemon.status()
    assert (status["ready"], status["lease"]["state"]) == (True, "held")
    assert lab.etcd.leases() == leases
    for host in (one, other):
        wait_in_order(host, "vxlan")
    assert not pings.stop().lost


def test_a_restart_into_a_config_without_room_keeps_the_lease_until_there_is(lab: Lab) -> None:
    one, other = overlay(lab, "vxlan", "alpha", "beta")
    leases, pings = lab.etcd.leases(), start_pings(one, other)
    narrow_to(lab, one)
    wait_problem(other.daemon, "config-pending", "lies outside")
    before = actual(other, "vxlan")
    for _ in range(2):
        other.daemon.kill()
        other.start_daemon()
        status = wait_problem(other.daemon, "lease-waiting", "no free subnet")
        assert not status["ready"]
        assert {status["lease"]["key"], own_key(one)} == set(leases)
    assert lab.etcd.leases() == leases
    assert actual(other, "vxlan") == before
    wait_in_order(one, "vxlan")
    assert not pings.stop().lost

    change(lab, SubnetMin="10.5.240.0", SubnetMax="10.5.250.0")
    moved = wait_status(other.daemon, "another lease", lambda seen: seen["lease"]["state"] == "held")
    assert moved["lease"]["key"].startswith(("10.5.24", "10.5.25"))
    assert set(lab.etcd.leases()) == {own_key(one), moved["lease"]["key"]}


def test_the_bridge_of_an_earlier_subnet_is_named_and_a_config_of_its_network_is_taken(lab: Lab) -> None:
    (host,) = overlay(lab, "host-gw", "alpha")
    (bridge,) = host.gateways()
    change(lab, "host-gw", SubnetMin="10.5.240.0", SubnetMax="10.5.250.0")
    wait_problem(host.daemon, "config-pending")
    assert "is in force" in apply(host)
    (problem,) = wait_problem(host.daemon, "bridge-outdated", f"cni0 has {bridge.ip}")["problems"]
    assert problem["since"]
    assert "restart" in problem["fix"]
    assert events(host.daemon, "bridge_outdated")
    text = json.dumps(config("host-gw"))
    assert flannelctl(host, "config", "set", text).code == 0
    host.remove_pods()
    wait_status(host.daemon, "no bridge", lambda seen: "bridge-outdated" not in codes(seen))


def test_the_bridge_of_an_earlier_network_is_named_also_after_a_restart(lab: Lab) -> None:
    """Only bridges inside the Network in force were, so that status was well with containers cut off."""
    (host,) = overlay(lab, "host-gw", "alpha")
    (bridge,) = host.gateways()
    change(lab, "host-gw", Network="10.7.0.0/16")
    wait_problem(host.daemon, "config-pending")
    assert "is in force" in apply(host)
    part = f"cni0 has {bridge.ip}, of a Network that is not in force any more"
    wait_problem(host.daemon, "bridge-outdated", part)
    for _ in range(2):
        assert host.daemon.terminate() == 0
        host.start_daemon().wait_ready()
        wait_problem(host.daemon, "bridge-outdated", part)
    host.remove_pods()
    wait_status(host.daemon, "no bridge", lambda seen: "bridge-outdated" not in codes(seen))


def test_only_the_daemon_that_is_meant_is_told_to_apply(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    change(lab, Network="10.6.0.0/16")
    wait_problem(host.daemon, "config-pending")
    flags = [f"--subnet-file={host.subnet_file}", "--etcd-prefix=/other"]
    said = flannelctl(host, "config", "apply", flags=flags)
    assert (said.code, said.out) == (1, "")
    assert f"this is the daemon with --etcd-prefix {host.prefix}, not /other" in said.err
    assert host.subnet_env()["FLANNEL_NETWORK"] == "10.5.0.0/16"
    planned = flannelctl(host, "plan", flags=flags)
    assert (planned.code, planned.out.strip()) == (1, "nothing to change")


def test_what_is_set_is_compared_with_what_is_in_force(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    change(lab, Network="10.6.0.0/16")
    wait_problem(host.daemon, "config-pending")

    def set_and_told(options: dict[str, Any], **fields: Any) -> str:
        document = config("vxlan", **fields)
        document["Backend"] |= options
        said = flannelctl(host, "config", "set", json.dumps(document))
        assert said.code == 0, said
        return said.out.strip().partition("; ")[2]

    told = set_and_told({"MTU": 1400}, Network="10.6.0.0/16")
    assert told.startswith("pending on every host that runs, as Network 10.5.0.0/16 becomes 10.6.0.0/16")
    assert set_and_told({}) == "it is in force here already"
    wait_well(host)
    assert set_and_told({"MTU": 1400}) == "daemons take it over at once"
    wait_well(host, mtu=1350)
    host.daemon.terminate()
    told = set_and_told({})
    assert told.startswith("daemons take it over at once (no daemon of this prefix answers here")


def test_nothing_is_applied_when_nothing_waits(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    with pytest.raises(CommandFailed, match="nothing to apply: the stored config is in force"):
        apply(host)
    host.daemon.terminate()
    with pytest.raises(CommandFailed, match="no daemon to ask"):
        apply(host)


# --- refused, and named ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":0}}', "config-invalid"),
        (None, "config-missing"),
    ],
)
def test_the_config_in_force_outlives_a_wrong_one(lab: Lab, text: str | None, code: str) -> None:
    one, other = overlay(lab, "vxlan", "alpha", "beta")
    pings = start_pings(one, other)
    if text is None:
        lab.etcd.ctl("del", f"{lab.etcd.prefix}/config")
    else:
        lab.etcd.put_config(text)
    for host in (one, other):
        wait_problem(host.daemon, code, "the config in force stays")
        wait_in_order(host, "vxlan")
    change(lab)
    for host in (one, other):
        wait_well(host)
    assert not pings.stop().lost


def test_unknown_keys_are_warned_of_once(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    change(lab, options={"Prt": 4789}, SubnetLn=24)
    warned = wait_for(
        lambda: events(host.daemon, "config_unknown_key"), 5, "warnings", lambda seen: len(seen) == 2
    )
    assert {line["reason"] for line in warned} == {
        "unknown key SubnetLn: did you mean SubnetLen?",
        "unknown key Backend.Prt: did you mean Backend.Port?",
    }
    wait_well(host)


def test_the_bridge_of_the_last_run_is_no_strangers_address(lab: Lab) -> None:
    (host,) = overlay(lab, "vxlan", "alpha")
    host.daemon.kill()
    host.start_daemon().wait_ready()
    wait_well(host)
    assert not events(host.daemon, "config_overlaps_host")


def test_a_network_that_contains_the_hosts_own_address_is_named(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan", Network="192.0.0.0/16"))
    host = lab.add_host("alpha")
    host.start_daemon()
    status = wait_status(host.daemon, "the problem", lambda seen: "config-overlaps-host" in codes(seen))
    reason = next(p["reason"] for p in status["problems"] if p["code"] == "config-overlaps-host")
    assert f"contains this host's address {host.address}" in reason
