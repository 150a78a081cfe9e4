"""Readiness falls when lease, registry, kernel, interface or subnet.env are out of order, and comes back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.observing import events, wait_status
from tests.netns.peers import change_peers, make_peers
from tests.netns.scenes import config
from tests.netns.test_ctl import flannelctl
from tests.netns.test_healthz import READY, RUNNING, ask, ask_all, start

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

TTL = 15
"""Seconds; the registry is missed for a third of it, and then readiness falls."""
LOOPBACK = "127.0.0.1"
NAMES = [
    *("threads", "config", "lease", "registry", "kernel"),
    *("interface", "subnet-file", "forwarding", "packet-filter", "data-plane"),
]


@pytest.fixture
def ready(lab: Lab) -> Host:
    """A host with a daemon that is ready, by /readyz as well."""
    lab.etcd.put_config(config("vxlan"))
    host = lab.add_host("alpha")
    start(host, f"--subnet-lease-ttl={TTL}s").wait_ready()
    wait_ready(host)
    return host


def checks(host: Host) -> dict[str, tuple[str, str]]:
    """Name → `+` or `-`, and what follows."""
    lines = ask_all(host, "/readyz", address=LOOPBACK)[1].splitlines()[1:]
    rows = (line.split(maxsplit=2) for line in lines)
    return {name.rstrip(":"): (sign.strip("[]"), text) for sign, name, text in rows}


def wait_ready(host: Host) -> None:
    wait_for(lambda: ask(host, "/readyz", address=LOOPBACK), 20, "to be ready", lambda said: said == READY)


def wait_failing(host: Host, name: str, part: str) -> None:
    """Until this check and no other fails, /readyz and the status agree, and `flannelctl status` says why."""
    found = wait_for(
        lambda: checks(host),
        20,
        f"check {name} to fail",
        lambda seen: [one for one, (sign, _) in seen.items() if sign == "-"] == [name],
    )
    assert part in found[name][1], found
    status, first = ask(host, "/readyz", address=LOOPBACK)
    assert (status, first) == (503, "flanneld is not ready yet")
    assert ask(host, "/healthz", address=LOOPBACK) == RUNNING
    seen = wait_status(host.daemon, "the same in the status", lambda status: not status["ready"])
    assert [one for one, check in seen["checks"].items() if not check["ok"]] == [name]
    done = flannelctl(host, "status")
    assert done.code == 1
    assert f"  not ready: {name}: " in done.out
    assert name in events(host.daemon, "not_ready")[-1]["reason"]


def test_every_check_is_named_in_the_body(ready: Host) -> None:
    found = checks(ready)
    assert list(found) == NAMES
    assert {sign for sign, _ in found.values()} == {"+"}
    subnet = ready.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0/")
    assert found["lease"][1].startswith(f"held {subnet}, ")
    assert found["lease"][1].endswith(" s left")
    _, body = ask_all(ready, "/healthz")
    assert body == "flanneld is running\n[+] threads: all turn\n"


def test_etcd_away_is_tolerated_for_a_while_and_no_reason_to_be_restarted(lab: Lab, ready: Host) -> None:
    lab.etcd.stop()
    wait_status(ready.daemon, "it to be missed", lambda seen: seen["registry"]["state"] == "unreachable")
    sign, text = checks(ready)["registry"]
    assert (sign, "tolerated for 5 s" in text, "unreachable for " in text) == ("+", True, True)
    wait_failing(ready, "registry", "unreachable for ")
    lab.etcd.start()
    wait_ready(ready)
    wait_status(ready.daemon, "the same in the status", lambda seen: seen["ready"])
    assert events(ready.daemon, "ready_again")


def test_subnet_env_is_missed_and_put_back(ready: Host) -> None:
    text = ready.subnet_file.read_text()
    ready.subnet_file.unlink()
    # Nobody asks: it is found missing by itself.
    wait_for(ready.subnet_file.exists, 5, "subnet.env to be put back")
    assert ready.subnet_file.read_text() == text
    ready.subnet_file.write_text("FLANNEL_NETWORK=10.99.0.0/16\n")
    wait_for(ready.subnet_file.read_text, 5, "subnet.env to be put right", lambda found: found == text)
    ready.subnet_file.unlink()
    ready.subnet_file.mkdir()
    wait_status(ready.daemon, "it to be missed", lambda seen: not seen["checks"]["subnet-file"]["ok"])
    assert checks(ready)["subnet-file"] == (
        "-",
        f"in trouble: {ready.subnet_file} cannot be read: Is a directory",
    )
    ready.subnet_file.rmdir()
    wait_ready(ready)
    assert ready.subnet_file.read_text() == text


def test_a_route_of_a_stranger_in_a_peers_place(lab: Lab, ready: Host) -> None:
    (peer,) = make_peers(lab.etcd, 1)
    ready.run(["ip", "route", "add", peer.subnet, "dev", "eth0"])
    change_peers(lab.etcd, "vxlan", put=[peer])
    wait_failing(ready, "kernel", f"set route {peer.subnet}")
    ready.run(["ip", "route", "del", peer.subnet, "dev", "eth0"])
    wait_ready(ready)


def test_the_interface_is_down(ready: Host) -> None:
    ready.run(["ip", "link", "set", "eth0", "down"])
    wait_for(
        lambda: checks(ready)["interface"][0], 10, "the interface to be missed", lambda sign: sign == "-"
    )
    assert checks(ready)["interface"] == ("-", "in trouble: interface eth0 is down")
    ready.run(["ip", "link", "set", "eth0", "up"])
    wait_ready(ready)


def test_the_lease_is_anothers(lab: Lab, ready: Host) -> None:
    ((key, record),) = lab.etcd.leases().items()
    stolen = {**record, "PublicIP": "192.0.2.77", "NodeID": "another"}
    stolen["BackendData"] = {"VNI": 1, "VtepMAC": "0a:00:00:00:00:77"}
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/{key}", json.dumps(stolen))
    wait_failing(ready, "lease", "conflict: ")
    lab.etcd.ctl("del", f"{lab.etcd.prefix}/subnets/{key}")
    wait_ready(ready)


def test_forwarding_that_is_off_is_named_until_it_is_on_and_left_to_the_operator(ready: Host) -> None:
    """Nothing saw it: status was in sync and ready with containers cut off."""
    ready.run(["sysctl", "-qw", "net.ipv4.ip_forward=0"])
    wait_failing(ready, "forwarding", "net.ipv4.ip_forward is 0")
    (problem,) = ready.daemon.status()["problems"]
    assert problem["code"] == "forwarding-off"
    assert problem["fix"].startswith("sysctl -w net.ipv4.ip_forward=1, ")
    assert ready.run(["cat", "/proc/sys/net/ipv4/ip_forward"]) == "0\n"
    ready.run(["sysctl", "-qw", "net.ipv6.conf.all.forwarding=0", "net.ipv4.ip_forward=1"])
    wait_ready(ready)  # this network has no IPv6
