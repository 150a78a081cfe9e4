"""The udp backend whole: the daemon, its pump in a process of its own, what survives the end of either."""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import Transfer, wait_for
from tests.netns.observing import events, start_pings, wait_answers, wait_problem, wait_status
from tests.netns.oracle import own_key, subnet_of, wait_in_order
from tests.netns.plain_udp_peer import PlainPeer
from tests.netns.scenes import NETWORK, config, overlay
from tests.netns.steady_pings import SteadyPings
from tests.netns.test_ctl import flannelctl

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.lab import Host, Lab

TRANSFER = 20_000_000
"""Bytes."""
MOST_LOST_MS = 50
"""Over a restart with somebody who keeps the descriptors."""


def pump_pid(host: Host) -> int:
    status = wait_status(host.daemon, "a data plane", lambda s: s["data_plane"] and s["data_plane"]["pid"])
    pid: int = status["data_plane"]["pid"]
    return pid


def talk(one: Host, other: Host) -> None:
    assert one.pod.ping(other.pod.address, count=3).lost == 0
    for source, target in ((one, other), (other, one)):
        assert Transfer(source.pod, target.pod, target.pod.address, TRANSFER).finish() == TRANSFER


def has_device(device: str, status: dict[str, Any]) -> bool:
    return bool(status["data_plane"]) and status["data_plane"]["device"] == device


def has_data_plane(wanted: bool, status: dict[str, Any]) -> bool:
    return bool(status["data_plane"]) == wanted


def is_in_force(backend: str, status: dict[str, Any]) -> bool:
    return (status["backend"], status["state"], status["peers"]["count"]) == (backend, "in sync", 1)


# --- the pump -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_pump_that_dies_or_hangs_is_replaced_and_it_is_told(lab: Lab, number: signal.Signals) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    before, restarts = pump_pid(alpha), alpha.daemon.status()["drift"]["ops"]
    os.kill(before, number)
    status = wait_status(
        alpha.daemon,
        "another pump",
        lambda s: s["data_plane"]["pid"] not in (None, before) and s["state"] == "in sync",
        timeout=10,
    )
    assert status["data_plane"]["restarts"] == 1
    assert status["drift"]["ops"] == restarts, "nothing of the kernel's was touched"
    (told,) = events(alpha.daemon, "data_plane_restarted")
    assert str(before) in told["reason"]
    talk(alpha, beta)
    assert not os.path.exists(f"/proc/{before}")  # noqa: PTH110


def test_the_python_pump_is_used_on_demand_and_said(lab: Lab) -> None:
    lab.etcd.put_config(config("udp") | {"Backend": {"Type": "udp", "DataPlane": "python"}})
    alpha, beta = lab.add_hosts("alpha", "beta")
    lab.start_daemons()
    plane = wait_status(alpha.daemon, "a data plane", lambda s: s["data_plane"])["data_plane"]
    assert (plane["runs"], plane["why"]) == ("python", "python was asked for")
    (told,) = events(alpha.daemon, "data_plane")
    assert told["runs"] == "python"
    talk(alpha, beta)


def test_an_option_changes_the_pump_and_no_connection_is_lost(lab: Lab) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    ping = start_pings(alpha, beta)
    lab.etcd.put_config(
        config("udp") | {"Backend": {"Type": "udp", "DataPlane": "python", "SourceCheck": "strict"}}
    )
    for host in (alpha, beta):
        wait_status(
            host.daemon,
            "the other pump",
            lambda s: s["data_plane"]["runs"] == "python" and s["options"]["source_check"] == "strict",
        )
    wait_answers(ping)
    assert ping.stop().lost == ()


# --- restarts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_a_restart_loses_next_to_nothing(lab: Lab, how: str, figure: Callable[[str], None]) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    with SteadyPings(alpha, beta) as out, SteadyPings(beta, alpha) as back:
        getattr(alpha.daemon, how)()
        alpha.start_daemon().wait_ready()
        wait_in_order(alpha, "udp")
        for ping in (out, back):
            ping.wait_more()
            lost, gap = ping.stop()
            figure(
                f"udp: {lost} of {ping.sent} pings lost over a restart ({how}), one a millisecond; "
                f"{gap * 1000:.0f} ms at most until an answer"
            )
            assert lost <= MOST_LOST_MS
    assert alpha.daemon.status()["drift"]["ops"] == {"set": 0, "del": 0}


def test_a_new_process_forwards_before_it_can_say_a_word(lab: Lab, figure: Callable[[str], None]) -> None:
    """Before it has imported what writes its log."""
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    with SteadyPings(beta, alpha) as ping:
        alpha.daemon.kill()
        daemon = alpha.start_daemon()
        ready = daemon.wait_ready()
        ping.wait_more()
    forwards = ping.first_answer(since=daemon.started)
    said = datetime.fromisoformat(daemon.log_lines()[0]["ts"]).timestamp() - time.time() + time.monotonic()
    figure(
        f"udp: forwards {(forwards - daemon.started) * 1000:.0f} ms after it was started, says its first "
        f"word after {(said - daemon.started) * 1000:.0f} ms, is ready after {ready * 1000:.0f} ms"
    )
    assert forwards < said


def test_without_a_keeper_the_gap_is_as_long_as_nobody_forwards(
    lab: Lab, figure: Callable[[str], None]
) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    alpha.daemon.kill()
    alpha.drop_descriptors()
    alpha.start_daemon().wait_ready()
    wait_for((alpha.state_directory / "tunnel").exists, 5, "what the next process begins with")
    download = Transfer(beta.pod, alpha.pod, alpha.pod.address, TRANSFER, seconds=2)
    with SteadyPings(alpha, beta) as ping:
        alpha.daemon.terminate()
        assert alpha.ip("address", "show", "dev", "flannel0")[0]["addr_info"], (
            "the device stays, with its address"
        )
        assert alpha.ip("route", "show", NETWORK), "and its route"
        alpha.start_daemon().wait_ready()
        ping.wait_more()
        lost, gap = ping.stop()
    figure(
        f"udp: {lost} of {ping.sent} pings lost over a restart without a keeper, one a millisecond; "
        f"{gap * 1000:.0f} ms at most until an answer"
    )
    assert lost < 3000
    assert download.finish() == TRANSFER, "TCP sends again what was lost"
    wait_in_order(alpha, "udp")


def test_while_etcd_is_away_a_daemon_that_starts_forwards_as_the_last_one_did(lab: Lab) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    alpha.daemon.kill()
    alpha.drop_descriptors()
    alpha.start_daemon().wait_ready()
    wait_in_order(alpha, "udp")
    tunnel = alpha.state_directory / "tunnel"
    wait_for(tunnel.exists, 5, "what the next process begins with")
    time.sleep(1.5)  # until it is sure to hold the peers as well
    alpha.daemon.kill()
    lab.etcd.stop()
    try:
        alpha.start_daemon()
        wait_for(lambda: alpha.pod.ping(beta.pod.address, count=1).received, 10, "an answer")
    finally:
        lab.etcd.start()
    alpha.daemon.wait_ready()
    wait_in_order(alpha, "udp")


@pytest.mark.parametrize("text", ["", "x", "RlBSMQ==", "RlBSMQAAAAAAAAAAAAAAAAAAAAAAAAAA"])
def test_a_damaged_file_is_as_none(lab: Lab, text: str) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    alpha.daemon.kill()
    alpha.drop_descriptors()
    (alpha.state_directory / "tunnel").write_text(text)
    alpha.start_daemon().wait_ready()
    wait_in_order(alpha, "udp")
    assert alpha.pod.ping(beta.pod.address, count=3).lost == 0


# --- others ---------------------------------------------------------------------------------------


def test_a_port_in_use_is_named_and_waited_for(lab: Lab) -> None:
    lab.etcd.put_config(config("udp"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    program = (
        "import socket,time; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); "
        "s.bind(('',8285)); time.sleep(99)"
    )
    other = alpha.spawn("other", ["python3", "-c", program])
    wait_for(lambda: "8285" in alpha.run(["ss", "-uln"]), 5, "the port to be taken")
    alpha.start_daemon()
    beta.start_daemon().wait_ready()
    wait_problem(alpha.daemon, "apply-failed", "UDP port 8285 of 192.0.2.1 is used by another program")
    assert not alpha.subnet_file.exists()
    alpha.discard(other)
    alpha.daemon.wait_ready()
    wait_in_order(alpha, "udp")


def test_a_flannel_that_runs_is_named_and_left_alone(lab: Lab) -> None:
    lab.etcd.put_config(config("udp"))
    alpha = lab.add_host("alpha")
    alpha.run(["ip", "tuntap", "add", "dev", "flannel0", "mode", "tun"])
    before = alpha.ip("-d", "link", "show", "dev", "flannel0")
    alpha.start_daemon()
    wait_problem(alpha.daemon, "apply-failed", "device flannel0 exists and is not ours")
    assert alpha.ip("-d", "link", "show", "dev", "flannel0") == before
    alpha.ip("link", "delete", "flannel0")
    alpha.daemon.wait_ready()
    wait_in_order(alpha, "udp")


def test_a_foreign_route_to_the_whole_overlay_is_named_with_what_can_be_done(lab: Lab) -> None:
    """No lease is at fault, so it once was wrong to advise the removal of one."""
    lab.etcd.put_config(config("udp"))
    alpha = lab.add_host("alpha")
    alpha.ip("route", "add", NETWORK, "via", "192.0.2.254", "dev", "eth0", "proto", "static")
    before = alpha.ip("route", "show", NETWORK)
    alpha.start_daemon()
    wait_problem(
        alpha.daemon,
        "apply-failed",
        f"a route to {NETWORK} via 192.0.2.254 dev eth0 proto static is not ours; remove it, or choose "
        f"another Network",
    )
    assert alpha.ip("route", "show", NETWORK) == before
    alpha.ip("route", "delete", NETWORK)
    alpha.daemon.wait_ready()
    wait_in_order(alpha, "udp")


def test_two_daemons_on_a_host_have_a_device_each(lab: Lab) -> None:
    machines = lab.add_hosts("alpha", "beta")
    overlays = [[host.beside(name) for host in machines] for name in ("one", "two")]
    for hosts, network, port in zip(overlays, ("10.5.0.0/16", "10.6.0.0/16"), (8285, 8286), strict=True):
        hosts[0].etcd.put_config({"Network": network, "Backend": {"Type": "udp", "Port": port}})
        for host in hosts:
            host.start_daemon()
        for host in hosts:
            host.daemon.wait_ready()
            host.attach_pods()
    for (alpha, beta), device in zip(overlays, ("flannel0", "flannel1"), strict=True):
        for host in (alpha, beta):
            wait_status(host.daemon, "its device", partial(has_device, device))
            wait_status(
                host.daemon, "its peer", lambda s: s["peers"]["count"] == 1 and s["state"] == "in sync"
            )
        assert alpha.pod.ping(beta.pod.address, count=3).lost == 0
    second = overlays[1][0]
    second.daemon.kill()
    assert flannelctl(second, "cleanup").code == 0
    assert {link["ifname"] for link in second.ip("link", "show", "type", "tun")} == {"flannel0"}
    assert overlays[0][0].pod.ping(overlays[0][1].pod.address, count=3).lost == 0


def test_a_plain_peer_as_flannel_is(lab: Lab) -> None:
    """Its record says neither type nor node, its packets come one a datagram, its hop counts twice."""
    lab.etcd.put_config(config("udp"))
    alpha, plain = lab.add_hosts("alpha", "plain")
    alpha.start_daemon().wait_ready()
    alpha.attach_pods()
    record = {"PublicIP": plain.address, "PublicIPv6": None}
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/10.5.{plain.number}.0-24", text=json.dumps(record))
    wait_status(alpha.daemon, "the peer", lambda s: s["peers"]["count"] == 1 and s["state"] == "in sync")
    peer = PlainPeer(plain, {subnet_of(own_key(alpha)): alpha.address})
    try:
        talk(alpha, plain)
        assert peer.wrong == []
        assert peer.longest <= 1472
    finally:
        peer.close()


def test_from_vxlan_to_udp_and_back(lab: Lab) -> None:
    one, other = overlay(lab, "vxlan", "alpha", "beta")
    for backend in ("udp", "vxlan", "udp", "host-gw"):
        lab.etcd.put_config(config(backend))
        for host in (one, other):
            wait_status(
                host.daemon,
                f"{backend} to be in force",
                partial(is_in_force, backend),
                timeout=10,
            )
            wait_in_order(host, backend)
        assert one.pod.ping(other.pod.address, count=3).lost == 0
        tuns = {link["ifname"] for link in one.ip("link", "show", "type", "tun")}
        assert tuns == ({"flannel0"} if backend == "udp" else set())
        plane = wait_status(one.daemon, "the data plane", partial(has_data_plane, backend == "udp"))
        assert plane["checks"]["data-plane"]["ok"]


# --- what it tells --------------------------------------------------------------------------------


def test_metrics_count_packets_and_why_some_are_dropped(lab: Lab) -> None:
    lab.etcd.put_config(config("udp"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    for host in (alpha, beta):
        host.start_daemon(["--metrics-addr=127.0.0.1:9100"])
    for host in (alpha, beta):
        host.daemon.wait_ready()
        host.attach_pods()
    wait_in_order(alpha, "udp")
    assert alpha.pod.ping(beta.pod.address, count=5).lost == 0
    alpha.pod.ping("10.5.250.1", count=1)  # nobody's

    def page() -> dict[str, float]:
        fetch = (
            "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9100/metrics').read().decode())"
        )
        lines = alpha.run(["python3", "-c", fetch]).splitlines()
        pairs = (line.rpartition(" ") for line in lines if line.startswith("flanneld_udp_"))
        return {name: float(value) for name, _, value in pairs}

    found = wait_for(
        page,
        5,
        "what was counted",
        lambda seen: seen.get('flanneld_udp_packets_total{direction="tx"}', 0) >= 5,
    )
    assert found['flanneld_udp_packets_total{direction="rx"}'] >= 5
    assert found['flanneld_udp_bytes_total{direction="tx"}'] >= 5 * 84
    dropped = partial(lambda: page()['flanneld_udp_drops_total{direction="tx",reason="no-route"}'])
    wait_for(dropped, 5, "the drop", lambda n: n >= 1)
    assert found["flanneld_udp_restarts_total"] == 0


def test_the_status_answers_under_a_flood(lab: Lab) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    stranger = lab.add_host("gamma")
    program = (
        "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
        f"s.connect(('{alpha.address}',8285))\n"
        "while True:\n for _ in range(1000):\n  try: s.send(b'E'*64)\n  except OSError: pass\n"
    )
    flood = stranger.spawn("flood", ["python3", "-c", program])
    deadline = time.monotonic() + 3
    slowest = 0.0
    while time.monotonic() < deadline:
        began = time.monotonic()
        said: Any = flannelctl(alpha, "status", "--json")
        slowest = max(slowest, time.monotonic() - began)
        assert said.json["data_plane"]["runs"] == "native"
    stranger.discard(flood)
    assert slowest < 3
    assert alpha.daemon.status()["data_plane"]["restarts"] == 0
    assert alpha.pod.ping(beta.pod.address, count=3).lost == 0
