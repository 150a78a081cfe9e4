"""What others flush is back within a second; drops of others are found, named, and cured on request."""

from __future__ import annotations

import re
import threading
import time
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.observing import codes, events, wait_problem, wait_status
from tests.netns.packet_filters import (
    TOOLS,
    Echo,
    filter_config,
    filtered_overlay,
    rules_text,
    seen_from,
    variant,
)
from tests.netns.test_ctl import flannelctl

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

BACK_WITHIN = 1.0
FLUSH = {
    "nft": [["nft", "flush", "ruleset"]],
    "iptables-nft": [["iptables-nft", "-F"], ["iptables-nft", "-t", "nat", "-F"]],
    "iptables-legacy": [["iptables-legacy", "-F"], ["iptables-legacy", "-t", "nat", "-F"]],
}
DROP_BY_POLICY = {
    "nft": [
        [
            "sh",
            "-c",
            "nft add chain ip $(nft list tables ip | awk '/flannel/ {print $3}') forward '{ policy drop; }'",
        ]
    ],
    "iptables-nft": [["iptables-nft", "-P", "FORWARD", "DROP"], *FLUSH["iptables-nft"]],
    "iptables-legacy": [["iptables-legacy", "-P", "FORWARD", "DROP"], *FLUSH["iptables-legacy"]],
}


def rules_of_ours(host: Host, tool: str) -> list[str]:
    """Those that speak of the network or of our chains, without counters and numbers."""
    lines = rules_text(host, tool).splitlines()
    return sorted(line.strip() for line in lines if "10.5." in line or ("FLANNEL" in line and line[0] != ":"))


@pytest.mark.parametrize("cause", [FLUSH, DROP_BY_POLICY], ids=["flushed", "policy drop"])
@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_flushed_is_back_within_a_second(
    lab: Lab, tool: str, cause: dict[str, list[list[str]]]
) -> None:
    alpha, beta = filtered_overlay(lab, tool, "alpha", "beta")
    world = lab.add_host("world")
    for there in (world, beta.pod):
        Echo(there)
    before = rules_of_ours(alpha, tool)
    assert before
    for command in cause[tool]:
        alpha.run(command)
    wait_for(lambda: rules_of_ours(alpha, tool) == before, BACK_WITHIN, "the rules to be back")
    assert seen_from(alpha.pod, world.address) == alpha.address
    assert seen_from(alpha.pod, beta.pod.address) == str(alpha.pod.address)
    wait_status(alpha.daemon, "the repair to be told", lambda seen: seen["drift"]["repaired"].get("rules"))
    wait_status(alpha.daemon, "the daemon to be in sync", lambda seen: seen["state"] == "in sync")
    assert events(alpha.daemon, "drift_repaired")


DOCKER = ["-N DOCKER-USER", "-A FORWARD -j DOCKER-USER", "-P FORWARD DROP"]
FOREIGN = {
    **{f"docker by {tool}": [[tool, *words.split()] for words in DOCKER] for tool in TOOLS[1:]},
    "firewalld": [
        ["nft", "add table inet firewalld"],
        ["nft", "add chain inet firewalld filter_FORWARD { type filter hook forward priority filter + 10; }"],
        ["nft", "add rule inet firewalld filter_FORWARD ct state { established, related } accept"],
        ["nft", "add rule inet firewalld filter_FORWARD iifname lo accept"],
        ["nft", "add rule inet firewalld filter_FORWARD reject with icmpx admin-prohibited"],
    ],
}
NAMED = {
    "docker by iptables-nft": ("ip filter FORWARD policy drop", "DOCKER-USER"),
    "docker by iptables-legacy": ("legacy ip filter FORWARD policy drop", "DOCKER-USER"),
    "firewalld": ("inet firewalld filter_FORWARD: reject", "inet firewalld filter_FORWARD"),
}
"""What is said to drop, and the chain that can cure it."""


@pytest.mark.parametrize(
    ("tool", "foreign"),
    [
        (tool, foreign)
        for tool in TOOLS
        for foreign in FOREIGN
        if not foreign.endswith(tool)  # there the rules of the chain that we jump to accept
    ],
)
def test_a_drop_by_somebody_else_is_named_and_cured_on_request(lab: Lab, tool: str, foreign: str) -> None:
    alpha, beta = filtered_overlay(lab, tool, "alpha", "beta")
    Echo(beta.pod)
    place, chain = NAMED[foreign]
    for command in FOREIGN[foreign]:
        alpha.run(command)
    status = wait_problem(alpha.daemon, "traffic-dropped", place)
    assert not status["ready"]
    assert status["state"] == "degraded"
    assert seen_from(alpha.pod, beta.pod.address, 0.5) == ""
    assert any(place in line["reason"] for line in events(alpha.daemon, "traffic_dropped"))
    assert "--forward-accept-in" in status["problems"][0]["fix"]

    assert alpha.daemon.terminate() == 0
    theirs = all_rules(alpha)
    alpha.start_daemon(["--ip-masq", f"--forward-accept-in={chain}"], env=variant(alpha, tool)).wait_ready()
    status = wait_status(alpha.daemon, "no drop", lambda seen: seen["state"] == "in sync")
    assert (status["ready"], codes(status)) == (True, [])
    assert seen_from(alpha.pod, beta.pod.address) == str(alpha.pod.address)
    # What drops again later, while the daemon runs, is found again.
    alpha.nft("table ip evil { chain f { type filter hook forward priority 5; policy drop; }; }")
    wait_problem(alpha.daemon, "traffic-dropped", "ip evil f policy drop")
    alpha.run(["nft", "delete table ip evil"])
    wait_status(alpha.daemon, "no drop", lambda seen: seen["ready"])

    assert alpha.daemon.terminate() == 0
    alpha.start_daemon(["--ip-masq"], env=variant(alpha, tool)).wait_ready()
    wait_problem(alpha.daemon, "traffic-dropped", place)
    assert all_rules(alpha) == theirs


def test_an_accept_in_our_own_chain_is_enough_in_the_same_variant(lab: Lab) -> None:
    """As flannel beside Docker, whose policy is met only at the end of FORWARD."""
    alpha, beta = filtered_overlay(lab, "iptables-nft", "alpha", "beta")
    Echo(beta.pod)
    alpha.run(["iptables-nft", "-P", "FORWARD", "DROP"])
    assert seen_from(alpha.pod, beta.pod.address) == str(alpha.pod.address)
    assert alpha.daemon.status()["problems"] == []


FIREWALL = """
flush ruleset
table inet firewalld {
    chain filter_FORWARD {
        type filter hook forward priority 10; policy accept;
        iifname "lo" accept
    }
    chain nat_POSTROUTING { type nat hook postrouting priority 110; policy accept; }
}
"""


@pytest.mark.parametrize("tool", ["nft", "iptables-nft"])
def test_a_firewall_that_reloads_five_times_a_second(lab: Lab, tool: str) -> None:
    """Each probe is a new connection; most are masqueraded all the same, and soon after all.

    Between a reload and the repair a connection passes without our rules, so a share of them cannot be.
    """
    (alpha,) = filtered_overlay(lab, tool, "alpha")
    world = lab.add_host("world")
    Echo(world)
    stop = threading.Event()

    def reload() -> None:
        while not stop.wait(0.2):
            alpha.nft(FIREWALL)

    loop = threading.Thread(target=reload)
    loop.start()
    try:
        seen: list[bool] = []
        while len(seen) < 60:
            seen.append(seen_from(alpha.pod, world.address, 0.1) == alpha.address)
            time.sleep(0.05)
    finally:
        stop.set()
        loop.join()
    assert sum(seen) > len(seen) / 2
    time.sleep(BACK_WITHIN)
    assert all(seen_from(alpha.pod, world.address) == alpha.address for _ in range(20))


@pytest.mark.parametrize("tool", TOOLS)
def test_cleanup_leaves_the_rules_of_others_as_they_were(lab: Lab, tool: str) -> None:
    (host,) = lab.add_hosts("alpha")
    for command in (command for foreign in FOREIGN.values() for command in foreign):
        host.run(command)
    for each in ("iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"):
        for table, chain in (("filter", "FORWARD"), ("nat", "POSTROUTING")):
            host.run([each, "-t", table, "-A", chain, "-p", "7"])
    before = all_rules(host)
    lab.etcd.put_config(filter_config("vxlan", tool, "dual-stack"))
    accept = [f"--forward-accept-in={chain}" for _, chain in NAMED.values()]
    host.start_daemon(["--ip-masq", *accept], env=variant(host, tool)).wait_ready()
    wait_status(host.daemon, "the daemon to be in sync", lambda seen: seen["state"] == "in sync")
    assert all_rules(host) != before
    assert host.daemon.terminate() == 0
    said = flannelctl(host, "cleanup")
    assert said.code == 0, said
    assert all_rules(host) == before


def all_rules(host: Host) -> list[str]:
    """As each tool shows them, without counters, handles and times."""
    text = "".join(rules_text(host, tool) for tool in TOOLS[1:])
    lines = [line.split(" [")[0] for line in text.splitlines() if not line.startswith("#")]
    nft = re.sub(r"packets \d+ bytes \d+", "", host.run(["nft", "--stateless", "list", "ruleset"]))
    return [*lines, *nft.splitlines()]


@pytest.mark.parametrize("second", ["10.6.0.0/16", "10.5.0.0/16"], ids=["apart", "the same Network"])
@pytest.mark.parametrize("tool", TOOLS)
def test_two_daemons_on_one_host_do_not_fight(lab: Lab, tool: str, second: str) -> None:
    (machine,) = lab.add_hosts("alpha")
    hosts = [machine.beside("one"), machine.beside("two")]
    for host, network in zip(hosts, ("10.5.0.0/16", second), strict=True):
        backend = {"Type": "vxlan", "VNI": 1 if host is hosts[0] else 2}
        host.etcd.put_config(
            {"Network": network, "Backend": backend, "EnableNFTables": tool == "nft"},
        )
        host.start_daemon(["--ip-masq"], env=variant(machine, tool)).wait_ready()
    for host in hosts:
        wait_status(host.daemon, "the daemon to be in sync", lambda seen: seen["state"] == "in sync")
    before = all_rules(machine)
    time.sleep(2)  # several looks of each, of which none may find anything to do
    assert all_rules(machine) == before
    for host in hosts:
        assert host.daemon.status()["drift"]["repaired"] == {}
    assert hosts[0].daemon.terminate() == 0
    assert flannelctl(hosts[0], "cleanup").code == 0
    ours = [line for line in all_rules(machine) if "flannel" in line.lower()]
    assert ours == [line for line in before if line in ours]
    assert any("MASQUERADE" in line or "masquerade" in line for line in ours)
    assert hosts[1].daemon.status()["drift"]["repaired"] == {}
