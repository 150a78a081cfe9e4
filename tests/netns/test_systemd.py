"""flanneld-py.service under a real systemd: when it is ready, what ends it, who keeps his hands off."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import wait_for
from tests.netns.nspawn import UNIT, debian, machine
from tests.netns.observing import start_pings, wait_answers
from tests.netns.scenes import BACKENDS, config, family_config
from tests.netns.steady_pings import SteadyPings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flanneld_py.lab import Host, Lab
    from tests.netns.nspawn import Machine

PINGS_EVERY = 0.004
"""Seconds: a TUN's queue holds 1000 packets, and a busy machine may take longer than a second to restart."""
MOST_LOST_SECONDS = 0.050
"""Of pings over a restart, where packets wait in what the service manager keeps."""
WATCHDOG = 2
"""Seconds, instead of the unit's 30."""
DROP_IN = f"/etc/systemd/system/{UNIT}.d/test.conf"
SEEN_AT_READY = "/run/subnet.env-at-ready"
DOCKER = """
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/cp /run/flannel/subnet.env /run/subnet.env-for-docker
[Install]
WantedBy=multi-user.target
"""
ETH0 = """
[Match]
Name=eth0
[Network]
LinkLocalAddressing=no
IPv6AcceptRA=no
[Address]
Address={address}/24
Broadcast=no
[Address]
Address={address6}/64
"""
GREEDY = """
[Match]
Name=!lo eth0 pod*
[Link]
MTUBytes=1280
MACAddress=02:00:00:00:00:99
[Network]
Address=10.99.0.1/24
LinkLocalAddressing=no
"""
"""Of somebody who wants all interfaces there are, but for the ports of the bridge."""


@pytest.fixture(scope="session")
def root(session_lab: Lab) -> Path:
    return debian(session_lab.workspace)


@pytest.fixture
def alpha(lab: Lab) -> Host:
    lab.etcd.put_config(config("vxlan"))
    return lab.add_host("alpha")


def pods(alpha: Host, beta: Host) -> None:
    for host in (alpha, beta):
        host.attach_pods()
    wait_for(lambda: beta.pod.ping(alpha.pod.address).received, 10, "the pods to reach each other")


def restarts(booted: Machine) -> int:
    return int(booted.show("NRestarts"))


def status(host: Host) -> dict[str, Any]:
    seen: dict[str, Any] = json.loads(host.status_file.read_text())
    return seen


def test_ready_when_subnet_env_stands_and_not_before(lab: Lab, root: Path, alpha: Host) -> None:
    """It waits for etcd longer than a start may take, and what comes after it waits as long."""
    copy = f"ExecStartPost=+/bin/cp /run/flannel/subnet.env {SEEN_AT_READY}"
    files = {
        DROP_IN: f"[Service]\nTimeoutStartSec=2\n{copy}\n",
        "/etc/systemd/system/docker.service": DOCKER,
    }
    lab.etcd.stop()
    with machine(alpha, root, files=files) as booted:
        booted.run("systemctl", "start", "--no-block", UNIT, "docker.service")
        wait_for(lambda: booted.show("StatusText"), 10, "a status", lambda text: "etcd" in text)
        started = time.monotonic()
        wait_for(time.monotonic, 10, "more than the time for a start", lambda now: now > started + 3)
        assert booted.show("ActiveState") == "activating"
        assert booted.show("ActiveState", "docker.service") == "inactive"
        assert not alpha.subnet_file.exists()
        lab.etcd.start()
        booted.wait_state("active")
        assert booted.path(SEEN_AT_READY).read_text() == alpha.subnet_file.read_text()
        wait_for(lambda: booted.show("ActiveState", "docker.service"), 10, "docker", lambda s: s == "active")
        assert booted.path("/run/subnet.env-for-docker").read_text() == alpha.subnet_file.read_text()
        assert restarts(booted) == 0


@pytest.fixture
def pair(lab: Lab, alpha: Host) -> tuple[Host, Host]:
    beta = lab.add_host("beta")
    beta.start_daemon().wait_ready()
    return alpha, beta


def test_a_stopped_daemon_is_killed_and_comes_back_without_a_lost_ping(
    root: Path, pair: tuple[Host, Host]
) -> None:
    alpha, beta = pair
    with machine(alpha, root, files={DROP_IN: f"[Service]\nWatchdogSec={WATCHDOG}\n"}) as booted:
        booted.start()
        pods(alpha, beta)
        before = alpha.subnet_env(), status(alpha)["pid"]
        ping = start_pings(beta, alpha)
        booted.run("systemctl", "kill", "--signal=STOP", "--kill-whom=main", UNIT)
        wait_for(lambda: restarts(booted), 20, "a restart")
        booted.wait_state("active")
        wait_answers(ping)
        assert ping.stop().lost == ()
        # Where each thread stood, the one that feeds the watchdog last.
        wait_for(booted.journal, 10, "a dump of the threads", lambda text: "in _watch_over" in text)
        assert "Watchdog timeout" in booted.journal()
        assert alpha.subnet_env() == before[0]
        assert status(alpha)["pid"] != before[1]
        assert restarts(booted) == 1, booted.journal()


def test_stop_start_kill_and_reload_lose_no_ping(root: Path, pair: tuple[Host, Host]) -> None:
    alpha, beta = pair
    # As /run/flannel, which is mounted here, so that systemd would not empty it anyway.
    beside = "RuntimeDirectory=beside\nExecStartPost=+/bin/touch /run/beside/file"
    with machine(alpha, root, files={DROP_IN: f"[Service]\n{beside}\n"}) as booted:
        booted.start()
        pods(alpha, beta)
        subnet = alpha.subnet_file.read_text()
        ping = start_pings(beta, alpha)
        booted.run("systemctl", "stop", UNIT)
        assert alpha.subnet_file.read_text() == subnet
        assert booted.path("/run/beside/file").exists()
        assert booted.path("/var/lib/flanneld-py/state.json").exists()
        wait_answers(ping)
        booted.start()
        booted.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", UNIT)
        wait_for(lambda: restarts(booted), 20, "a restart")
        booted.wait_state("active")
        booted.run("systemctl", "reload", UNIT)
        wait_for(booted.journal, 10, "the resync", lambda text: '"resync"' in text)
        booted.wait_state("active")
        wait_answers(ping)
        assert ping.stop().lost == ()
        assert alpha.subnet_file.read_text() == subnet


@pytest.mark.parametrize(
    ("variables", "code"),
    [({"FLANNELD_IFACE": "nosuch"}, "78"), ({"FLANNELD_HEALTHZ_PORT": "nosuch"}, "2")],
    ids=["nosuch interface", "wrong flag"],
)
def test_what_a_restart_does_not_cure_is_not_restarted(
    root: Path, alpha: Host, variables: dict[str, str], code: str
) -> None:
    with machine(alpha, root, variables) as booted:
        booted.run("systemctl", "start", "--no-block", UNIT)
        booted.wait_state("failed")
        assert (booted.show("ExecMainStatus"), restarts(booted)) == (code, 0)
        assert "nosuch" in booted.journal()


@pytest.mark.parametrize("nftables", [True, False], ids=["nftables", "iptables"])
def test_rules_are_written_from_within_the_sandbox(lab: Lab, root: Path, alpha: Host, nftables: bool) -> None:
    lab.etcd.put_config(config("vxlan", EnableNFTables=nftables))
    with machine(alpha, root, {"FLANNELD_IP_MASQ": "true"}) as booted:
        booted.start()
        rules = booted.run("nft", "list", "ruleset")
        assert ("masquerade" in rules, "flannel" in rules.lower()) == (True, True)
        assert ("FLANNEL-POSTRTG" in rules) is not nftables
        assert status(alpha)["problems"] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_networkd_restarts_without_touching_what_is_ours(lab: Lab, root: Path, backend: str) -> None:
    alpha, beta = lab.add_hosts("alpha", "beta")
    lab.etcd.put_config(family_config(backend, "dual-stack"))
    beta.start_daemon().wait_ready()
    files = {
        "/etc/systemd/network/50-eth0.network": ETH0.format(address=alpha.address, address6=alpha.address6),
        "/etc/systemd/network/60-all.network": GREEDY,
    }
    with machine(alpha, root, files=files) as booted:
        booted.start()
        pods(alpha, beta)
        play_udev(booted, alpha)
        before = kernel(alpha)
        eth0 = booted.path(f"/run/systemd/netif/links/{index(alpha, 'eth0')}")
        ping = start_pings(beta, alpha)
        for verb in ("start", "restart", "restart"):
            booted.run("systemctl", verb, "systemd-networkd")
            wait_for(lambda: _text(eth0), 20, "eth0 to be configured", lambda s: "STATE=configured" in s)
            wait_answers(ping)
        assert ping.stop().lost == ()
        assert kernel(alpha) == before
        seen = status(alpha)
        assert (seen["ready"], seen["drift"]["repaired"], seen["problems"]) == (True, {}, [])
        # systemd before 256; what else it does not know is a mistake of ours.
        said = booted.journal("systemd-networkd").replace("Unknown key 'ManageForeignNextHops'", "")
        assert "nknown" not in said


@pytest.mark.parametrize("how", ["restart", "kill --signal=KILL"])
def test_the_service_manager_keeps_what_udp_forwards_with(
    lab: Lab, root: Path, how: str, figure: Callable[[str], None]
) -> None:
    """TUN, socket and table outlive the daemon: packets wait in them until the next one goes on."""
    alpha, beta = lab.add_hosts("alpha", "beta")
    lab.etcd.put_config(config("udp"))
    beta.start_daemon().wait_ready()
    with machine(alpha, root) as booted:
        booted.start()
        pods(alpha, beta)
        told = wait_for(lambda: status(alpha), 5, "the pump in the status", lambda s: s["data_plane"])
        before = told["data_plane"]["pid"]
        with (
            SteadyPings(alpha, beta, PINGS_EVERY) as out,
            SteadyPings(beta, alpha, PINGS_EVERY) as back,
        ):
            booted.run("systemctl", *how.split(), "flanneld-py")
            wait_for(
                lambda: status(alpha),
                20,
                "another pump",
                lambda s: (s["data_plane"] or {}).get("pid") not in (None, before),
            )
            for ping, way in ((out, "out"), (back, "in")):
                ping.wait_more()
                lost, gap = ping.stop()
                figure(
                    f"udp under systemd: {lost} of {ping.sent} pings {way} lost over a {how}, one in "
                    f"{PINGS_EVERY * 1000:.0f} ms; {gap * 1000:.0f} ms at most until an answer"
                )
                assert lost * PINGS_EVERY <= MOST_LOST_SECONDS, f"{gap:.3f} s at most until an answer"
        assert wait_for(lambda: status(alpha), 10, "it to be ready", lambda s: s["ready"])["problems"] == []


def play_udev(booted: Machine, host: Host) -> None:
    """Say that all links are initialised, as udev would, which must not run in a part of a machine.

    Without udev networkd takes a link over before it has read addresses and routes, and removes nothing.
    """
    # By which it tells whether there is udev; what is mounted below stays read-only.
    booted.run("mount", "-o", "remount,bind,rw", "/sys")
    records = booted.path("/run/udev/data")
    records.mkdir(parents=True, exist_ok=True)
    for link in host.ip("link", "show"):
        (records / f"n{link['ifindex']}").write_text("I:1\n")


def index(host: Host, name: str) -> int:
    (link,) = host.ip("link", "show", name)
    return int(link["ifindex"])


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def kernel(host: Host) -> dict[str, Any]:
    """What stands on a host that networkd could touch, without what changes by itself."""
    links = [
        (link["ifname"], link.get("address"), link["mtu"], link.get("master"), link.get("ifalias"))
        for link in host.ip("link", "show")
    ]
    addresses = [
        (link["ifname"], entry["local"], entry["prefixlen"], entry["scope"])
        for link in host.ip("address", "show")
        for entry in link["addr_info"]
        if link["ifname"] != "eth0"
    ]
    return {
        "links": links,
        "addresses": addresses,
        "routes": [host.ip(family, "route", "show", "proto", "96") for family in ("-4", "-6")],
        "nexthops": host.ip("nexthop", "show"),
        "neighbours": [n for n in host.ip("neighbour", "show") if n["state"] == ["PERMANENT"]],
        "fdb": [entry for entry in host.bridge("fdb", "show") if "dst" in entry],
    }


def test_udev_leaves_the_mac_address_alone(root: Path, alpha: Host) -> None:
    with machine(alpha, root) as booted:
        booted.start()
        (device,) = (link for link in alpha.ip("link", "show") if link["ifname"].startswith("flannel"))
        path = f"/sys/class/net/{device['ifname']}"
        said = booted.run("udevadm", "test-builtin", "net_setup_link", path)
        assert "ID_NET_LINK_FILE=/usr/local/lib/systemd/network/10-flanneld-py.link" in said
        assert alpha.ip("link", "show", device["ifname"])[0]["address"] == device["address"]
