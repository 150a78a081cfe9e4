"""flannelctl status and plan, against the daemon's own control socket and status."""

from __future__ import annotations

import json
import os
import secrets
import socket
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from flanneld_py.cli.ctl.commands import command
from flanneld_py.cli.ctl.control import read_status_file
from flanneld_py.cli.ctl.status import SHOWN, Told, checked, render
from flanneld_py.core.ownership import lock_name
from flanneld_py.daemon.inbox import Levels
from flanneld_py.daemon.status import Process, compose
from flanneld_py.errors import FlanneldError
from tests.unit.control_sockets import daemon

NOW = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)
MINUTE_AGO = "2026-01-02T11:59:00.000Z"
WELL: dict[str, Any] = {
    "version": "0.1.0",
    "pid": 4711,
    "state": "in sync",
    "ready": True,
    "prefix": "/coreos.com/network",
    "node_id": "0123456789abcdef0123456789abcdef",
    "backend": "vxlan",
    "networks": ["10.5.0.0/16"],
    "subnets": ["10.5.34.0/24"],
    "mtu": 1450,
    "offloads": {},
    "external": {"name": "eth0", "mtu": 1500, "addresses": ["192.0.2.1"], "public": ["192.0.2.1"]},
    "lease": {"state": "held", "key": "10.5.34.0-24", "ttl": 86400, "etcd_lease": "1a", "reason": None},
    "registry": {
        "state": "in sync",
        "endpoint": "http://192.0.2.9:2379",
        "revision": 17,
        "since": MINUTE_AGO,
        "error": None,
    },
    "peers": {"count": 3, "held": 0, "bad": {}, "bad_count": 0},
    "drift": {"repaired": {}, "ops": {"set": 9, "del": 0}, "failed": []},
    "problems": [],
}
PROBLEM = {
    "code": "config-missing",
    "reason": "no network config",
    "fix": "etcdctl put …",
    "since": MINUTE_AGO,
}


def changed(**parts: Any) -> dict[str, Any]:
    return {**deepcopy(WELL), **parts}


def shown(status: dict[str, Any]) -> str:
    return click.unstyle(render(Told(status, "daemon"), NOW))


def flannelctl(directory: Path, *args: str) -> Result:
    arguments = [f"--subnet-file={directory}/subnet.env", *args]
    return CliRunner().invoke(
        command, arguments, standalone_mode=False, env={"FLANNELD_ENV_FILE": os.devnull, "NO_COLOR": None}
    )


def code(result: Result) -> Any:
    assert result.exception is None, result.exception
    return result.return_value


# --- the view -------------------------------------------------------------------------------------


def test_all_on_one_screen() -> None:
    assert shown(WELL).splitlines() == [
        "flanneld-py 0.1.0: in sync, ready (pid 4711, prefix /coreos.com/network, "
        "node 0123456789abcdef0123456789abcdef)",
        "",
        "  backend    vxlan in 10.5.0.0/16 (IPv4)",
        "  subnet     10.5.34.0/24, MTU 1450",
        "  interface  eth0 192.0.2.1, MTU 1500",
        "  lease      held 10.5.34.0-24, TTL 1 d",
        "  registry   in sync for 1 min, http://192.0.2.9:2379, revision 17",
        "  peers      3",
        "  drift      repaired since the start: nothing",
    ]


def test_why_it_is_not_ready() -> None:
    checks = {
        "lease": {"ok": True, "reason": "held 10.5.34.0/24"},
        "registry": {"ok": False, "reason": "unreachable: connection refused\x1b[2J"},
        "kernel": {"ok": False, "reason": "not as it should be"},
    }
    assert shown(changed(ready=False, checks=checks)).splitlines()[1:4] == [
        "  not ready: registry: unreachable: connection refused\\x1b[2J",
        "  not ready: kernel: not as it should be",
        "",
    ]
    # Of an older daemon, or damaged.
    strange: Any
    for strange in (None, [], {"lease": None}, {"lease": {"ok": False}}):
        assert "not ready:" not in shown(changed(ready=False, checks=strange))


def test_problems_with_reason_and_fix() -> None:
    assert shown(changed(problems=[PROBLEM])).endswith(
        "\n\nconfig-missing (for 1 min): no network config\n  fix: etcdctl put …"
    )
    assert "fix:" not in shown(changed(problems=[{**PROBLEM, "fix": ""}]))


def test_the_headline_tells_of_problems_that_leave_it_ready() -> None:
    """`in sync, ready` stood above an exit code of 1."""
    assert ": in sync, ready, 1 problem (pid" in shown(changed(problems=[PROBLEM])).splitlines()[0]
    assert ": in sync, not ready (pid" in shown(changed(ready=False, problems=[PROBLEM])).splitlines()[0]


def test_what_the_last_run_left_in_subnet_env_is_shown_until_a_lease_is_held() -> None:
    fresh = changed(subnets=[], mtu=None, inherited=["10.5.34.0/24"])
    assert "  subnet     none leased yet; subnet.env of the last run has 10.5.34.0/24" in shown(fresh)


def test_drift_and_failures() -> None:
    failed = [{"op": f"set route 10.5.{n}.0/24", "error": "Network is unreachable"} for n in range(SHOWN + 2)]
    text = shown(changed(drift={"repaired": {"routes": 2, "fdb": 1}, "ops": {}, "failed": failed}))
    assert "repaired since the start: 2 route rows, 1 fdb entry row; 7 ops failing:" in text
    assert "set route 10.5.0.0/24: Network is unreachable" in text
    assert f"set route 10.5.{SHOWN}.0/24" not in text
    assert "and 2 more (--json lists all)" in text


def test_of_failures_that_wait_for_one_another_the_root_alone_is_shown() -> None:
    root = {"op": "set data plane flannel0", "error": "the port is used"}
    waits = [
        {"op": f"set tunnel 10.5.{n}.0/24", "error": "waits for data plane flannel0: the port is used"}
        for n in range(6)
    ]
    text = shown(changed(drift={"repaired": {}, "ops": {}, "failed": [*waits, root]}))
    assert text.count("the port is used") == 1
    assert "6 ops more that wait for others" in text


PLANE = {
    "device": "flannel0",
    "runs": "native",
    "why": None,
    "pid": 4712,
    "port": 8285,
    "offloads": ["tso", "udp_gro"],
    "restarts": 1,
    "traffic": {
        "tx": {"packets": 12, "drops": {}},
        "rx": {"packets": 0, "drops": {"outer-source-unknown": 2}},
    },
}


def test_what_forwards_and_what_it_drops() -> None:
    lines = shown(changed(backend="udp", data_plane=PLANE)).splitlines()
    assert "  data plane native, port 8285, tso udp_gro, 1 restart" in lines
    assert "  traffic    12 packets to peers, 0 from them; dropped: rx outer-source-unknown 2" in lines
    python = {**PLANE, "runs": "python", "why": "python was asked for", "offloads": [], "restarts": 0}
    text = shown(changed(backend="udp", data_plane=python))
    assert "  data plane python (slower): python was asked for, port 8285, no offloads, 0 restarts\n" in text
    assert "data plane none: nothing forwards on flannel0" in shown(
        changed(data_plane={**PLANE, "runs": None})
    )


@pytest.mark.parametrize("backend", ["udp", "vxlan"])
@pytest.mark.parametrize("state", ["stopped", "killed", "in sync"])
def test_a_dead_udp_host_is_told_to_be_cut_off(backend: str, state: str) -> None:
    status = changed(backend=backend, state=state)
    text = click.unstyle(render(Told(status, "file", "/run/x.sock: no", NOW), NOW))
    said = "Backend udp: nobody forwards: containers are cut off until it runs again.\n" in text
    assert said == (backend == "udp" and state != "in sync")


def test_left_out_records() -> None:
    text = shown(
        changed(peers={"count": 3, "held": 0, "bad": {"10.5.9.0-24": "PublicIP is missing"}, "bad_count": 1})
    )
    assert "3, 1 record left out:" in text
    assert "10.5.9.0-24  PublicIP is missing" in text


def test_held_peers() -> None:
    text = shown(changed(peers={"count": 9, "held": 8, "bad": {}, "bad_count": 0}))
    assert "9, 8 of them held as many records vanished at once" in text


def test_of_many_left_out_records_some_are_shown() -> None:
    bad = {f"10.5.{n}.0-24": "PublicIP is missing" for n in range(50)}
    text = shown(changed(peers={"count": 3, "held": 0, "bad": bad, "bad_count": 10_000}))
    assert "3, 10000 records left out:" in text
    assert f"and {10_000 - SHOWN} more (flannelctl leases lists all)" in text


def test_an_mtu_that_the_interface_does_not_have() -> None:
    text = shown(changed(options={"external_mtu": 9000, "vni": 1}))
    assert "  subnet     10.5.34.0/24, MTU 1450 (the config's MTU, 9000, is more than eth0 has)\n" in text
    unremarkable: list[Any] = [
        {"external_mtu": 1400},
        {"external_mtu": 1500},
        {"external_mtu": "x"},
        {},
        None,
    ]
    for options in unremarkable:
        assert "  subnet     10.5.34.0/24, MTU 1450\n" in shown(changed(options=options))


def test_a_published_address_that_is_not_the_interfaces() -> None:
    external = {**WELL["external"], "public": ["203.0.113.5"]}
    assert "192.0.2.1, MTU 1500, published as 203.0.113.5" in shown(changed(external=external))


def test_what_chose_the_interface() -> None:
    external = {**WELL["external"], "how": "the default route"}
    assert "  interface  eth0 192.0.2.1, MTU 1500, chosen by the default route\n" in shown(
        changed(external=external)
    )


@pytest.mark.parametrize(
    ("networks", "families"),
    [(["fd00:5::/48"], "(IPv6)"), (["10.5.0.0/16", "fd00:5::/48"], "(IPv4 and IPv6)")],
)
def test_the_families_of_the_network(networks: list[str], families: str) -> None:
    assert f"  backend    vxlan in {', '.join(networks)} {families}\n" in shown(changed(networks=networks))


def test_a_node_that_has_no_identity_yet_is_said_to_have_none() -> None:
    assert ", node not known yet)" in shown(changed(node_id=""))


def test_before_anything_is_known() -> None:
    status = compose(Levels(), Process(1, "/p", "n"))
    assert checked(status, Path("/run/flannel/status.json")) == status
    text = shown(status)
    assert "starting, not ready" in text
    assert "none: no valid network config yet" in text


def test_what_strangers_wrote_cannot_steer_the_terminal() -> None:
    evil = "\x1b]0;title\x07\n\r\u202e"
    status = changed(
        peers={"count": 0, "held": 0, "bad": {evil: evil}, "bad_count": 1},
        drift={"repaired": {}, "ops": {}, "failed": [{"op": evil, "error": evil}]},
        problems=[{"code": evil, "reason": evil, "fix": evil, "since": evil}],
        state=evil,
        node_id=evil,
    )
    text = shown(status)
    assert not set(text) & set("\x1b\x07\r\u202e")
    rows = len(shown(WELL).splitlines())
    assert len(text.splitlines()) == rows + len(("bad record", "failed op", "blank", "problem", "fix"))


def test_the_file_of_a_dead_daemon_is_called_so() -> None:
    written = datetime(2026, 1, 2, 11, 59, 30, tzinfo=UTC)
    lines = click.unstyle(
        render(Told(WELL, "file", "/run/x.sock: Connection refused", written), NOW)
    ).splitlines()
    assert lines[:2] == [
        "No daemon answers on /run/x.sock: Connection refused.",
        "What follows is what it wrote 30 s ago.",
    ]
    assert "  registry   in sync for 30 s, http://192.0.2.9:2379, revision 17" in lines


# --- the command ----------------------------------------------------------------------------------


def test_status_from_the_daemon(tmp_path: Path) -> None:
    with daemon(tmp_path, status=lambda: WELL):
        result = flannelctl(tmp_path, "status", "--json")
        assert code(result) == 0
        assert json.loads(result.stdout) == {**WELL, "source": "daemon"}
        text = flannelctl(tmp_path, "status")
        assert code(text) == 0
        assert "vxlan in 10.5.0.0/16" in text.stdout


@pytest.mark.parametrize("parts", [{"problems": [PROBLEM]}, {"ready": False}])
def test_exit_1_when_not_well(tmp_path: Path, parts: dict[str, Any]) -> None:
    with daemon(tmp_path, status=lambda: changed(**parts)):
        assert code(flannelctl(tmp_path, "status")) == 1


def test_status_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps(WELL))
    result = flannelctl(tmp_path, "status", "--json")
    assert code(result) == 1, "no daemon runs"
    told = json.loads(result.stdout)
    assert (told.pop("source"), told.pop("ready"), told.pop("state")) == ("file", False, "killed")
    (problem,) = told.pop("problems")
    assert problem["code"] == "killed"
    assert problem["reason"].endswith("(pid 4711) was killed or crashed; when it last wrote it was in sync")
    assert told == {name: value for name, value in WELL.items() if name in told}
    text = flannelctl(tmp_path, "status").stdout
    assert "No daemon answers on" in text
    assert "killed, not ready" in text


def test_the_file_of_a_daemon_that_came_to_its_end_is_its_last_word(tmp_path: Path) -> None:
    stopped = changed(state="stopped", ready=False)
    (tmp_path / "status.json").write_text(json.dumps(stopped))
    assert json.loads(flannelctl(tmp_path, "status", "--json").stdout) == {**stopped, "source": "file"}
    assert "fix: start flanneld-py; if it does not stay, its log says why" in (
        flannelctl(tmp_path, "status").stdout
    )


def test_a_daemon_that_runs_and_cannot_be_asked_was_not_killed(tmp_path: Path) -> None:
    prefix = f"/test/{secrets.token_hex(8)}"
    running = changed(prefix=prefix)
    (tmp_path / "status.json").write_text(json.dumps(running))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
        lock.bind(lock_name(prefix))
        result = flannelctl(tmp_path, "status")
        assert code(result) == 1
        assert f"is held by pid {os.getpid()} " in result.stdout
        assert "it puts its socket back within seconds" in result.stdout
        assert "in sync, ready" in result.stdout


def test_status_from_nowhere(tmp_path: Path) -> None:
    result = flannelctl(tmp_path, "status")
    assert isinstance(result.exception, FlanneldError)
    assert str(result.exception).startswith(
        f"no daemon has run here: {tmp_path}/flanneld-py.sock: No such file"
    )


def test_a_status_of_another_version_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"version": "9"}')
    result = flannelctl(tmp_path, "status")
    assert isinstance(result.exception, FlanneldError)
    assert "not the status of this version" in str(result.exception)


DAMAGED = {
    "nested deeply": "[" * 100_000,
    "networks is a number": json.dumps(changed(networks=5)),
    "networks of numbers": json.dumps(changed(networks=[5])),
    "no object": json.dumps(changed(lease=None)),
    "half an object": json.dumps(changed(registry={"state": "in sync"})),
    "truth for a number": json.dumps(changed(mtu=True)),
    "problems of text": json.dumps(changed(problems=["config-missing"])),
    "bad is a list": json.dumps(changed(peers={"count": 1, "held": 0, "bad": [], "bad_count": 0})),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_status_file_is_no_traceback(tmp_path: Path, case: str) -> None:
    (tmp_path / "status.json").write_text(DAMAGED[case])
    result = flannelctl(tmp_path, "status")
    assert isinstance(result.exception, FlanneldError)
    assert "\n" not in str(result.exception)


def test_a_fifo_in_the_place_of_the_status_file_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "status.json")
    assert "no daemon has run here" in str(flannelctl(tmp_path, "status").exception)


def test_the_daemon_of_another_prefix_is_called_so(tmp_path: Path) -> None:
    with daemon(tmp_path, status=lambda: changed(prefix="/a"), plan=list):
        for args in (["status"], ["plan"]):
            result = flannelctl(tmp_path, *args, "--etcd-prefix=/b")
            assert "this is the daemon with --etcd-prefix /a, not /b" in result.stderr
            assert flannelctl(tmp_path, *args, "--etcd-prefix=/a").stderr == ""
        assert code(flannelctl(tmp_path, "status", "--etcd-prefix=/b")) == 1
        assert code(flannelctl(tmp_path, "status", "--etcd-prefix=/a")) == 0


def test_colours_unless_unwanted(tmp_path: Path) -> None:
    with daemon(tmp_path, status=lambda: WELL):
        arguments = [f"--subnet-file={tmp_path}/subnet.env", "--env-file=/dev/null", "status"]
        coloured = CliRunner().invoke(command, arguments, color=True, env={"NO_COLOR": None})
        assert "\x1b[32m" in coloured.output
        assert "\x1b" not in CliRunner().invoke(command, arguments, color=True, env={"NO_COLOR": "1"}).output


def test_plan(tmp_path: Path) -> None:
    ops = ["set route 10.5.3.0/24 via 10.5.3.0 dev flannel.1 onlink", "del link flannel.7"]
    with daemon(tmp_path, plan=lambda: ops, status=lambda: WELL):
        result = flannelctl(tmp_path, "plan")
        assert (code(result), result.stdout.splitlines()) == (1, ops)
        assert json.loads(flannelctl(tmp_path, "plan", "--json").stdout) == {"ops": ops}


def test_an_empty_plan(tmp_path: Path) -> None:
    with daemon(tmp_path, plan=list, status=lambda: WELL):
        result = flannelctl(tmp_path, "plan")
        assert (code(result), result.stdout) == (0, "nothing to change\n")
        assert json.loads(flannelctl(tmp_path, "plan", "--json").stdout) == {"ops": []}


def test_no_plan_while_the_daemon_waits(tmp_path: Path) -> None:
    with daemon(tmp_path, plan=list, status=lambda: changed(subnets=[], problems=[PROBLEM])):
        result = flannelctl(tmp_path, "plan")
        assert str(result.exception) == "there is no plan yet: no network config"


def test_no_plan_without_a_daemon(tmp_path: Path) -> None:
    assert str(flannelctl(tmp_path, "plan").exception).startswith("no daemon to ask: ")


def test_a_status_file_that_is_none(tmp_path: Path) -> None:
    for text in ("", "{", "[1]", "\x00"):
        (tmp_path / "status.json").write_text(text)
        assert read_status_file(tmp_path / "status.json") is None
    assert read_status_file(tmp_path / "absent") is None
