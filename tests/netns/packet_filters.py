"""Hosts whose rules are written by one tool or another, and whose address is seen by whom."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flanneld_py.lab import wait_for
from tests.netns.oracle import wait_in_order
from tests.netns.scenes import family_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flanneld_py.lab import Host, Lab
    from flanneld_py.lab.netns import Namespace

TOOLS = ("nft", "iptables-nft", "iptables-legacy")
MULTI = {"iptables-nft": "/usr/sbin/xtables-nft-multi", "iptables-legacy": "/usr/sbin/xtables-legacy-multi"}
"""What the names of a variant's commands are links to."""
ECHO = """
import socket
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 7))
    print("ready", flush=True)
    while True:
        _, there = sock.recvfrom(64)
        sock.sendto(there[0].removeprefix("::ffff:").encode(), there)
"""
ASK = """
import socket, sys
kind = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(kind, socket.SOCK_DGRAM) as sock:
    sock.settimeout(float(sys.argv[2]))
    try:
        sock.connect((sys.argv[1], 7))
        sock.send(b"?")
        print(sock.recv(64).decode())
    except OSError:
        pass
"""


def variant(host: Host, tool: str) -> dict[str, str]:
    """Variables with which `iptables` is that variant."""
    if tool == "nft":
        return {}
    directory = host.directory / tool
    directory.mkdir(exist_ok=True)
    for name in ("iptables-restore", "ip6tables-restore"):
        if not (directory / name).exists():
            (directory / name).symlink_to(MULTI[tool])
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def filter_config(backend: str, tool: str, families: str = "ipv4") -> dict[str, Any]:
    return {**family_config(backend, families), "EnableNFTables": tool == "nft"}


def filtered_overlay(
    lab: Lab, tool: str, *names: str, backend: str = "vxlan", families: str = "ipv4", args: Sequence[str] = ()
) -> list[Host]:
    """Hosts in sync, with a pod each, that masquerade by this tool."""
    lab.etcd.put_config(filter_config(backend, tool, families))
    hosts = lab.add_hosts(*names)
    for host in hosts:
        host.start_daemon(["--ip-masq", *args], env=variant(host, tool))
    for host in hosts:
        host.daemon.wait_ready()
        host.attach_pods()
    for host in hosts:
        wait_in_order(host, backend)
    return hosts


@dataclass(frozen=True, slots=True)
class Echo:
    """Answers whoever asks with the address that he asks from, by UDP."""

    there: Namespace

    def __post_init__(self) -> None:
        process = self.there.spawn("echo", [sys.executable, "-IS", "-c", ECHO])
        wait_for(process.output, 5, "the echo server to listen")


def seen_from(source: Namespace, address: object, timeout: float = 2) -> str:
    """As whom `source` is seen at an address where an Echo is; empty: no answer."""
    return source.run([sys.executable, "-IS", "-c", ASK, str(address), str(timeout)]).strip()


def rules_text(host: Host, tool: str) -> str:
    """All rules that this tool shows."""
    commands = {
        "nft": (["nft", "list", "ruleset"],),
        "iptables-nft": (["iptables-nft-save"], ["ip6tables-nft-save"]),
        "iptables-legacy": (["iptables-legacy-save"], ["ip6tables-legacy-save"]),
    }
    return "".join(host.run(command) for command in commands[tool])
