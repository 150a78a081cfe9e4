"""What an operator is told of the udp data plane: lost traffic, which one runs and why, what a stop does."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import flanneld_py
from flanneld_py.lab import wait_for
from flanneld_py.lab.entering import inside
from tests.netns.observing import codes, events, wait_problem, wait_status
from tests.netns.oracle import wait_in_order
from tests.netns.scenes import config, overlay
from tests.netns.test_ctl import flannelctl
from tests.netns.udp_packets import ipv4

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flanneld_py.lab import Host, Lab

PORT = 8285
SOON = 20
"""Seconds, for what takes some looks a second apart."""


def udp_config(**options: object) -> dict[str, Any]:
    return config("udp") | {"Backend": {"Type": "udp", **options}}


def dropped(host: Host, way: str, reason: str) -> int:
    number: int = (
        flannelctl(host, "status", "--json").json["data_plane"]["traffic"][way]["drops"].get(reason, 0)
    )
    return number


def is_replaced(pid: int, status: dict[str, Any]) -> bool:
    return bool(status["data_plane"]["pid"] != pid)


# --- lost traffic ---------------------------------------------------------------------------------


def test_traffic_that_the_socket_refuses_is_a_problem_with_what_to_do(lab: Lab) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    alpha.run(["iptables", "-I", "OUTPUT", "-p", "udp", "--dport", str(PORT), "-j", "DROP"])
    pings = alpha.pod.start_ping(beta.pod.address, 0.2)
    status = wait_status(alpha.daemon, "the problem", lambda s: "packets-dropped" in codes(s), SOON)
    pings.stop()
    (problem,) = status["problems"]
    assert problem["reason"] == "packets to peers are refused by the socket (send-failed)"
    assert problem["fix"] == (
        "look for a rule in OUTPUT that drops UDP port 8285, and for a route to each peer"
    )
    assert (status["state"], status["ready"]) == ("degraded", True)
    shown = flannelctl(alpha, "status")
    assert shown.code == 1
    assert re.search(r"; dropped: .*tx send-failed \d", shown.out)
    (told,) = events(alpha.daemon, "packets_dropped")
    assert told["reason"] == problem["reason"]


def test_a_sender_whose_address_is_not_the_published_one_is_a_problem_of_the_receiver(lab: Lab) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    beta.ip("address", "add", "192.0.2.77/24", "dev", "eth0")
    rewrite = ["-p", "udp", "--dport", str(PORT), "-j", "SNAT", "--to-source", "192.0.2.77"]
    beta.run(["iptables", "-t", "nat", "-I", "POSTROUTING", *rewrite])
    pings = beta.pod.start_ping(alpha.pod.address, 0.2)
    reason = "packets come from an address that is no peer's (outer-source-unknown)"
    status = wait_status(alpha.daemon, "the problem", lambda s: "packets-dropped" in codes(s), SOON)
    pings.stop()
    assert status["problems"][0]["reason"] == reason
    assert "tcpdump -ni eth0 udp port 8285" in status["problems"][0]["fix"]
    assert status["ready"]


def test_stray_packets_are_no_problem(lab: Lab) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    stranger = lab.add_host("gamma")
    packet = ipv4(beta.pod.address, alpha.pod.address)
    with inside(stranger), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
        for _ in range(50):
            wire.sendto(packet, (alpha.address, PORT))
    wait_for(partial(dropped, alpha, "rx", "outer-source-unknown"), 5, "the drops", lambda n: n == 50)
    assert flannelctl(alpha, "status").code == 0
    assert re.search(r"; dropped: .*rx outer-source-unknown 50", flannelctl(alpha, "status").out)
    assert events(alpha.daemon, "packets_dropped") == []


# --- which one runs -------------------------------------------------------------------------------


def test_status_says_what_forwards(lab: Lab) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    assert alpha.pod.ping(beta.pod.address, count=3).lost == 0
    shown = flannelctl(alpha, "status").out
    assert "data plane native, port 8285, tso uso udp_segment udp_gro, 0 restarts" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("  traffic ")]
    assert " packets to peers, " in line
    pid = alpha.daemon.status()["data_plane"]["pid"]
    assert Path(f"/proc/{pid}/comm").read_text() == "flanneld-pump\n"


def test_python_after_three_crashes_is_said_with_the_reason_for_as_long_as_it_lasts(lab: Lab) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    for _ in range(3):
        before = wait_status(
            alpha.daemon, "a native pump", lambda s: s["data_plane"]["runs"] == "native", SOON
        )["data_plane"]["pid"]
        os.kill(before, signal.SIGSEGV)
        wait_status(alpha.daemon, "its end", partial(is_replaced, before), SOON)
    wait_status(alpha.daemon, "the other one", lambda s: s["data_plane"]["runs"] == "python", SOON)
    status = wait_problem(
        alpha.daemon, "data-plane-python", "native ended 3 times within a minute, last: pid "
    )
    (problem,) = status["problems"]
    assert problem["reason"].endswith(f"pid {before} was killed by signal 11")
    assert problem["fix"] == (
        "report it; native is tried again after an hour, or after a restart of flanneld-py"
    )
    assert (status["state"], status["ready"]) == ("degraded", True)
    told = events(alpha.daemon, "data_plane")[-1]
    assert (told["level"], told["runs"], told["why"]) == ("warning", "python", status["data_plane"]["why"])
    assert all(
        "killed by signal 11" in line["reason"] for line in events(alpha.daemon, "data_plane_restarted")
    )
    assert alpha.pod.ping(beta.pod.address, count=3).lost == 0


@pytest.fixture
def no_extension(tmp_path: Path) -> Sequence[str]:
    """Runs the daemon where the compiled extension is not installed."""
    package = Path(flanneld_py.__file__).parent / "udp"
    shutil.copytree(package, tmp_path / "udp", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    script = f'mount --bind {tmp_path}/udp {package} && exec "$@"'
    return ["unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh"]


@pytest.mark.parametrize("plane", ["auto", "native"])
def test_without_the_extension_it_runs_in_python_and_is_ready(
    lab: Lab, no_extension: Sequence[str], plane: str
) -> None:
    """With native as well, which is then a problem, whatever ran before."""
    lab.etcd.put_config(udp_config(DataPlane=plane))
    alpha, beta = lab.add_hosts("alpha", "beta")
    beta.start_daemon().wait_ready()
    for _ in range(2):
        alpha.start_daemon(wrapper=no_extension).wait_ready()
        wait_in_order(alpha, "udp")
        shown = flannelctl(alpha, "status")
        assert "data plane python (slower): the compiled extension is not installed, port 8285" in shown.out
        assert shown.code == (1 if plane == "native" else 0)
        status = alpha.daemon.status()
        assert status["ready"]
        assert [(p["code"], p["reason"], p["fix"]) for p in status["problems"]] == (
            [
                (
                    "data-plane-python",
                    "packets are forwarded in Python, which is slower: Backend.DataPlane native: the "
                    "compiled extension is not installed",
                    "apt-get install gcc python3-dev, make install, restart flanneld-py; or set "
                    "Backend.DataPlane to auto",
                )
            ]
            if plane == "native"
            else []
        )
        alpha.daemon.kill()


def test_counters_go_on_and_changes_are_logged_when_an_option_changes(lab: Lab) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    assert alpha.pod.ping(beta.pod.address, count=3).lost == 0

    def sent() -> int:
        number: int = flannelctl(alpha, "status", "--json").json["data_plane"]["traffic"]["tx"]["packets"]
        return number

    before = wait_for(sent, 5, "packets", lambda n: n >= 3)
    lab.etcd.put_config(udp_config(DataPlane="python", SourceCheck="strict"))
    wait_status(alpha.daemon, "the other one", lambda s: s["data_plane"]["runs"] == "python", SOON)
    wait_for(sent, 5, "the counters", lambda n: n >= before)
    lab.etcd.put_config(udp_config(DataPlane="python", SourceCheck="strict", Port=8286))
    wait_status(alpha.daemon, "the other port", lambda s: s["data_plane"]["port"] == 8286, SOON)
    said = [(line["runs"], line["port"], line["source_check"]) for line in events(alpha.daemon, "data_plane")]
    assert said[0] == ("native", 8285, "true")
    assert said[-1] == ("python", 8286, "strict")
    assert "why" not in events(alpha.daemon, "data_plane")[0]


# --- the end --------------------------------------------------------------------------------------


def test_a_stopped_host_does_not_claim_to_forward(lab: Lab) -> None:
    alpha, _ = overlay(lab, "udp", "alpha", "beta")
    alpha.daemon.terminate()
    assert "Backend udp: nobody forwards: containers are cut off until it runs again." in (
        flannelctl(alpha, "status").out
    )


def test_of_failures_the_root_is_told_and_the_others_are_counted(lab: Lab) -> None:
    lab.etcd.put_config(config("udp"))
    alpha = lab.add_host("alpha")
    with inside(alpha):
        other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        other.bind((alpha.address, PORT))
    with other:
        alpha.start_daemon()
        status = wait_problem(alpha.daemon, "apply-failed", "UDP port 8285 of 192.0.2.1 is used by another")
        reason = status["problems"][0]["reason"]
        assert reason.startswith("set data plane flannel0 ")
        assert "waits for " not in reason.replace("wait for others", "")
        shown = flannelctl(alpha, "status").out
        assert "waits for data plane" not in shown
        lab.etcd.put_config(udp_config(DataPlane="python"))
        wait_problem(alpha.daemon, "apply-failed", "set data plane flannel0 python ")
        assert {line["error"] for line in events(alpha.daemon, "apply_failed")}.isdisjoint({"not tried yet"})
    alpha.daemon.wait_ready()
