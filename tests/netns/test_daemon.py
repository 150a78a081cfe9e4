"""The daemon's life: what it waits for, when it is ready, what it leaves to others, and how it ends."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import stat
import threading
import time
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import wait_for
from tests.netns.observing import events, start_pings, wait_answers, wait_problem, wait_status
from tests.netns.oracle import differences, own_key, subnet_of, wait_in_order
from tests.netns.scenes import BACKENDS, NETWORK, config, overlay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flanneld_py.lab import Daemon, Host, Lab

STOPPED_WITHIN = 5.0
MTU = {"host-gw": 1500, "udp": 1472, "vxlan": 1450}


@pytest.fixture(autouse=True)
def _no_tracebacks(lab: Lab) -> Iterator[None]:
    yield
    for host in lab.hosts:
        for daemon in host.daemons:
            assert "Traceback" not in daemon.log_text()
            assert not events(daemon, "defect")


def ask(host: Host, op: str) -> Any:
    """What the control socket answers."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(host.control_socket))
        client.sendall(json.dumps({"op": op}).encode() + b"\n")
        with client.makefile() as answer:
            return json.loads(answer.readline())


def assert_status_agrees(daemon: Daemon) -> None:
    """The file, the socket, and the line for the service manager say the same."""
    wait_for(
        lambda: (daemon.status(), ask(daemon.host, "status")["result"]),
        2,
        "status.json to equal what the control socket says",
        lambda both: both[0] == both[1],
    )
    line = daemon.status_texts[-1]
    status = daemon.status()
    assert line.startswith(f"{status['state']}: ")
    if status["problems"]:
        assert status["problems"][0]["reason"] in line


# --- config ---------------------------------------------------------------------------------------


def test_without_config_it_waits_and_names_the_line_that_ends_the_wait(lab: Lab) -> None:
    alpha = lab.add_host("alpha")
    daemon = alpha.start_daemon()
    wait_status(daemon, "etcd to answer", lambda seen: seen["registry"]["state"] == "in sync")
    status = wait_problem(daemon, "config-missing")
    assert (status["state"], status["ready"]) == ("waiting", False)
    (problem,) = status["problems"]
    assert f"{lab.etcd.prefix}/config" in problem["reason"]
    assert "v2 API (etcdctl set)" in problem["reason"]
    assert_status_agrees(daemon)
    assert daemon.ready_after() is None
    assert not alpha.subnet_file.exists()
    (told,) = events(daemon, "config_missing")
    assert told["fix"] == problem["fix"]

    alpha.run(["sh", "-euc", problem["fix"]])
    daemon.wait_ready()
    wait_in_order(alpha, "vxlan")
    wait_status(daemon, "no problem", lambda s: s["state"] == "in sync")
    assert_status_agrees(daemon)


INVALID = {
    "no JSON": ("{Network: 10.5.0.0/16}", "JSON"),
    "no object": ('"10.5.0.0/16"', "expected a JSON object"),
    "no Network": ('{"Backend":{"Type":"vxlan"}}', "Network is missing"),
    "wrong Network": ('{"Network":"10.5.0.0/33"}', '"10.5.0.0/33"'),
    "wrong length": ('{"Network":"10.5.0.0/16","SubnetLen":"24"}', 'SubnetLen "24"'),
    "unknown backend": ('{"Network":"10.5.0.0/16","Backend":{"Type":"quic"}}', "quic"),
    "wrong option": ('{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":"one"}}', "VNI"),
}


def test_an_invalid_config_is_explained_and_a_valid_one_ends_the_wait(lab: Lab) -> None:
    alpha = lab.add_host("alpha")
    daemon = alpha.start_daemon()
    for text, said in INVALID.values():
        lab.etcd.put_config(text)
        status = wait_problem(daemon, "config-invalid", said)
        assert "nothing is set up until it is mended" in status["problems"][0]["reason"]
        assert "\n" not in status["problems"][0]["reason"]
        assert f"{lab.etcd.prefix}/config" in status["problems"][0]["fix"]
        assert (status["state"], status["ready"]) == ("waiting", False)
    assert len(events(daemon, "config_invalid")) == len(INVALID)
    assert_status_agrees(daemon)
    assert lab.etcd.leases() == {}
    lab.etcd.put_config(config("vxlan"))
    daemon.wait_ready()
    wait_in_order(alpha, "vxlan")


def test_a_config_that_cannot_be_applied_leaves_the_old_one_in_force(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    env, daemon = alpha.subnet_file.read_bytes(), alpha.daemon
    for text, code, said in (
        ("{", "config-invalid", "the config in force stays"),
        ('{"Network":"10.6.0.0/16","Backend":{"Type":"vxlan"}}', "config-pending", "Network 10.5.0.0/16"),
        ("", "config-invalid", "the config in force stays"),
    ):
        lab.etcd.put_config(text)
        status = wait_problem(daemon, code, said)
        assert (status["state"], status["ready"], status["networks"]) == ("degraded", True, [NETWORK])
    lab.etcd.ctl("del", f"{lab.etcd.prefix}/config")
    wait_problem(daemon, "config-missing", "the config in force stays")
    assert_status_agrees(daemon)
    assert differences(alpha, "vxlan") == []
    assert alpha.subnet_file.read_bytes() == env
    lab.etcd.put_config(config("vxlan"))
    wait_status(daemon, "no problem", lambda s: s["state"] == "in sync")


# --- readiness ------------------------------------------------------------------------------------


def test_ready_is_told_once_and_only_when_subnet_env_stands(lab: Lab) -> None:
    """Every rename is held back for a while, so that whatever does not wait for it comes first."""
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    delayed = "rename,renameat,renameat2"
    strace = (
        "--string-limit=200",
        f"--trace={delayed},sendto,sendmsg",
        f"--inject={delayed}:delay_enter=200ms",
    )
    daemon = alpha.start_daemon(strace=strace)
    daemon.wait_ready()
    wait_status(daemon, "to be in sync", lambda s: s["state"] == "in sync")
    assert daemon.terminate() == 0
    calls = daemon.trace.read_text().splitlines()
    (written,) = (n for n, call in enumerate(calls) if f'"{alpha.subnet_file}"' in call)
    (told,) = (n for n, call in enumerate(calls) if "READY=1" in call)
    done = next(n for n, call in enumerate(calls) if n >= written and "= 0" in call and "rename" in call)
    assert written <= done < told
    assert [told.fields["READY"] for told in daemon.notifications if "READY" in told.fields] == ["1"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_subnet_env_to_the_letter_and_readable_for_all(lab: Lab, backend: str) -> None:
    lab.etcd.put_config(config(backend))
    alpha = lab.add_host("alpha")
    daemon = alpha.start_daemon(wrapper=["sh", "-c", 'umask 077; exec "$@"', "sh"])
    daemon.wait_ready()
    network = ip_network(subnet_of(own_key(alpha)))
    assert alpha.subnet_file.read_text() == (
        f"FLANNEL_NETWORK={NETWORK}\nFLANNEL_SUBNET={network[1]}/24\n"
        f"FLANNEL_MTU={MTU[backend]}\nFLANNEL_IPMASQ=false\n"
    )
    assert stat.S_IMODE(alpha.subnet_file.stat().st_mode) == 0o644
    status = wait_status(daemon, "to be in sync", lambda s: s["state"] == "in sync")
    assert status["subnets"] == [str(network)]
    assert daemon.status_texts[-1] == f"in sync: {backend} {network}, 0 peers"
    assert (status["backend"], status["mtu"]) == (backend, MTU[backend])
    assert_status_agrees(daemon)


def test_nobody_ever_reads_half_of_subnet_env(lab: Lab) -> None:
    """Each write is held back, so that a file that is written in place would be seen empty for long."""
    lab.etcd.put_config(config("host-gw"))
    alpha = lab.add_host("alpha")
    calls = "write,pwrite64,writev,ftruncate"
    daemon = alpha.start_daemon(strace=(f"--trace={calls}", f"--inject={calls}:delay_enter=20ms"))
    daemon.wait_ready()
    whole, foreign = alpha.subnet_file.read_text(), "FLANNEL_MTU=1\n"
    seen: dict[str, int] = {}
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            text = alpha.subnet_file.read_text()
            seen[text] = seen.get(text, 0) + 1

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(5):
            replace_atomically(alpha.subnet_file, foreign)
            daemon.send_signal(signal.SIGHUP)
            wait_for(alpha.subnet_file.read_text, 5, "the file to be put right", lambda text: text == whole)
    finally:
        done.set()
        reader.join()
    assert seen.keys() == {whole, foreign}
    assert min(seen.values()) > 5, "the reader was fast enough to tell"
    # That of status.json may be on its way just now, more slowly than ever.
    wait_for(
        lambda: [*alpha.run_directory.glob(".*")], 5, "no temporary file to be left", lambda left: not left
    )


def replace_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".foreign")
    temporary.write_text(text)
    temporary.replace(path)


def test_a_subnet_file_that_cannot_be_written_is_named_and_tried_again(lab: Lab) -> None:
    alpha = lab.add_host("alpha")
    blocked = alpha.directory / "blocked"
    path = blocked / "subnet.env"
    daemon = alpha.start_daemon([f"--subnet-file={path}"])
    wait_for(lambda: events(daemon, "config_missing"), 10, "the daemon to wait for a config")
    shutil.rmtree(blocked)
    blocked.write_text("a file, not a directory")
    lab.etcd.put_config(config("vxlan"))
    wait_for(lambda: events(daemon, "apply_failed"), 10, "the failure in the log")
    (told,) = events(daemon, "apply_failed")
    assert str(path) in told["op"] + told["error"]
    assert "Not a directory" in told["error"]
    wait_for(lambda: daemon.status_texts[-1], 2, "the failure in the status", lambda text: str(path) in text)
    assert daemon.ready_after() is None
    assert daemon.running

    blocked.unlink()
    wait_for(daemon.ready_after, 10, "the daemon to be ready")
    assert path.read_text().startswith("FLANNEL_NETWORK=")
    wait_for(lambda: blocked.joinpath("status.json").exists(), 5, "status.json")
    wait_for(lambda: blocked.joinpath("flanneld-py.sock").exists(), 5, "the control socket")
    wait_in_order(alpha, "vxlan")


# --- the end --------------------------------------------------------------------------------------


def refused(lab: Lab) -> Daemon:
    lab.etcd.stop()
    daemon = lab.add_host("alpha").start_daemon()
    wait_status(daemon, "etcd to be missed", lambda s: s["registry"]["state"] == "unreachable")
    return daemon


def paused(lab: Lab) -> Daemon:
    lab.etcd.pause()
    daemon = lab.add_host("alpha").start_daemon()
    wait_for(lambda: events(daemon, "start"), 5, "the start")
    return daemon


def without_config(lab: Lab) -> Daemon:
    daemon = lab.add_host("alpha").start_daemon()
    wait_problem(daemon, "config-missing")
    return daemon


def running(lab: Lab) -> Daemon:
    return overlay(lab, "vxlan", "alpha")[0].daemon


def running_and_paused(lab: Lab) -> Daemon:
    daemon = running(lab)
    lab.etcd.pause()
    return daemon


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_leaves_the_data_plane(lab: Lab, number: signal.Signals) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    leases, rows, env = lab.etcd.leases(), differences(alpha, "vxlan"), alpha.subnet_file.read_bytes()
    ping = start_pings(alpha, beta)
    alpha.daemon.send_signal(number)
    assert alpha.daemon.wait_exit(STOPPED_WITHIN) == 0
    wait_answers(ping)
    assert ping.stop().lost == ()
    assert rows == differences(alpha, "vxlan") == []
    assert (lab.etcd.leases(), alpha.subnet_file.read_bytes()) == (leases, env)
    status = alpha.daemon.status()
    assert (status["state"], status["ready"]) == ("stopped", False)
    assert not alpha.control_socket.exists()


@pytest.mark.parametrize("phase", [refused, paused, without_config, running, running_and_paused])
def test_sigterm_ends_it_soon_whatever_it_waits_for(lab: Lab, phase: Callable[[Lab], Daemon]) -> None:
    daemon = phase(lab)
    begun = time.monotonic()
    assert daemon.terminate(STOPPED_WITHIN) == 0
    assert time.monotonic() - begun < STOPPED_WITHIN
    assert daemon.status()["state"] == "stopped"
    assert [told.fields for told in daemon.notifications][-2:] == [
        {"STOPPING": "1", "STATUS": "stopping; the data plane stays"},
        {"STATUS": "stopped; the data plane stays"},
    ]
    (told,) = events(daemon, "stop")
    assert told["signal"] == "SIGTERM"
    assert events(daemon, "not_ready") == []


# --- logs -----------------------------------------------------------------------------------------


def test_logs_are_json_without_a_terminal(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    daemon = alpha.start_daemon(env={"FLANNELD_V": "1"})
    daemon.wait_ready()
    alpha.ip("link", "set", "flannel.1", "down")
    wait_for(lambda: events(daemon, "kernel_changed"), 5, "an event for debugging")
    lab.etcd.stop()
    wait_status(daemon, "the outage to be noticed", lambda s: s["registry"]["state"] == "unreachable")
    lab.etcd.start()
    wait_status(daemon, "to be in sync", lambda s: s["registry"]["state"] == "in sync")
    assert daemon.terminate() == 0
    lines = [json.loads(line) for line in daemon.log_text().splitlines()]
    assert len(lines) >= 10
    for line in lines:
        assert list(line)[:4] == ["ts", "level", "part", "event"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line["ts"])
    assert {line["level"] for line in lines} == {"debug", "info", "warning"}


def test_logs_are_for_people_on_a_terminal(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    on_a_terminal = ["python3", "-c", "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"]
    daemon = lab.add_host("alpha").start_daemon(wrapper=on_a_terminal)
    daemon.wait_ready()
    assert daemon.terminate() == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", daemon.log_text())
    (line,) = (line for line in text.splitlines() if "lease_claimed" in line)
    assert re.match(r"\d{4}-\d\d-\d\d\S+ \[info +\] lease_claimed +.*key=10\.5\.\d+\.0-24", line), line
    assert "{" not in line
