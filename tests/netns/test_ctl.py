"""flannelctl as an operator uses it: with a daemon, without one, with etcd and without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import CommandFailed, wait_for
from flanneld_py.lab.process import environment
from tests.netns.host_state import add_foreign_objects, changes, host_state
from tests.netns.nobody import as_nobody
from tests.netns.oracle import own_key, subnet_of, wait_in_order
from tests.netns.scenes import BACKENDS, NETWORK, config, overlay

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

DAY = 86_400
CONNECTION = ("--etcd-endpoints=", "--etcd-prefix=", "--subnet-file=", "--state-dir=")
READY_LATEST = 10
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Said:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def flannelctl(
    host: Host,
    *args: str,
    flags: Sequence[str] | None = None,
    text: str = "",
    env: dict[str, str] | None = None,
) -> Said:
    """Run it on a host, with that host's flags before the command unless `flags` are given."""
    given = [flag for flag in host.flags if flag.startswith(CONNECTION)] if flags is None else flags
    argv = [sys.executable, "-m", "flanneld_py.cli.ctl.main", *given, *args]
    done = subprocess.run(
        host.entered(argv), check=False, capture_output=True, text=True, input=text, timeout=60,
        env={**environment(host.directory), "FLANNELD_ENV_FILE": os.devnull, **(env or {})},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return Said(done.returncode, done.stdout, done.stderr)


def wait_status(host: Host, text: str) -> Said:
    return wait_for(
        lambda: flannelctl(host, "status"), READY_LATEST, f"{text!r} in the status", lambda s: text in s.out
    )


# --- status ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_status_tells_what_the_daemon_does(lab: Lab, backend: str) -> None:
    alpha, _ = overlay(lab, backend, "alpha", "beta")
    said = flannelctl(alpha, "status")
    assert said.code == 0, said
    subnet = subnet_of(own_key(alpha))
    for expected in (f"{backend} in {NETWORK}", subnet, f"eth0 {alpha.address}, MTU 1500", "in sync"):
        assert expected in said.out
    assert "\x1b" not in said.out, "colours are for terminals"
    told = flannelctl(alpha, "status", "--json").json
    assert told.pop("source") == "daemon"
    assert told["subnets"] == [subnet]
    assert told["peers"] == {"count": 1, "held": 0, "bad": {}, "bad_count": 0}
    assert told["pid"] == alpha.daemon.pid


def test_status_names_a_bad_record_and_escapes_it(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/10.5.99.0-24\x1b[31m", "{}")
    said = wait_status(alpha, "1 record left out")
    assert "10.5.99.0-24\\x1b[31m" in said.out
    assert "\x1b" not in said.out


def test_status_without_config_says_what_to_put(lab: Lab) -> None:
    alpha = lab.add_host("alpha")
    alpha.start_daemon()
    said = wait_status(alpha, "config-missing")
    assert said.code == 1
    assert "not ready" in said.out
    assert f"put {lab.etcd.prefix}/config" in said.out


def test_status_of_a_killed_daemon_is_its_file(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    alpha.daemon.kill()
    said = flannelctl(alpha, "status")
    assert said.code == 1
    assert said.out.startswith(f"No daemon answers on {alpha.control_socket}: Connection refused.")
    assert "What follows is what it wrote 0 s ago" in said.out
    assert "10.5." in said.out
    told = flannelctl(alpha, "status", "--json")
    assert (told.code, told.json["source"], told.json["state"]) == (1, "file", "killed")
    assert not told.json["ready"]
    assert f"the daemon (pid {alpha.daemon.pid}) was killed or crashed" in said.out


def rename_link(host: Host, name: str, other: str) -> None:
    for args in ((name, "down"), (name, "name", other), (other, "up")):
        host.ip("link", "set", *args)


def test_status_of_a_start_that_failed_tells_why(lab: Lab) -> None:
    """And not what the run before it wrote."""
    (alpha,) = overlay(lab, "vxlan", "alpha")
    alpha.daemon.terminate()
    rename_link(alpha, "eth0", "wan0")
    assert alpha.start_daemon().wait_exit() == 78
    rename_link(alpha, "wan0", "eth0")
    said = flannelctl(alpha, "status")
    assert said.code == 1
    assert "stopped, not ready" in said.out
    assert "start-failed" in said.out
    assert "--iface 'eth0': there is no such interface; set --iface to one of: wan0" in said.out
    assert "in sync" not in said.out
    assert "cni0" not in said.out, "the pods' bridge is no way between hosts"
    assert "this host" in flannelctl(alpha, "leases").out
    alpha.start_daemon().wait_ready()
    wait_status(alpha, "in sync, ready")


def test_a_start_beside_a_running_daemon_leaves_its_status_alone(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    running, before = alpha.daemon, alpha.status_file.read_text()
    assert alpha.start_daemon(["--iface=nope"]).wait_exit() == 78
    assert json.loads(alpha.status_file.read_text())["pid"] == running.pid
    assert "start-failed" not in alpha.status_file.read_text(), before
    assert running.terminate() == 0


def test_status_of_a_daemon_whose_files_somebody_removed(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    for path in (alpha.subnet_file, alpha.status_file, alpha.control_socket):
        path.unlink()
    said = flannelctl(alpha, "status")
    if said.code:  # else it was faster in putting them back
        assert f"is held by pid {alpha.daemon.pid} " in said.err + said.out
        assert "no daemon has run here" not in said.err
    alpha.subnet_file.unlink(missing_ok=True)
    assert flannelctl(alpha, "config", "set", json.dumps(config("vxlan"))).code == 0, (
        "its own bridge is no fault"
    )
    wait_for(lambda: flannelctl(alpha, "status").code, 10, "it to be well", lambda code: code == 0)
    assert alpha.subnet_file.exists()


def test_status_where_no_daemon_has_run(lab: Lab) -> None:
    said = flannelctl(lab.add_host("alpha"), "status")
    assert (said.code, said.out) == (1, "")
    assert "no daemon has run here" in said.err


# --- leases ---------------------------------------------------------------------------------------


def test_leases_marks_its_own_and_lists_bad_ones(lab: Lab) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/10.5.99.0-24", '{"PublicIP":"127.0.0.1"}')
    before = lab.etcd.requests()["KV/Range"]
    said = flannelctl(alpha, "leases")
    assert lab.etcd.requests()["KV/Range"] - before == 1, "one request is all it takes"
    assert said.code == 1, "a bad record is a problem"
    rows = said.out.splitlines()
    (own,) = (row for row in rows if "this host" in row)
    node = f"{alpha.node_id[:8]}…"
    assert own.split()[:6] == [subnet_of(own_key(alpha)), alpha.address, "vxlan", node, "this", "host"]
    (other,) = (row for row in rows if beta.address in row)
    assert "flanneld-py" in other
    (bad,) = (row for row in rows if "bad: " in row)
    assert bad.startswith("10.5.99.0/24")
    assert "127.0.0.1 is a loopback address" in bad


def test_leases_with_time_left(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    record = json.dumps({"PublicIP": "192.0.2.77", "BackendType": "host-gw"})
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/10.5.99.0-24", record)
    said = flannelctl(alpha, "leases", "--json")
    assert said.code == 1, "the other one is of another backend"
    left = {row["key"]: row["ttl"] for row in said.json["leases"]}
    assert DAY - 60 <= left.pop(own_key(alpha)) <= DAY
    assert left == {"10.5.99.0-24": None}
    assert [row["own"] for row in said.json["leases"]].count(True) == 1
    assert all("ttl" not in row for row in flannelctl(alpha, "leases", "--no-ttl", "--json").json["leases"])
    text = flannelctl(alpha, "leases").out
    assert "for ever" in text
    assert "23 h 59 min" in text


def test_leases_without_etcd(lab: Lab) -> None:
    alpha = lab.add_host("alpha")
    said = flannelctl(alpha, "leases", "--etcd-endpoints", "http://192.0.2.254:1")
    assert (said.code, said.out) == (75, "")
    assert said.err.count("\n") == 1
    assert "http://192.0.2.254:1" in said.err


# --- settings -------------------------------------------------------------------------------------


def test_settings_from_variables_and_file(lab: Lab) -> None:
    alpha = lab.add_host("alpha")
    lab.etcd.put_config(config("vxlan"))
    variables = {"FLANNELD_ETCD_ENDPOINTS": lab.etcd.endpoint, "FLANNELD_ETCD_PREFIX": lab.etcd.prefix}
    assert flannelctl(alpha, "config", "get", flags=(), env=variables).json == config("vxlan")
    file = alpha.directory / "flanneld-py"
    file.write_text("".join(f'{name}="{value}"\n' for name, value in variables.items()))
    said = flannelctl(alpha, "config", "get", flags=(f"--env-file={file}",))
    assert said.json == config("vxlan")
    said = flannelctl(alpha, "config", "get", flags=(), env={"FLANNELD_ENV_FILE": str(file)})
    assert said.json == config("vxlan")


# --- config ---------------------------------------------------------------------------------------


def test_config_set_get_check(lab: Lab) -> None:
    alpha = lab.add_host("alpha")
    missing = flannelctl(alpha, "config", "get")
    assert (missing.code, missing.out) == (1, "")
    assert f"put {lab.etcd.prefix}/config '{{" in missing.err
    assert flannelctl(alpha, "config", "check").code == 1

    text = json.dumps({"Network": NETWORK, "Backend": {"Type": "vxlan"}})
    assert flannelctl(alpha, "config", "set", text).code == 0
    assert flannelctl(alpha, "config", "get").out == f"{text}\n"
    assert lab.etcd.ctl("get", "--print-value-only", f"{lab.etcd.prefix}/config") == f"{text}\n"
    check = flannelctl(alpha, "config", "check")
    assert check.code == 0
    for expected in ("255 of /24", "10.5.1.0/24", "10.5.255.0/24", "vxlan", "less 50"):
        assert expected in check.out

    assert flannelctl(alpha, "config", "set", "-", text=json.dumps(config("host-gw"))).code == 0
    assert flannelctl(alpha, "config", "get").json == config("host-gw")


def test_config_set_refuses_what_daemons_could_not_use(lab: Lab) -> None:
    alpha = lab.add_host("alpha")
    lab.etcd.put_config(config("vxlan"))
    for wrong, named in (
        ('{"Network": "10.5.0.0"}', "Network"),
        (json.dumps(config("vxlan", SubnetLn=25)), "SubnetLen"),
        ('{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "Prt": 1}}', "Backend.Port"),
        ('{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlna"}}', "vxlan"),
        ("{", "JSON"),
    ):
        said = flannelctl(alpha, "config", "set", wrong)
        assert said.code == 1
        assert named in said.err
    assert flannelctl(alpha, "config", "get").json == config("vxlan"), "nothing was written"
    assert flannelctl(alpha, "config", "set", "/does/not/exist").code == 2
    forced = flannelctl(alpha, "config", "set", "--force", json.dumps(config("vxlan", SubnetLn=25)))
    assert forced.code == 0
    assert flannelctl(alpha, "config", "check").code == 1, "unknown keys are a problem"


# --- plan -----------------------------------------------------------------------------------------


def test_plan_shows_what_a_stopped_host_would_lack(lab: Lab) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    assert flannelctl(alpha, "plan") == Said(0, "nothing to change\n")
    assert flannelctl(alpha, "plan", "--json").json == {"ops": []}
    alpha.daemon.kill()
    said = flannelctl(alpha, "plan")
    assert (said.code, said.out) == (1, "")
    assert "no daemon to ask" in said.err
    assert beta.daemon.running


def test_plan_of_a_waiting_daemon_is_not_empty_but_absent(lab: Lab) -> None:
    alpha = lab.add_host("alpha")
    alpha.start_daemon()
    said = wait_for(
        lambda: flannelctl(alpha, "plan"), READY_LATEST, "the reason", lambda s: "no network config" in s.err
    )
    assert (said.code, said.out) == (1, "")


def test_whoever_may_not_ask_is_told_so_and_nothing_else(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    flags = [f"--subnet-file={alpha.subnet_file}", f"--etcd-prefix={alpha.prefix}", "--env-file=/dev/null"]
    for command in (["plan"], ["config", "apply"]):
        argv = as_nobody("flanneld_py.cli.ctl.main", *flags, *command)
        with pytest.raises(CommandFailed) as caught:
            alpha.run(argv)
        assert f"no daemon to ask: {alpha.control_socket}: permission denied; ask as root" in str(
            caught.value
        )
        assert "start flanneld-py" not in str(caught.value)


# --- cleanup --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_cleanup_leaves_the_host_as_it_was_before(lab: Lab, backend: str) -> None:
    lab.etcd.put_config(config(backend))
    alpha, beta = lab.add_hosts("alpha", "beta")
    add_foreign_objects(alpha)
    shutil.rmtree(alpha.run_directory)
    before = host_state(alpha)
    for host in (alpha, beta):
        host.start_daemon().wait_ready()
    wait_in_order(beta, backend)
    peer = subnet_of(own_key(beta))
    if backend != "udp":  # its one route stands without peers
        wait_for(lambda: alpha.ip("route", "show", peer), READY_LATEST, "alpha's route to beta")
    alpha.daemon.kill()
    assert host_state(alpha) != before

    foretold = flannelctl(alpha, "cleanup", "--dry-run")
    assert foretold.code == 0, foretold
    record = lab.etcd.leases()[own_key(alpha)]
    said = flannelctl(alpha, "cleanup")
    assert said.code == 0, said
    assert changes(before, host_state(alpha)) == []

    *lines, lease = said.out.splitlines()
    assert foretold.out.splitlines()[:-1] == lines
    assert f"{lab.etcd.prefix}/subnets/{own_key(alpha)} stays in etcd until 20" in lease
    assert lab.etcd.leases()[own_key(alpha)] == record
    assert flannelctl(alpha, "cleanup") == Said(0, "nothing to remove\n")
    assert changes(before, host_state(alpha)) == []
    assert beta.daemon.running


def test_a_dry_run_changes_nothing(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    alpha.daemon.terminate()
    before = host_state(alpha)
    assert flannelctl(alpha, "cleanup", "--dry-run").code == 0
    assert changes(before, host_state(alpha)) == []
    spare = alpha.directory / "spare"
    said = flannelctl(alpha, "cleanup", "--dry-run", "--state-dir", str(spare))
    assert (said.code, spare.exists()) == (0, False)


def test_cleanup_refuses_while_the_daemon_runs(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    wait_for((alpha.state_directory / "registry").exists, 10, "the last file that it writes")
    before = host_state(alpha)
    for args in (
        ["cleanup"],
        ["cleanup", "--dry-run"],
        ["cleanup", "--state-dir", f"{alpha.directory}/other"],
    ):
        said = flannelctl(alpha, *args)
        assert (said.code, said.out) == (1, "")
        assert "another flanneld-py" in said.err
        assert "; stop it first (systemctl stop flanneld-py)" in said.err
    said = flannelctl(alpha, "cleanup", "--etcd-prefix=/other")
    assert (said.code, said.out) == (1, "")
    assert "is in use by another flanneld-py; stop that, or give the --subnet-file and" in said.err
    assert changes(before, host_state(alpha)) == []


def test_cleanup_without_etcd(lab: Lab) -> None:
    alpha, _ = overlay(lab, "host-gw", "alpha", "beta")
    key = own_key(alpha)
    alpha.remove_pods()
    alpha.daemon.terminate()
    lab.etcd.kill()
    said = flannelctl(alpha, "cleanup", "--json")
    assert said.code == 0, said
    assert any(line.startswith("del route 10.5.") for line in said.json["removed"])
    assert said.json["failed"] == []
    assert said.json["lease"] is None
    assert "etcd could not be asked" in said.json["notes"][0]
    assert key in said.json["notes"][0]
    assert [route for route in alpha.ip("route", "show") if route.get("protocol") == "96"] == []
    assert not alpha.run_directory.exists()
    assert not alpha.state_directory.exists()


def test_cleanup_where_only_the_kernel_remembers(lab: Lab) -> None:
    alpha, _ = overlay(lab, "vxlan", "alpha", "beta")
    alpha.daemon.kill()
    shutil.rmtree(alpha.state_directory)
    shutil.rmtree(alpha.run_directory)
    said = flannelctl(alpha, "cleanup")
    assert "del link flannel.1" in said.out.splitlines()
    assert not [link for link in alpha.ip("link", "show") if link["ifname"] == "flannel.1"]


def test_cleanup_leaves_a_go_flannel_alone(lab: Lab) -> None:
    """Same prefix, same Network, subnet.env in the usual place; but flanneld-py never ran here."""
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    add_go_flannel(alpha)
    before = host_state(alpha)
    assert flannelctl(alpha, "cleanup") == Said(0, "nothing to remove\n")
    assert changes(before, host_state(alpha)) == []


def add_go_flannel(host: Host) -> None:
    vtep = {"VNI": 1, "VtepMAC": "0a:00:00:00:00:09"}
    value = {"PublicIP": "192.0.2.9", "PublicIPv6": None, "BackendType": "vxlan", "BackendData": vtep}
    host.etcd.ctl("put", f"{host.prefix}/subnets/10.5.8.0-24", json.dumps(value))
    host.ip_batch(
        [
            f"link add flannel.1 mtu 1450 type vxlan id 1 dstport 8472 dev eth0 local {host.address}",
            "link set flannel.1 up",
            "address add 10.5.7.0/32 dev flannel.1",
            "neigh add 10.5.8.0 lladdr 0a:00:00:00:00:09 dev flannel.1 nud permanent",
            "route add 10.5.8.0/24 via 10.5.8.0 dev flannel.1 onlink",
        ]
    )
    host.subnet_file.write_text(f"FLANNEL_NETWORK={NETWORK}\nFLANNEL_SUBNET=10.5.7.1/24\nFLANNEL_MTU=1450\n")


def test_cleanup_refuses_the_files_of_another_prefix(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    alpha.daemon.kill()
    before = host_state(alpha)
    said = flannelctl(alpha, "cleanup", "--etcd-prefix=/another")
    assert (said.code, said.out) == (2, "")
    assert alpha.prefix in said.err
    assert changes(before, host_state(alpha)) == []


def test_cleanup_reports_what_it_cannot_remove_and_can_be_run_again(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    alpha.daemon.kill()
    alpha.run(["chattr", "+i", str(alpha.subnet_file)])
    try:
        said = flannelctl(alpha, "cleanup")
    finally:
        alpha.run(["chattr", "-i", str(alpha.subnet_file)])
    assert said.code == 1
    assert "subnet.env" in said.err
    assert (alpha.state_directory / "state.json").exists()
    assert flannelctl(alpha, "cleanup").code == 0
    assert not alpha.run_directory.exists()


def test_cleanup_needs_root(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    argv = [sys.executable, "-m", "flanneld_py.cli.ctl.main", "cleanup"]
    with pytest.raises(CommandFailed, match="CAP_NET_ADMIN"):
        alpha.run(["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", *argv])
