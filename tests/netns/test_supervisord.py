"""A real supervisord with what supervisor/ has for operators: start, crash, restart, stop, mistakes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.etcd_cluster import NUMBERS, Cluster
from tests.netns.etcd_servers import Authority
from tests.netns.observing import start_pings, wait_answers
from tests.netns.oracle import wait_in_order
from tests.netns.scenes import config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flanneld_py.lab import Host, Lab

SHIPPED = Path(__file__).parents[2] / "supervisor"
NAME = "flanneld-py"
MAIN = """\
[unix_http_server]
file={folder}/sock
chmod=0700

[supervisord]
nodaemon=true
logfile={folder}/supervisord.log
pidfile={folder}/supervisord.pid

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[supervisorctl]
serverurl=unix://{folder}/sock

[include]
files = {folder}/flanneld-py.conf
"""
HEALTHZ_PORT = 8471


class Supervisord:
    """On a host, with one program: the daemon."""

    def __init__(self, host: Host, variables: Mapping[str, str], settings: Mapping[str, str]) -> None:
        """`variables`: name → value in `environment`; `settings`: other lines to be different."""
        self.host = host
        self.folder = host.directory / "supervisor"
        self.folder.mkdir()
        self.log_file = self.folder / "daemon.log"
        script = self.folder / "flanneld-py.sh"
        text = (SHIPPED / script.name).read_text()
        script.write_text(
            text.replace("/usr/local/bin/flanneld-py", f"{sys.executable} -m flanneld_py.cli.daemon")
        )
        script.chmod(0o755)
        text = (SHIPPED / "flanneld-py.conf").read_text()
        for name, value in variables.items():
            text = replaced(rf'^    {name}=".*?"(,?)$', rf'    {name}="{value}"\1', text)
        for name, value in {"command": str(script), "stdout_logfile": str(self.log_file), **settings}.items():
            text = replaced(rf"^{name}=.*$", f"{name}={value}", text)
        (self.folder / "flanneld-py.conf").write_text(text)
        self.config = self.folder / "supervisord.conf"
        self.config.write_text(MAIN.format(folder=self.folder))
        argv = [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.config)]
        environ = {
            "FLANNELD_ETCD_PREFIX": host.prefix,
            "FLANNELD_STATE_DIR": str(host.state_directory),
            "FLANNELD_NODE_ID": host.node_id,
        }
        self.process = host.spawn("supervisord", argv, env=environ)

    def ctl(self, *args: str) -> str:
        """What `supervisorctl …` prints; its exit code is that of what it shows."""
        argv = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(self.config), *args]
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout

    def state(self) -> str:
        """Such as RUNNING; empty while it does not answer."""
        found = re.match(rf"{NAME} +([A-Z]+) ", self.ctl("status", NAME))
        return found[1] if found else ""

    def wait_state(self, state: str, seconds: float = 15) -> None:
        wait_for(self.state, seconds, f"{NAME} to be {state}", lambda seen: seen == state, 0.2)

    def pid(self) -> int:
        return int(self.ctl("pid", NAME))

    def log(self) -> str:
        """Its own."""
        return (self.folder / "supervisord.log").read_text()

    def starts(self) -> int:
        return self.log().count(f"spawned: '{NAME}'")

    def end(self) -> None:
        if self.process.running:
            assert self.process.terminate(20) == 0


def replaced(pattern: str, by: str, text: str) -> str:
    text, count = re.subn(pattern, by, text, flags=re.MULTILINE)
    assert count == 1, f"{pattern} stands {count} times in what is shipped"
    return text


def wait_ready(host: Host, *more: str) -> str:
    """As an operator's script waits; what it says."""
    argv = [sys.executable, "-m", "flanneld_py.cli.ctl.main", "--env-file=/dev/null"]
    options = (f"--subnet-file={host.subnet_file}", f"--etcd-prefix={host.prefix}")
    done = subprocess.run([*argv, *options, "wait-ready", *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def secured(fresh_lab: Lab, tmp_path: Path) -> Path:
    """The lab has three members that let in clients with a certificate; a directory as ETCD_CERTS."""
    authority = Authority(tmp_path / "authority")
    members = ",".join(f"IP:192.0.2.{number}" for number in NUMBERS)
    certificate, key = authority.issue("server", members)
    client, client_key = authority.issue("client")
    certs = tmp_path / "certs"
    certs.mkdir()
    for source, name in ((authority.ca, "ca.crt"), (client, "client.crt"), (client_key, "client.key")):
        (certs / name).write_bytes(source.read_bytes())
    fresh_lab.etcd.stop()
    cluster = Cluster(fresh_lab)
    cluster.scheme = "https"
    trusted = (f"--trusted-ca-file={authority.ca}", "--client-cert-auth")
    cluster.server_flags = (f"--cert-file={certificate}", f"--key-file={key}", *trusted)
    cluster.client_flags = (f"--cacert={authority.ca}", f"--cert={client}", f"--key={client_key}")
    fresh_lab.etcd = cluster
    cluster.start()
    cluster.put_config(config("vxlan"))
    return certs


@pytest.fixture
def supervised(fresh_lab: Lab, secured: Path) -> Iterator[Supervisord]:
    """Of host alpha; its program has just been started."""
    host = fresh_lab.add_host("alpha")
    variables = {
        "ETCD_ENDPOINTS": fresh_lab.etcd.endpoint,
        "ETCD_CERTS": str(secured),
        "PUBLIC_IP": host.address,
        "SUBNET_FILE": str(host.subnet_file),
        "HEALTHZ_PORT": str(HEALTHZ_PORT),
    }
    supervisord = Supervisord(host, variables, {"stdout_logfile_maxbytes": "1KB"})
    yield supervisord
    supervisord.end()


def test_from_start_to_stop(fresh_lab: Lab, secured: Path, supervised: Supervisord) -> None:
    alpha, beta = supervised.host, fresh_lab.add_host("beta")
    tls = {"ca": "ca.crt", "cert": "client.crt", "key": "client.key"}
    beta.start_daemon([f"--etcd-{flag}file={secured / name}" for flag, name in tls.items()]).wait_ready()
    assert wait_ready(alpha).startswith("ready: 10.5.")
    for host in (alpha, beta):
        host.attach_pods()
        wait_in_order(host, "vxlan")
    supervised.wait_state("RUNNING")
    ping = start_pings(alpha, beta)
    env, first = alpha.subnet_file.read_text(), supervised.pid()
    assert b"flanneld_py.cli.daemon" in Path(f"/proc/{first}/cmdline").read_bytes(), "it is the script"
    assert http_status(alpha, "readyz") == "200"

    # A crash.
    os.kill(first, signal.SIGKILL)
    second = wait_for(supervised.pid, 10, "a new daemon", lambda pid: pid not in (0, first))
    wait_ready(alpha, "--timeout=20s")
    wait_in_order(alpha, "vxlan")
    wait_answers(ping)
    assert f"exited: {NAME} (terminated by SIGKILL; not expected)" in supervised.log()
    assert alpha.subnet_file.read_text() == env

    # A restart by an operator, and then the end.
    supervised.wait_state("RUNNING")
    assert f"{NAME}: started" in supervised.ctl("restart", NAME)
    assert supervised.pid() not in (first, second)
    wait_ready(alpha, "--timeout=20s")
    assert f"{NAME}: stopped" in supervised.ctl("stop", NAME)
    assert supervised.log().count(f"stopped: {NAME} (exit status 0)") == 2
    assert supervised.state() == "STOPPED"
    assert alpha.subnet_file.read_text() == env
    wait_answers(ping)
    assert ping.stop().lost == ()
    rotated = Path(f"{supervised.log_file}.1")
    assert rotated.exists()
    assert rotated.stat().st_size >= 1024


def http_status(host: Host, path: str) -> str:
    script = (
        f"exec 3<>/dev/tcp/127.0.0.1/{HEALTHZ_PORT}; printf 'GET /{path} HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    )
    return host.run(["bash", "-c", script]).split()[1]


def test_wrong_flags_do_not_go_round_for_ever(lab: Lab) -> None:
    host = lab.add_host("alpha")
    variables = {"ETCD_ENDPOINTS": lab.etcd.endpoint, "HEALTHZ_PORT": "tea", "PUBLIC_IP": host.address}
    supervisord = Supervisord(host, {**variables, "SUBNET_FILE": str(host.subnet_file)}, {})
    supervisord.wait_state("FATAL", 30)
    assert (
        supervisord.log().count(f"exited: {NAME} (exit status 2; not expected)") == supervisord.starts() == 4
    )
    assert f"gave up: {NAME} entered FATAL state, too many start retries too quickly" in supervisord.log()
    said = supervisord.log_file.read_text().splitlines()
    assert len(said) == 4
    assert "--healthz-port" in said[0]
    supervisord.end()


def test_what_a_restart_does_not_cure_is_not_restarted(fresh_lab: Lab, tmp_path: Path) -> None:
    """Also when that shows long after the start: 78 is among the exit codes that are expected."""
    host, etcd = fresh_lab.add_host("alpha"), fresh_lab.etcd
    certs = tmp_path / "certs"
    certs.mkdir()
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    certificate, key = ours.issue("client")
    for source, name in ((theirs.ca, "ca.crt"), (certificate, "client.crt"), (key, "client.key")):
        (certs / name).write_bytes(source.read_bytes())
    server, server_key = ours.issue("server", "IP:192.0.2.254")
    etcd.stop()
    etcd.scheme = "https"
    etcd.server_flags = (f"--cert-file={server}", f"--key-file={server_key}")
    variables = {"ETCD_ENDPOINTS": etcd.endpoint, "ETCD_CERTS": str(certs), "PUBLIC_IP": host.address}
    supervisord = Supervisord(host, {**variables, "SUBNET_FILE": str(host.subnet_file)}, {})
    supervisord.wait_state("RUNNING")

    etcd.start()
    supervisord.wait_state("EXITED", 30)
    assert f"exited: {NAME} (exit status 78; expected)" in supervisord.log()
    assert supervisord.starts() == 1
    assert "TLS verification failed" in supervisord.log_file.read_text().splitlines()[-1]
    supervisord.end()
