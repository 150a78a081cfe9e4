"""What a new process of the udp backend is given back may be outdated, damaged or not its own."""

from __future__ import annotations

import os
import socket
from base64 import b64decode
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from flanneld_py.lab.entering import inside
from tests.netns.observing import wait_problem
from tests.netns.oracle import wait_in_order
from tests.netns.scenes import overlay

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

PORT = 8285
SECOND_ADDRESS = "192.0.2.77"


def keep(host: Host, name: str, fd: int) -> None:
    """In the place of what the daemon's keeper has under that name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(os.fspath(host.manager.path))
        sock.send(f"FDSTOREREMOVE=1\nFDNAME={name}".encode())
        socket.send_fds(sock, [f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}".encode()], [fd])


def keep_damaged_table(host: Host) -> None:
    fd = os.memfd_create("damaged")
    os.write(fd, os.urandom(500))
    keep(host, "flannel-table", fd)
    os.close(fd)


def wait_saved(host: Host, wanted: Host) -> None:
    """Until the file that the next process begins with tells of the other host."""
    tunnel = host.state_directory / "tunnel"
    address = socket.inet_aton(wanted.address)
    wait_for(
        lambda: tunnel.exists() and address in b64decode(tunnel.read_text()), 10, "the file to be written"
    )


def answers(one: Host, other: Host) -> bool:
    return all(
        source.pod.ping(target.pod.address, count=1, wait=1).received
        for source, target in ((one, other), (other, one))
    )


@pytest.mark.parametrize(
    ("family", "kind", "address", "port"),
    [
        (socket.AF_INET, socket.SOCK_DGRAM, SECOND_ADDRESS, PORT),
        (socket.AF_INET, socket.SOCK_DGRAM, "", 9000),
        (socket.AF_INET, socket.SOCK_DGRAM, "0.0.0.0", PORT),  # noqa: S104 - it takes the port of all addresses
        (socket.AF_INET6, socket.SOCK_DGRAM, "::1", PORT),
        (socket.AF_INET, socket.SOCK_STREAM, "", PORT),
    ],
    ids=["other-address", "other-port", "any-address", "ipv6", "tcp"],
)
def test_a_kept_socket_that_is_not_the_one_is_not_used(
    lab: Lab, family: int, kind: int, address: str, port: int
) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    alpha.ip("address", "add", f"{SECOND_ADDRESS}/24", "dev", "eth0")
    alpha.daemon.kill()
    with inside(alpha):
        odd = socket.socket(family, kind)
    # The one that was kept is let go by the keeper, and by a pump that ends with its daemon.
    with odd:
        if (address, kind) != ("0.0.0.0", socket.SOCK_DGRAM):  # noqa: S104
            odd.bind((address or alpha.address, port))
            keep(alpha, "flannel-udp", odd.fileno())
        else:
            keep(alpha, "flannel-udp", odd.fileno())
            wait_for(lambda: f":{PORT} " not in alpha.run(["ss", "-uan"]), 10, "nobody to have the port")
            odd.bind((address, port))
    alpha.start_daemon().wait_ready()
    wait_for(lambda: answers(alpha, beta), 10, "answers both ways")
    wait_in_order(alpha, "udp")


def test_killed_between_a_new_socket_and_its_table(lab: Lab) -> None:
    """The address of the host moved; the new socket is kept already, the table tells the old one."""
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    alpha.daemon.kill()
    alpha.ip("address", "delete", f"{alpha.address}/24", "dev", "eth0")
    alpha.ip("address", "add", f"{SECOND_ADDRESS}/24", "dev", "eth0")
    with inside(alpha), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as moved:
        moved.bind((SECOND_ADDRESS, PORT))
        keep(alpha, "flannel-udp", moved.fileno())
    alpha.start_daemon()
    wait_for(lambda: answers(alpha, beta), 15, "answers both ways")


@pytest.mark.parametrize("missing", ["damaged-table", "no-table", "no-socket"])
def test_without_etcd_the_file_serves_where_not_all_was_kept(lab: Lab, missing: str) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    wait_saved(alpha, beta)
    alpha.daemon.kill()
    if missing == "damaged-table":
        keep_damaged_table(alpha)
    else:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(os.fspath(alpha.manager.path))
            name = "flannel-table" if missing == "no-table" else "flannel-udp"
            sock.send(f"FDSTOREREMOVE=1\nFDNAME={name}".encode())
    lab.etcd.stop()
    try:
        alpha.start_daemon()
        wait_for(lambda: answers(alpha, beta), 10, "answers both ways")
        assert not [line for line in alpha.daemon.log_lines() if line["event"] == "apply_failed"]
    finally:
        lab.etcd.start()
    alpha.daemon.wait_ready()
    wait_in_order(alpha, "udp")


def test_a_device_that_another_program_made_meanwhile_is_left_alone(lab: Lab) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    wait_saved(alpha, beta)
    alpha.daemon.kill()
    alpha.drop_descriptors()
    alpha.ip("link", "delete", "flannel0")
    alpha.ip("tuntap", "add", "dev", "flannel0", "mode", "tun")
    alpha.ip("address", "add", "10.77.0.1/24", "dev", "flannel0")
    before = alpha.run(["ip", "-d", "link", "show", "dev", "flannel0"])
    alpha.start_daemon()
    wait_problem(alpha.daemon, "apply-failed", "exists and is not ours")
    assert alpha.run(["ip", "-d", "link", "show", "dev", "flannel0"]) == before
    alpha.ip("tuntap", "delete", "dev", "flannel0", "mode", "tun")
    alpha.daemon.wait_ready()
    wait_for(lambda: answers(alpha, beta), 10, "answers both ways")


def test_a_device_that_was_moved_away_does_not_stay_there(lab: Lab) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    elsewhere = lab.add_host("elsewhere")
    alpha.ip("link", "set", "flannel0", "netns", str(elsewhere.holder_pid))
    wait_for(lambda: answers(alpha, beta), 10, "answers both ways")
    wait_for(
        lambda: elsewhere.run(["ip", "-br", "link", "show", "type", "tun"]).strip(),
        5,
        "no device there",
        lambda x: not x,
    )
    wait_in_order(alpha, "udp")
