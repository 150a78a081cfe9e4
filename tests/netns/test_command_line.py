"""The daemon's command line: Go's syntax, variables, and one clear line when a start is pointless."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from flanneld_py.lab.daemon import COMMAND
from tests.netns.observing import events, wait_problem, wait_status
from tests.netns.oracle import wait_in_order
from tests.netns.scenes import config, overlay

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flanneld_py.lab import Host, Lab

USAGE, CONFIGURATION = 2, 78
"""Exit codes: wrong flags; what a restart does not cure."""
ENDS_WITHIN = 10
"""Seconds; a daemon that does not end by itself has started."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a daemon ended that was not meant to start."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """What it said, which must be one line for people."""
        assert self.out == ""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("flanneld-py: ")
        return self.err.strip()


def run(host: Host, *args: str, env: dict[str, str] | None = None, wrapper: Sequence[str] = ()) -> Ended:
    argv = host.entered([*wrapper, *COMMAND, *args])
    done = subprocess.run(
        argv, check=False, capture_output=True, text=True, timeout=ENDS_WITHIN,
        env={"PATH": os.environ["PATH"], **(env or {})},
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def alpha(lab: Lab) -> Host:
    return lab.add_host("alpha")


# --- syntax ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--version", "-version", "--version=true", "-version=1"])
def test_version(alpha: Host, flag: str) -> None:
    """On stderr, as flannel does it, and whatever else is given."""
    ended = run(alpha, "-etcd-endpoints", "nonsense", flag, env={"FLANNELD_ETCD_PREFIX": "/x"})
    assert (ended.code, ended.out) == (0, "")
    assert re.fullmatch(r"flanneld-py \d+\.\d+\.\d+\n", ended.err)


def test_help_names_flags_and_variables(alpha: Host) -> None:
    for flag in ("--help", "-h", "-help"):
        ended = run(alpha, flag)
        assert (ended.code, ended.err) == (0, "")
        for part in ("--etcd-endpoints", "--subnet-file", "FLANNELD_ETCD_ENDPOINTS"):
            assert part in ended.out


def test_flags_in_the_syntax_of_go(lab: Lab, alpha: Host) -> None:
    lab.etcd.put_config(config("vxlan"))
    path = alpha.directory / "elsewhere" / "net.env"
    # The lab's own flags stand before these; of a flag given twice the last one counts.
    daemon = alpha.start_daemon(
        ["--iface=nonsense", "-iface", "eth0", "-subnet-file", str(path), "-v=1", "-version=false"]
    )
    wait_for(daemon.ready_after, 10, "the daemon to be ready")
    assert path.exists()
    assert path.with_name("net.status.json").exists()
    assert path.with_name("net.flanneld-py.sock").exists()
    assert not alpha.subnet_file.exists()
    alpha.ip("link", "set", "flannel.1", "down")
    wait_for(lambda: events(daemon, "kernel_changed"), 5, "an event for debugging")


def test_variables_stand_for_flags_and_flags_win(lab: Lab, alpha: Host) -> None:
    lab.etcd.put_config(config("vxlan"))
    path = alpha.directory / "by-variable.env"
    variables = {
        "FLANNELD_ETCD_ENDPOINTS": lab.etcd.endpoint,
        "FLANNELD_ETCD_PREFIX": lab.etcd.prefix,
        "FLANNELD_SUBNET_FILE": str(path),
        "FLANNELD_STATE_DIR": str(alpha.directory / "state-by-variable"),
        "FLANNELD_NODE_ID": "by-variable",
        "FLANNELD_IFACE": "eth0",
        "FLANNELD_PUBLIC_IP": "198.51.100.7",
    }
    process = alpha.spawn("by-variables", COMMAND, env=variables)
    wait_for(path.exists, 10, f"{path.name} by {process.name}")
    ((_, record),) = lab.etcd.leases().items()
    assert (record["PublicIP"], record["NodeID"]) == ("198.51.100.7", "by-variable")
    assert (alpha.directory / "state-by-variable" / "state.json").exists()
    assert process.terminate() == 0
    path.unlink()

    beta = lab.add_host("beta")
    variables["FLANNELD_IFACE"] = "nonsense"
    variables["FLANNELD_ETCD_ENDPOINTS"] = "http://192.0.2.254:1"
    daemon = beta.start_daemon(["--public-ip="], env=variables)
    daemon.wait_ready()
    assert not path.exists()
    assert daemon.status()["node_id"] == beta.node_id
    assert beta.address in {record["PublicIP"] for record in lab.etcd.leases().values()}


WRONG = {
    "unknown flag": (["--nonsense"], {}, "--nonsense"),
    "unknown flag in Go's syntax": (["-nonsense=1"], {}, "--nonsense"),
    "flag without a value": (["--iface"], {}, "--iface"),
    "wrong URL": (["--etcd-endpoints=ftp://192.0.2.254"], {}, "--etcd-endpoints: 'ftp://192.0.2.254'"),
    "no endpoint": (["-etcd-endpoints", ","], {}, "--etcd-endpoints"),
    "no number": (["-v", "loud"], {}, "loud"),
    "no number in a variable": ([], {"FLANNELD_V": "loud"}, "loud"),
    "no number in a variable of flannel's": ([], {"FLANNELD_HEALTHZ_PORT": "x"}, "FLANNELD_HEALTHZ_PORT 'x'"),
    "no truth": (["--version=perhaps"], {}, "--version 'perhaps': expected true or false"),
    "nearly a flag": (["--etcd-endpoint=x"], {}, "(did you mean --etcd-endpoints?)"),
    "for Kubernetes": (["--kube-subnet-mgr"], {}, "keeps leases in etcd"),
    "a short life": (
        ["--subnet-lease-ttl=1s"],
        {},
        "--subnet-lease-ttl '1s': expected whole seconds, at least 5s",
    ),
    "margin": (
        ["--subnet-lease-renew-margin=1440"],
        {},
        "--subnet-lease-renew-margin '1440': expected minutes",
    ),
    "pattern": (["--iface-regex=("], {}, "--iface-regex '(': expected a regular expression"),
    "no way": (["--iface-can-reach=etcd"], {}, "--iface-can-reach 'etcd': expected an IP address"),
    "no address": (["--public-ip", "alpha"], {}, "--public-ip 'alpha'"),
    "loopback": (["--public-ip", "127.0.0.1"], {}, "--public-ip 127.0.0.1 is a loopback address"),
    "no prefix": (["--etcd-prefix", ""], {}, "--etcd-prefix: ''"),
    "wrong node id": (["--node-id", "a b"], {}, "a b"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(alpha: Host, case: str) -> None:
    args, variables, said = WRONG[case]
    ended = run(alpha, f"--state-dir={alpha.state_directory}", *args, env=variables)
    assert said in ended.line
    assert ended.code == USAGE


def test_flannels_own_command_line_starts(lab: Lab, alpha: Host) -> None:
    """As in a service file of flanneld, with every flag that etcd mode has."""
    lab.etcd.put_config(config("vxlan"))
    args = [
        *("-iface-regex=^none$", "-public-ip", alpha.address, "-subnet-lease-renew-margin=0x1e"),
        *("-ip-masq=true", "-ip-masq-fully-random-disable", "-iptables-resync", "5"),
        *("-iptables-forward-rules=true", "-ip-blackhole-route", "-kube-subnet-mgr=false"),
        *("-kube-api-url=", "-kubeconfig-file", "", "-net-config-path=/etc/kube-flannel/net-conf.json"),
        *("-set-node-network-unavailable=1", "-healthz-ip=0.0.0.0", "-healthz-port", "0"),
        *("-v=0", "-vmodule=main=2", "-log_backtrace_at="),
    ]
    daemon = alpha.start_daemon(args)
    daemon.wait_ready()


def test_words_end_the_flags_and_that_is_said(lab: Lab, alpha: Host) -> None:
    lab.etcd.put_config(config("vxlan"))
    daemon = alpha.start_daemon(["--ip-blackhole-route", "true", "--iface=nonsense"])
    daemon.wait_ready()
    (line,) = events(daemon, "arguments_ignored")
    assert (line["level"], line["arguments"]) == ("warning", 2)
    assert line["reason"] == (
        "'true' is no flag: it and what follows it is ignored, as flannel does; "
        "a boolean's value goes with it: --flag=true"
    )


def test_a_prefix_without_a_slash_is_meant_so_and_that_is_said(lab: Lab, alpha: Host) -> None:
    text = json.dumps(config("vxlan"))
    lab.etcd.ctl("put", "test/without/slash/config", text)
    daemon = alpha.start_daemon(["--etcd-prefix=test/without/slash/"])
    daemon.wait_ready()
    (line,) = events(daemon, "prefix_without_slash")
    assert line["level"] == "warning"
    assert "the config is read from the key 'test/without/slash/config'" in line["reason"]
    assert daemon.terminate() == 0
    lab.etcd.ctl("del", "--prefix", "test/without/")


def test_a_password_is_never_in_the_log(alpha: Host) -> None:
    secret = alpha.directory / "secret"
    secret.write_text("s3cret-of-file\n")
    user = "--etcd-username=u"
    for args in ([user, "--etcd-password=s3cret"], [user, f"--etcd-password-file={secret}"]):
        daemon = alpha.start_daemon([*args, "-v=1"])
        wait_status(daemon, "a status", bool)
        assert daemon.terminate() == 0
        assert "s3cret" not in daemon.log_text()
        assert "s3cret" not in alpha.status_file.read_text()


# --- a host on which a start is pointless ---------------------------------------------------------


def test_missing_interfaces(alpha: Host) -> None:
    flags = [flag for flag in alpha.flags if not flag.startswith("--iface")]
    ended = run(alpha, *flags, "--iface=eth7", "--iface=192.0.2.77")
    assert ended.code == CONFIGURATION
    for part in ("'eth7': there is no such interface", "192.0.2.77", f"eth0 ({alpha.address}"):
        assert part in ended.line


def test_an_address_that_is_not_there_yet_is_waited_for(lab: Lab) -> None:
    """As at boot, before DHCP."""
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    alpha.ip("address", "flush", "dev", "eth0")
    daemon = alpha.start_daemon()
    status = wait_status(
        daemon, "the wait", lambda s: "host-interface" in [p["code"] for p in s.get("problems", [])]
    )
    assert (status["state"], status["ready"]) == ("waiting", False)
    (problem,) = [p for p in status["problems"] if p["code"] == "host-interface"]
    assert "interface eth0 has no usable IPv4 address" in problem["reason"]
    alpha.ip("address", "add", f"{alpha.address}/24", "dev", "eth0")
    daemon.wait_ready()


def test_a_second_daemon_for_the_same_prefix_or_with_the_same_state(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    second = alpha.directory / "second"
    elsewhere = [f"--subnet-file={second}/subnet.env", f"--state-dir={second}"]
    ended = run(alpha, *alpha.flags, *elsewhere)
    assert ended.code == CONFIGURATION
    assert f"another flanneld-py (or a flannelctl cleanup) works on prefix {lab.etcd.prefix}" in ended.line
    ended = run(alpha, *alpha.flags, "--etcd-prefix=/another/network")
    assert ended.code == CONFIGURATION
    assert f"--state-dir {alpha.state_directory} is in use by another flanneld-py" in ended.line
    # Neither has disturbed the first.
    wait_in_order(alpha, "vxlan")
    assert alpha.control_socket.exists()
    wait_status(alpha.daemon, "to be in sync", lambda s: s["state"] == "in sync")
    # In another network namespace, which is another host, the same prefix is nothing special.
    beta = lab.add_host("beta")
    beta.start_daemon().wait_ready()


def test_no_privileges(alpha: Host) -> None:
    wrapper = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    ended = run(alpha, *alpha.flags, wrapper=wrapper)
    assert ended.code == CONFIGURATION
    assert "needs CAP_NET_ADMIN" in ended.line


def test_an_unusable_state_directory(alpha: Host, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    ended = run(alpha, *alpha.flags, f"--state-dir={blocked}/state")
    assert ended.code == CONFIGURATION
    assert f"--state-dir {blocked}/state: Not a directory" in ended.line


def test_wrong_endpoints_are_waited_for_and_named(alpha: Host) -> None:
    """Etcd may come later: this is no reason to end."""
    daemon = alpha.start_daemon(["--etcd-endpoints=http://192.0.2.254:1,http://192.0.2.254:3"])
    status = wait_problem(daemon, "registry-unreachable", "connection refused")
    for endpoint in ("http://192.0.2.254:1", "http://192.0.2.254:3"):
        assert endpoint in status["problems"][0]["reason"]
    assert "--etcd-endpoints" in status["problems"][0]["fix"]
    assert (status["state"], status["ready"]) == ("waiting", False)
    assert daemon.terminate() == 0
    assert len(events(daemon, "registry_unreachable")) == 1
