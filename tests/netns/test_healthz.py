"""The health server tells the truth, to whoever asks how, and is in nobody's way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.observing import wait_status
from tests.netns.scenes import config
from tests.netns.test_command_line import CONFIGURATION, run

if TYPE_CHECKING:
    from flanneld_py.lab import Daemon, Host, Lab

PORT = 8471
RUNNING, READY = (200, "flanneld is running"), (200, "flanneld is ready")
CLIENT = """
import http.client, json, sys
host, port, method, path, body = sys.argv[1:]
connection = http.client.HTTPConnection(host, int(port), timeout=5)
connection.request(method, path, body=body or None)
answer = connection.getresponse()
print(json.dumps([answer.status, answer.read().decode()]))
"""
HOLDER = """
import socket, sys, time
held = [socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5) for _ in range(60)]
for connection in held[:30]:
    connection.sendall(b"GET /healthz HTT")
print("held", flush=True)
time.sleep(60)
"""
ENDLESS = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5) as connection:
    connection.sendall(b"POST /healthz HTTP/1.0\\r\\nContent-Length: -1\\r\\n\\r\\n")
    try:
        for sent in range(1000):
            connection.sendall(bytes(1 << 16))
        print("all taken")
    except OSError:
        print("refused")
"""
DRIPPING = """
import socket, sys, time
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5) as connection:
    connection.sendall(b"GET /healthz HTTP/1.0\\r\\nX: ")
    try:
        while True:
            connection.sendall(b"x")
            time.sleep(0.5)
    except OSError:
        print("parted", flush=True)
"""


def ask(host: Host, path: str, method: str = "GET", body: str = "", address: str = "") -> tuple[int, str]:
    """The status code and the body's first line, which is all that flannel has."""
    status, text = ask_all(host, path, method, body, address)
    return status, text.partition("\n")[0]


def ask_all(host: Host, path: str, method: str = "GET", body: str = "", address: str = "") -> tuple[int, str]:
    said = host.run(["python3", "-c", CLIENT, address or host.address, str(PORT), method, path, body])
    status, text = json.loads(said)
    return status, text


def start(host: Host, *args: str) -> Daemon:
    return host.start_daemon([f"--healthz-port={PORT}", *args])


def listening(host: Host) -> list[str]:
    return [line for line in host.run(["ss", "-Hltn"]).splitlines() if f":{PORT}" in line]


@pytest.fixture
def alpha(lab: Lab) -> Host:
    return lab.add_host("alpha")


def test_ready_is_what_the_status_says(lab: Lab, alpha: Host) -> None:
    daemon = start(alpha)
    wait_for(lambda: listening(alpha), 10, "the health server")
    wait_status(daemon, "no config", lambda status: status["problems"])
    assert ask(alpha, "/healthz") == RUNNING
    code, text = ask_all(alpha, "/readyz")
    assert code == 503
    assert text.startswith("flanneld is not ready yet\n")
    assert "\n[-] config: none in force: no network config at " in text
    lab.etcd.put_config(config("vxlan"))
    daemon.wait_ready()
    wait_for(lambda: ask(alpha, "/readyz"), 5, "to be ready", lambda said: said == READY)
    # Unlike flannel's it takes its word back: another host has our subnet.
    ((key, record),) = lab.etcd.leases().items()
    stolen = {**record, "PublicIP": "192.0.2.77", "NodeID": "another"}
    stolen["BackendData"] = {"VNI": 1, "VtepMAC": "0a:00:00:00:00:77"}
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/{key}", json.dumps(stolen))
    wait_status(daemon, "to be unready", lambda status: not status["ready"], timeout=15)
    code, text = ask_all(alpha, "/readyz")
    assert (code, key.rpartition("-")[0] in text) == (503, True), text
    assert "\n[-] lease: conflict: " in text
    assert ask(alpha, "/healthz") == RUNNING
    lab.etcd.ctl("del", f"{lab.etcd.prefix}/subnets/{key}")
    wait_for(lambda: ask(alpha, "/readyz"), 15, "to be ready again", lambda said: said == READY)
    assert daemon.terminate() == 0
    assert not listening(alpha)


def test_paths_and_methods(alpha: Host) -> None:
    start(alpha)
    wait_for(lambda: listening(alpha), 10, "the health server")
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"):
        assert ask(alpha, "/healthz", method, "x" * 5000 if method in ("POST", "PUT") else "") == RUNNING
    assert ask(alpha, "/healthz", "HEAD") == (200, "")
    assert ask(alpha, "/healthz?verbose=1") == RUNNING
    for path in ("/", "/metrics", "/healthz/", "/healthz/x", "/HEALTHZ"):
        assert ask(alpha, path)[0] == 404


def test_it_listens_where_it_was_told_to(alpha: Host) -> None:
    daemon = start(alpha, f"--healthz-ip={alpha.address6}")
    wait_for(lambda: listening(alpha), 10, "the health server")
    assert ask(alpha, "/healthz", address=alpha.address6) == RUNNING
    (line,) = listening(alpha)
    assert f"[{alpha.address6}]:{PORT}" in line
    assert daemon.terminate() == 0
    # From flannel's environment, and off unless it is asked for.
    daemon = alpha.start_daemon(env={"FLANNELD_HEALTHZ_PORT": str(PORT), "FLANNELD_HEALTHZ_IP": "127.0.0.1"})
    wait_for(lambda: listening(alpha), 10, "the health server")
    assert ask(alpha, "/healthz", address="127.0.0.1") == RUNNING
    assert daemon.terminate() == 0
    daemon = start(alpha, "--healthz-port=-1")
    wait_status(daemon, "a status", bool)
    assert not listening(alpha)


def test_clients_that_say_nothing_are_in_nobodys_way(lab: Lab, alpha: Host) -> None:
    lab.etcd.put_config(config("vxlan"))
    daemon = start(alpha)
    daemon.wait_ready()
    log = alpha.directory / "holder.log"
    holder = alpha.spawn("holder", ["python3", "-c", HOLDER, alpha.address, str(PORT)], output=log)
    wait_for(lambda: "held" in log.read_text(), 10, "connections that say nothing")
    assert [ask(alpha, "/readyz") for _ in range(5)] == [READY] * 5
    assert len(list(Path(f"/proc/{daemon.pid}/task").iterdir())) < 60
    assert daemon.terminate() == 0
    holder.kill()


def test_a_body_of_negative_length_is_not_read_to_its_end(lab: Lab, alpha: Host) -> None:
    """It was: a client that never came to an end filled the memory."""
    lab.etcd.put_config(config("vxlan"))
    start(alpha).wait_ready()
    assert alpha.run(["python3", "-c", ENDLESS, alpha.address, str(PORT)]) == "refused\n"


def test_a_client_that_sends_a_byte_now_and_then_is_parted_with(lab: Lab, alpha: Host) -> None:
    """Each byte gave it five seconds more, in which all that it had sent was kept."""
    lab.etcd.put_config(config("vxlan"))
    start(alpha).wait_ready()
    log = alpha.directory / "dripping.log"
    alpha.spawn("dripping", ["python3", "-c", DRIPPING, alpha.address, str(PORT)], output=log)
    wait_for(lambda: "parted" in log.read_text(), 20, "the connection to be closed")
    assert ask(alpha, "/healthz") == RUNNING


def test_an_address_that_cannot_be_listened_on(alpha: Host) -> None:
    ended = run(alpha, *alpha.flags, f"--healthz-port={PORT}", "--healthz-ip=192.0.2.199")
    assert ended.code == CONFIGURATION
    assert ended.line.startswith(
        f"flanneld-py: --healthz-ip 192.0.2.199, --healthz-port {PORT}: cannot listen there: Cannot assign "
    )
    start(alpha)
    wait_for(lambda: listening(alpha), 10, "the health server")
    second = alpha.directory / "second"
    flags = [f"--subnet-file={second}/subnet.env", f"--state-dir={second}", "--etcd-prefix=/other/network"]
    ended = run(alpha, *alpha.flags, *flags, f"--healthz-port={PORT}")
    assert ended.code == CONFIGURATION
    assert ended.line == (
        f"flanneld-py: --healthz-ip 0.0.0.0, --healthz-port {PORT}: cannot listen there: Address already in "
        "use; choose another, or stop what uses it"
    )
