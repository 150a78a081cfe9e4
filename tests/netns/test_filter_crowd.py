"""Hosts with thousands of rules of others, and others who change theirs all the time."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.crowd import TABLE, crowding
from tests.netns.observing import codes, events, wait_problem, wait_status
from tests.netns.packet_filters import TOOLS, filter_config, filtered_overlay, rules_text
from tests.netns.test_filter_repair import BACK_WITHIN

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab


def services(count: int) -> str:
    """What kube-proxy makes of so many services, four rules each, for iptables-restore."""
    lines = ["*nat", *(f":KUBE-SEP-{n} - [0:0]" for n in range(count))]
    for n in range(count):
        ip, comment = f"10.96.{n >> 8}.{n & 255}", f'-m comment --comment "default/svc{n}"'
        lines += (
            f"-A KUBE-SEP-{n} -s {ip}/32 {comment} -j MARK --set-mark 0x4000",
            f"-A KUBE-SEP-{n} -p tcp {comment} -m tcp -j DNAT --to-destination {ip}:80",
            f"-A PREROUTING -d {ip}/32 -p tcp -m tcp --dport 80 -j KUBE-SEP-{n}",
            f"-A OUTPUT -d {ip}/32 -p tcp -m tcp --dport 80 -j KUBE-SEP-{n}",
        )
    return "\n".join([*lines, "COMMIT", ""])


def load(host: Host, tool: str, count: int) -> None:
    command = host.entered([f"{tool}-restore", "--noflush"])
    subprocess.run(command, input=services(count), text=True, check=True)


def test_a_start_and_repairs_while_somebody_changes_his_rules_all_the_time(lab: Lab) -> None:
    lab.etcd.put_config(filter_config("vxlan", "nft"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    load(alpha, "iptables-nft", 2000)
    beta.start_daemon().wait_ready()
    alpha.nft(TABLE)
    with crowding(alpha.entered(["nft", "-i"]), 0.2):
        alpha.start_daemon(["--ip-masq"]).wait_ready()
        wait_status(alpha.daemon, "it to be in sync", lambda seen: seen["state"] == "in sync")
        (route,) = wait_for(lambda: alpha.ip("route", "show", "proto", "96"), 5, "the route to beta")
        alpha.run(["ip", "route", "del", *route["dst"].split()])
        wait_for(lambda: alpha.ip("route", "show", "proto", "96"), BACK_WITHIN, "the route to be back")
        alpha.nft("table ip evil { chain f { type filter hook forward priority 5; policy drop; }; }")
        wait_problem(alpha.daemon, "traffic-dropped", "ip evil f policy drop")
    # Only now, as nft's own listings do not end while somebody changes rules.
    assert "10.5.0.0/16" in alpha.run(["nft", "list", "ruleset"])
    assert events(alpha.daemon, "filter_unreadable") == []


@pytest.mark.parametrize(("tool", "crowd"), [*zip(TOOLS, (5000, 5000, 2500), strict=True)])
def test_rules_are_back_within_a_second_beside_thousands_of_others(lab: Lab, tool: str, crowd: int) -> None:
    """20,000, and 10,000 for iptables-legacy, where half of the second is gone until anybody looks."""
    (alpha,) = filtered_overlay(lab, tool, "alpha")
    load(alpha, "iptables-nft" if tool == "nft" else tool, crowd)
    flush, show = chain_commands(alpha, tool)
    alpha.run(flush)
    wait_for(lambda: "10.5.0.0/16" in alpha.run(show), BACK_WITHIN, "the rules to be back")
    wait_status(alpha.daemon, "the repair to be told", lambda seen: seen["drift"]["repaired"].get("rules"))


def chain_commands(host: Host, tool: str) -> tuple[list[str], list[str]]:
    """What flushes our chain that masquerades, and what shows it: to list all chains would take too long."""
    if tool == "nft":
        names = host.run(["nft", "list", "tables", "ip"]).split()
        chain = ["chain", "ip", next(name for name in names if name.startswith("flannel")), "postrtg"]
        return ["nft", "flush", *chain], ["nft", "list", *chain]
    found = re.search(r"FLANNEL-POSTRTG\S*", rules_text(host, tool))
    assert found
    return [tool, "-t", "nat", "-F", found[0]], [tool, "-t", "nat", "-S", found[0]]


def test_what_is_dropped_for_a_while_is_not_named_for_ever(lab: Lab) -> None:
    """Nobody tells when an element has run out, so a drop by such a set is never certain."""
    alpha, _ = filtered_overlay(lab, "nft", "alpha", "beta")
    alpha.nft(
        "table inet guard { set bad { type ipv4_addr; flags interval, timeout; "
        "elements = { 10.5.0.0/16 timeout 1s }; }; "
        "chain f { type filter hook forward priority 5; ip saddr @bad drop; }; }"
    )
    elements = ["nft", "list", "set", "inet", "guard", "bad"]
    wait_for(lambda: "elements" not in alpha.run(elements), 5, "the element to run out")
    assert codes(alpha.daemon.status()) == []


RAW = "-t raw -A PREROUTING -d {} ! -i docker0 -j DROP"


@pytest.mark.parametrize("tool", TOOLS[1:])
def test_docker_28_drops_for_single_containers_are_named(lab: Lab, tool: str) -> None:
    alpha, _ = filtered_overlay(lab, tool, "alpha", "beta")
    alpha.run([tool, *RAW.format(alpha.pod.address).split()])
    status = wait_problem(alpha.daemon, "container-dropped", f"to {alpha.pod.address} is dropped by")
    assert "raw PREROUTING" in status["problems"][0]["reason"]
    assert "allow-direct-routing" in status["problems"][0]["fix"]
    assert status["ready"], "one container may be cut off on purpose"
    alpha.run([tool, "-t", "raw", "-F"])
    wait_status(alpha.daemon, "no drop", lambda seen: not seen["problems"])
