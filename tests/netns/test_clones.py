"""Two machines with one identity: an image that was cloned with its ids, an address given twice."""

from __future__ import annotations

import json
import shutil
import time
from typing import TYPE_CHECKING, Any

from flanneld_py.lab import wait_for
from tests.netns.observing import events, start_pings, wait_answers, wait_status
from tests.netns.oracle import own_key, wait_in_order
from tests.netns.registry_history import history, nothing_written, revision
from tests.netns.scenes import config, overlay

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab


def store(host: Host, key: str, **fields: Any) -> None:
    """Write a vxlan record as another program would."""
    record = {
        "PublicIP": "192.0.2.99",
        "PublicIPv6": None,
        "BackendType": "vxlan",
        "BackendData": {"VNI": 1, "VtepMAC": "02:00:00:00:00:99"},
        **fields,
    }
    host.etcd.ctl("put", f"{host.etcd.prefix}/subnets/{key}", "--", json.dumps(record))


def test_a_clone_does_not_take_the_lease_of_its_original(lab: Lab) -> None:
    alpha, gamma = overlay(lab, "vxlan", "alpha", "gamma")
    ping, before = start_pings(gamma, alpha), revision(lab.etcd)
    beta = lab.add_host("beta")
    shutil.copytree(alpha.state_directory, beta.state_directory, dirs_exist_ok=True)
    clone = beta.start_daemon([f"--node-id={alpha.node_id}"])

    status = wait_status(clone, "a conflict", lambda s: s["lease"]["state"] == "conflict")
    assert alpha.address in status["lease"]["reason"]
    assert "--node-id" in status["problems"][0]["fix"]
    assert not status["ready"]
    assert not beta.subnet_file.exists()
    wait_answers(ping)
    assert ping.stop().lost == ()
    assert nothing_written(lab.etcd, before)
    assert alpha.daemon.status()["state"] == "in sync"


AS_CLONED = "--node-id="
"""None given: all hosts of a lab share the machine's /etc/machine-id, as clones do."""


def node_ids(lab: Lab) -> set[str]:
    return {record["NodeID"] for record in lab.etcd.leases().values()}


def assert_told_apart(lab: Lab, *hosts: Host) -> None:
    """Each has an id, a subnet and a MAC of its own, in etcd, in status and in the kernel."""
    for host in hosts:
        wait_status(host.daemon, "the lease", lambda s: s["lease"]["state"] == "held" and s["ready"])
    records = lab.etcd.leases()
    assert len(records) == len(hosts) == len(node_ids(lab))
    assert len({record["BackendData"]["VtepMAC"] for record in records.values()}) == len(hosts)
    for host in hosts:
        wait_in_order(host, "vxlan")
        assert host.daemon.status()["node_id"] == records[own_key(host)]["NodeID"]


def test_a_clone_takes_another_id_and_subnet_and_keeps_them(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    alpha.start_daemon([AS_CLONED]).wait_ready()
    original = alpha.etcd.leases()
    # All of it: the state with lease and subnet, and the old subnet.env.
    shutil.copytree(alpha.state_directory, beta.state_directory, dirs_exist_ok=True)
    shutil.copy(alpha.subnet_file, beta.subnet_file)
    beta.start_daemon([AS_CLONED]).wait_ready()
    assert_told_apart(lab, alpha, beta)
    assert {**alpha.etcd.leases(), **original} == alpha.etcd.leases(), "the original has lost nothing"
    (told,) = events(beta.daemon, "node_id_changed")
    assert alpha.address in told["reason"]
    assert told["level"] == "warning"
    assert not events(alpha.daemon, "node_id_changed")

    before = revision(lab.etcd)
    for host in (beta, alpha):
        host.daemon.kill()
        host.start_daemon([AS_CLONED]).wait_ready()
    assert_told_apart(lab, alpha, beta)
    assert nothing_written(lab.etcd, before), "nothing changed, nothing written"


def test_clones_that_run_both_with_the_state_of_one(lab: Lab) -> None:
    """A machine cloned while its daemon is down, and both booted at once, again and again."""
    lab.etcd.put_config(config("vxlan"))
    alpha, beta, gamma = lab.add_hosts("alpha", "beta", "gamma")
    alpha.start_daemon([AS_CLONED]).wait_ready()
    key = own_key(alpha)
    alpha.daemon.kill()
    for clone in (beta, gamma):
        shutil.copytree(alpha.state_directory, clone.state_directory, dirs_exist_ok=True)
    lab.etcd.pause()
    for host in (gamma, beta, alpha):
        host.start_daemon([AS_CLONED])
    time.sleep(0.5)  # all are to wait for etcd when it wakes up
    lab.etcd.resume()
    for host in (alpha, beta, gamma):
        host.daemon.wait_ready()
    assert_told_apart(lab, alpha, beta, gamma)
    assert own_key(alpha) == key, "it is the one at that address"


def test_clones_without_any_state_that_start_together(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    lab.etcd.pause()
    for host in (alpha, beta):
        host.start_daemon([AS_CLONED])
    time.sleep(0.5)
    lab.etcd.resume()
    for host in (alpha, beta):
        host.daemon.wait_ready()
    wait_for(lambda: len(node_ids(lab)), 10, "two node ids", lambda n: n == 2)
    assert_told_apart(lab, alpha, beta)
    for host in (alpha, beta):
        host.attach_pods()
    assert alpha.pod.ping(beta.pod.address).lost == 0


def test_a_node_id_that_cannot_be_kept_is_not_changed(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    alpha.start_daemon([AS_CLONED]).wait_ready()
    before = alpha.etcd.leases()
    (beta.state_directory / "node-id").mkdir(parents=True)
    daemon = beta.start_daemon([AS_CLONED])
    assert daemon.wait_exit() == 78, "what lies there is told at once"
    (beta.state_directory / "node-id").rmdir()
    beta.run(["chattr", "+i", str(beta.state_directory)])
    try:
        beta.start_daemon([AS_CLONED])
        status = wait_status(beta.daemon, "the reason", lambda s: s["lease"]["reason"] is not None)
        assert "the node id cannot be kept" in status["lease"]["reason"]
        assert "--node-id" in status["lease"]["reason"]
        assert alpha.etcd.leases() == before
    finally:
        beta.run(["chattr", "-i", str(beta.state_directory)])
    beta.daemon.wait_ready()
    assert_told_apart(lab, alpha, beta)


def test_one_node_id_given_to_two_that_start_together(lab: Lab) -> None:
    """Either one sees the other's record before it claims, or each gets a lease and a MAC of its own."""
    lab.etcd.put_config(config("vxlan"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    lab.etcd.pause()
    for host in (alpha, beta):
        host.start_daemon(["--node-id=clone"])
    time.sleep(0.5)  # both are to wait for etcd when it wakes up
    lab.etcd.resume()
    states = [
        wait_status(host.daemon, "a decision", lambda s: s["lease"]["state"] in ("held", "conflict"), 15)
        for host in (alpha, beta)
    ]
    conflicts = [status["lease"]["reason"] for status in states if status["lease"]["state"] == "conflict"]
    if conflicts:
        assert len(conflicts) == 1
        assert "node id clone is also used by" in conflicts[0]
        return
    for host in (alpha, beta):
        host.daemon.wait_ready()
        host.attach_pods()
    wait_for(lambda: len({mac_of(host) for host in (alpha, beta)}), 5, "two MACs", lambda n: n == 2)
    for host in (alpha, beta):
        wait_in_order(host, "vxlan")
    assert alpha.pod.ping(beta.pod.address).lost == 0


def mac_of(host: Host) -> str:
    mac: str = host.etcd.leases()[own_key(host)]["BackendData"]["VtepMAC"]
    return mac


def test_a_record_under_our_node_id_from_elsewhere_is_no_obstacle_to_a_restart(lab: Lab) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    key = own_key(alpha)
    store(alpha, "10.5.77.0-24", NodeID=alpha.node_id)
    alpha.daemon.kill()
    alpha.start_daemon().wait_ready()
    assert own_key(alpha) == key
    assert alpha.pod.ping(beta.pod.address).lost == 0


def test_a_lease_cannot_be_taken_by_a_key_for_half_of_everything(lab: Lab) -> None:
    alpha, _ = overlay(lab, "vxlan", "alpha", "beta")
    key = own_key(alpha)
    store(alpha, "0.0.0.0-1")
    store(alpha, "10.5.0.0-17")
    gamma = lab.add_host("gamma")
    gamma.start_daemon().wait_ready()
    alpha.daemon.kill()
    alpha.start_daemon().wait_ready()
    assert own_key(alpha) == key


def test_a_peer_that_takes_on_anothers_mac_gets_none_of_its_traffic(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    store(alpha, "10.5.77.0-24")
    lab.start_daemons()
    ping = start_pings(alpha, beta)
    stolen = {"VNI": 1, "VtepMAC": mac_of(beta)}
    store(alpha, "10.5.77.0-24", BackendData=stolen)
    wait_status(alpha.daemon, "the thief to be left out", lambda s: "10.5.77.0-24" in s["peers"]["bad"])
    wait_answers(ping)
    assert ping.stop().lost == ()


def test_what_is_undone_again_and_again_is_not_written_for_ever(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    key, before = own_key(alpha), revision(lab.etcd)
    for _ in range(30):
        lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/{key}", "garbage")
    ours = len(history(lab.etcd, before + 1)) - 30
    assert 1 <= ours <= 8
    assert alpha.daemon.status()["lease"]["key"] == key


def test_a_host_that_is_given_anothers_address_says_so_and_recovers(lab: Lab) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    before = alpha.etcd.leases()
    beta.daemon.terminate()
    beta.start_daemon([f"--public-ip={alpha.address}"])
    status = wait_status(beta.daemon, "a conflict", lambda s: s["lease"]["state"] == "conflict")
    assert alpha.node_id in status["lease"]["reason"]
    assert alpha.etcd.leases() == before
    assert alpha.pod.ping(beta.pod.address).lost == 0

    alpha.daemon.terminate()
    lab.etcd.ctl("del", f"{lab.etcd.prefix}/subnets/{own_key(alpha)}")
    wait_status(beta.daemon, "the lease", lambda s: s["lease"]["state"] == "held")


def test_a_live_host_with_a_short_ttl_is_not_taken_for_gone(lab: Lab) -> None:
    """How much is left counts against what that lease was granted, not against what we would ask for."""
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    lease = lab.etcd.grant(600)
    text = json.dumps(
        {
            "PublicIP": alpha.address,
            "PublicIPv6": None,
            "BackendType": "vxlan",
            "BackendData": {"VNI": 1, "VtepMAC": "02:00:00:00:00:98"},
            "NodeID": "another-node",
        }
    )
    lab.etcd.ctl("put", f"--lease={lease}", f"{lab.etcd.prefix}/subnets/10.5.77.0-24", "--", text)
    before = revision(lab.etcd)
    alpha.start_daemon()
    status = wait_status(alpha.daemon, "a conflict", lambda s: s["lease"]["state"] == "conflict")
    assert "another-node" in status["lease"]["reason"]
    assert nothing_written(lab.etcd, before)
    lab.etcd.ctl("lease", "revoke", lease)
    alpha.daemon.wait_ready()
