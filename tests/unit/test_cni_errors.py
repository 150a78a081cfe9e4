"""Every error that flannel's CNI plugin has, with its code, and what stands in the place of a lease."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cni_calls import IPV4, PLUGIN, Setting

VERSIONS = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def conf(setting: Setting, **changes: Any) -> str:
    """The conf with some keys changed, or taken out where None."""
    return json.dumps({key: value for key, value in (setting.conf | changes).items() if value is not None})


# --- verbs and versions ---------------------------------------------------------------------------


def test_version_is_told_without_stdin() -> None:
    read, write = os.pipe()  # nothing ever comes, and no end of it
    try:
        done = subprocess.run(
            [PLUGIN], stdin=read, env={"CNI_COMMAND": "VERSION"}, capture_output=True, check=True, timeout=10
        )
    finally:
        os.close(read)
        os.close(write)
    assert json.loads(done.stdout) == {"cniVersion": "1.1.0", "supportedVersions": VERSIONS}


def test_without_a_verb_it_says_what_it_is() -> None:
    done = subprocess.run([PLUGIN], env={}, capture_output=True, text=True, check=True, timeout=10)
    assert done.stdout == ""
    assert "CNI protocol versions supported: 0.1.0, " in done.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_the_known_versions_are_taken(setting: Setting, version: str) -> None:
    setting.conf["cniVersion"] = version
    setting.succeed("ADD")
    setting.succeed("DEL")
    assert [call.config["cniVersion"] for call in setting.calls] == [version, version]


@pytest.mark.parametrize(
    ("verb", "version"),
    [
        ("ADD", "0.3.2"),
        ("ADD", "1.2.0"),
        ("DEL", "v1.0.0"),
        ("CHECK", None),
        ("CHECK", "0.3.1"),
        ("GC", "1.0.0"),
        ("STATUS", "1.0.0"),
        ("STATUS", ""),
    ],
)
def test_code_1_a_version_that_it_does_not_have(setting: Setting, verb: str, version: str | None) -> None:
    error = setting.fail(verb, stdin=conf(setting, cniVersion=version))
    assert error["code"] == 1
    assert (version or "0.1.0") in error["details"]
    assert setting.calls == []


# --- environment and stdin ------------------------------------------------------------------------

NEEDED = {
    "ADD": ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
    "CHECK": ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
    "DEL": ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"],
    "GC": ["CNI_PATH"],
    "STATUS": ["CNI_PATH"],
}


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb, names in NEEDED.items() for name in names])
def test_code_4_a_variable_is_missing(setting: Setting, verb: str, name: str) -> None:
    setting.conf["cniVersion"] = "1.1.0"
    done = setting.run(verb, **{"CNI_NETNS": "/x", name: ""})
    if name == "CNI_CONTAINERID":
        done = setting.run(verb, container="")
    if name == "CNI_IFNAME":
        done = setting.run(verb, ifname="")
    error = json.loads(done.stdout)
    assert (done.returncode, error["code"]) == (1, 4)
    assert name in error["msg"]


@pytest.mark.parametrize(
    ("container", "ifname"),
    [
        ("-c1", "eth0"),
        ("c/1", "eth0"),
        ("c@eth0", "eth0"),
        ("ü", "eth0"),
        ("..", "eth0"),
        ("c1", "sixteen-letters-"),
        ("c1", "."),
        ("c1", ".."),
        ("c1", "a/b"),
        ("c1", "a:b"),
        ("c1", "a b"),
    ],
)
def test_code_4_names_that_cannot_be(setting: Setting, container: str, ifname: str) -> None:
    assert setting.fail("ADD", container, ifname)["code"] == 4
    assert setting.states == {}


def test_code_4_a_verb_that_nobody_knows(setting: Setting) -> None:
    assert setting.fail("UPDATE") == {"code": 4, "msg": "unknown CNI_COMMAND: UPDATE", "details": ""}


def test_code_5_stdin_cannot_be_read() -> None:
    env = {"CNI_COMMAND": "STATUS", "CNI_PATH": "/"}
    unreadable = os.open(os.devnull, os.O_WRONLY)
    try:
        done = subprocess.run(
            [PLUGIN], stdin=unreadable, env=env, capture_output=True, text=True, check=False, timeout=10
        )
    finally:
        os.close(unreadable)
    assert json.loads(done.stdout)["code"] == 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"name":"a","mtu":1e400}',
        '{"name":"a"} x',
        '{"name":"a","cniVersion":1}',
        "\\",
        "[" * 200_000,
    ],
)
def test_code_6_stdin_is_no_conf(setting: Setting, text: str) -> None:
    assert setting.fail("ADD", stdin=text)["code"] == 6


@pytest.mark.parametrize("name", [None, "", "a b", "-a", "a/b", 7])
def test_code_7_the_name_of_the_network(setting: Setting, name: object) -> None:
    assert setting.fail("ADD", stdin=conf(setting, name=name))["code"] == 7


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
@pytest.mark.parametrize("prev", ["text", "", [], [1], 5])
def test_code_7_a_previous_result_that_is_none(setting: Setting, prev: object, version: str) -> None:
    """The delegate would refuse it in ADD, and again in each DEL."""
    error = setting.fail("ADD", stdin=conf(setting, cniVersion=version, prevResult=prev))
    assert error["code"] == 7
    assert f"prevResult in the conf is {json.dumps(prev)}, not" in error["msg"]
    assert setting.states == {}


@pytest.mark.parametrize("seconds", [-1, "5", True, [5]])
def test_code_7_a_time_that_is_none(setting: Setting, seconds: object) -> None:
    error = setting.fail("ADD", stdin=conf(setting, waitSeconds=seconds))
    assert error["code"] == 7
    assert json.dumps(seconds) in error["msg"]


@pytest.mark.parametrize(
    "listed",
    [
        "absent",
        *({"a": 1}, {}, "c1", "", 1, 0, False),
        ["c1"],
        [{"containerID": "c1"}],
        [{"containerID": []}],
        [{"containerID": 5, "ifname": "eth0"}],
        [{"containerID": "c1", "ifname": []}],
    ],
)
def test_code_7_gc_without_a_list_takes_nothing_away(setting: Setting, listed: object) -> None:
    setting.succeed("ADD")
    setting.conf["cniVersion"] = "1.1.0"
    if listed != "absent":
        setting.conf["cni.dev/valid-attachments"] = listed
    error = setting.fail("GC")
    assert (error["code"], error["msg"][:26]) == (7, "cni.dev/valid-attachments ")
    assert list(setting.states) == ["c1"]
    assert setting.verbs == ["ADD"]


def test_gc_of_an_empty_list_in_go(setting: Setting) -> None:
    setting.succeed("ADD")
    setting.conf |= {"cniVersion": "1.1.0", "cni.dev/valid-attachments": None}
    setting.succeed("GC")
    assert setting.states == {}


@pytest.mark.parametrize("verb", ["ADD", "DEL"])
def test_code_8_the_hosts_own_netns(setting: Setting, verb: str) -> None:
    own = "/proc/self/ns/net"
    assert setting.fail(verb, CNI_NETNS=own)["code"] == 8
    assert setting.calls == [], "the delegate would have taken the host's eth0"
    setting.succeed("ADD", CNI_NETNS=own, CNI_NETNS_OVERRIDE="1")
    setting.succeed("DEL", CNI_NETNS=own, CNI_NETNS_OVERRIDE="True")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"delegate": {"name": "x"}}, "must not have 'name'"),
        ({"delegate": {"type": "absent"}}, 'failed to find plugin "absent" in path [/nonexistent:'),
        ({"delegate": {"type": "../noter"}}, "is no name of a plugin"),
        ({"delegate": {"type": ""}}, "is no name of a plugin"),
        ({"subnetFile": 5}, "subnetFile"),
        ({"dataDir": []}, ""),
        ({"dataDir": "/dev/null/x"}, "/dev/null"),
    ],
)
def test_code_999_the_rest(setting: Setting, changes: dict[str, Any], part: str) -> None:
    if changes == {"dataDir": []}:
        changes = {"dataDir": [1]}
    error = setting.fail("ADD", stdin=conf(setting, **changes))
    assert error["code"] == 999
    assert part in error["msg"]
    assert setting.states == {}


# --- no lease -------------------------------------------------------------------------------------


@pytest.fixture
def unleased(tmp_path: Path) -> Setting:
    return Setting(tmp_path, lease=None)


def told(setting: Setting, *problems: dict[str, str], state: str = "waiting", alive: bool = True) -> Any:
    """A status.json as the daemon writes it, and the daemon's socket; keep what is returned."""
    status = {"state": state, "pid": 17, "ready": False, "problems": list(problems)}
    (setting.folder / "status.json").write_text(json.dumps(status))
    listener = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(setting.folder)  # the path of a socket must be short
    try:
        listener.bind("flanneld-py.sock")
    finally:
        os.chdir(here)
    if alive:
        listener.listen()
    return listener


def ago(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.123Z", time.gmtime(time.time() - seconds))


UNREACHABLE = {
    "code": "registry-unreachable",
    "reason": "etcd http://10.0.0.5:2379: connection refused",
    "fix": "start etcd",
}


def test_the_cause_is_named_and_not_the_symptom(unleased: Setting) -> None:
    with told(unleased, UNREACHABLE | {"since": ago(42)}):
        error = unleased.fail("ADD")
    assert error["code"] == 999
    said = r"waiting for etcd 10\.0\.0\.5:2379: connection refused, for 4[2-5] s \(start etcd\)"
    assert re.search(said, error["msg"])
    assert error["details"] == f"there is no {unleased.subnet_file}"


def test_other_problems_are_named_too(unleased: Setting) -> None:
    more = {"code": "config-missing", "reason": "no network config at /a/config", "since": "?"}
    with told(unleased, UNREACHABLE, more):
        msg = unleased.fail("ADD")["msg"]
    assert msg.endswith("connection refused (start etcd); waiting: no network config at /a/config")


def test_a_daemon_that_never_was(unleased: Setting) -> None:
    msg = unleased.fail("ADD")["msg"]
    assert f"no daemon has told its status in {unleased.folder}" in msg
    assert "start it" in msg
    assert "subnetFile" in msg


def test_a_daemon_that_was_stopped(unleased: Setting) -> None:
    with told(unleased, state="stopped", alive=False):
        assert "the daemon was stopped; start it" in unleased.fail("ADD")["msg"]


@pytest.mark.parametrize("code", ["start-failed", "ended"])
def test_a_daemon_that_ended_by_itself(unleased: Setting, code: str) -> None:
    why = {"code": code, "reason": "--iface 'eth7': there is none", "fix": "mend it", "since": ago(42)}
    with told(unleased, UNREACHABLE, why, state="stopped", alive=False):
        msg = unleased.fail("ADD")["msg"]
    assert re.search(r": the daemon does not run: --iface 'eth7': there is none, for 4\d s \(mend it\)$", msg)


def test_a_daemon_that_is_gone(unleased: Setting) -> None:
    with told(unleased, UNREACHABLE, alive=False):
        msg = unleased.fail("ADD")["msg"]
    assert "the daemon (pid 17) is gone; start it" in msg
    assert "the last it said was: waiting for etcd 10.0.0.5:2379: connection refused" in msg


def test_a_daemon_that_has_no_problem(unleased: Setting) -> None:
    with told(unleased, state="starting"):
        assert unleased.fail("ADD")["msg"] == "no lease on this host: the daemon (pid 17) is starting"


def test_a_subnet_file_of_another_name_has_a_status_of_another_name(unleased: Setting) -> None:
    unleased.conf["subnetFile"] = str(unleased.folder / "blue.env")
    with told(unleased, UNREACHABLE, alive=False):
        (unleased.folder / "status.json").rename(unleased.folder / "blue.status.json")
        assert "connection refused" in unleased.fail("ADD")["msg"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"state":1,"pid":2,"problems":null}',
        '{"state":1,"pid":2,"problems":["x"]}',
        "\xff",
    ],
)
def test_a_status_that_cannot_be_read_is_none(unleased: Setting, text: str) -> None:
    (unleased.folder / "status.json").write_text(text, "latin-1")
    assert "no lease on this host: " in unleased.fail("ADD")["msg"]


def test_a_file_that_does_not_do_is_named(setting: Setting) -> None:
    setting.subnet_file.write_text("FLANNEL_MTU=1450\n")
    error = setting.fail("ADD")
    assert error["details"].startswith(f"{setting.subnet_file}: FLANNEL_NETWORK, ")


def test_add_waits_for_the_lease(unleased: Setting) -> None:
    unleased.conf["waitSeconds"] = 30
    env = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_NETNS": "/x"}
    env |= {"CNI_PATH": str(unleased.plugins), "NOTES": str(unleased.notes), "PATH": os.environ["PATH"]}
    with subprocess.Popen([PLUGIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as child:
        assert child.stdin is not None
        child.stdin.write(json.dumps(unleased.conf).encode())
        child.stdin.close()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
        unleased.subnet_file.write_text(IPV4)
        assert child.wait(5) == 0
    assert unleased.verbs == ["ADD"]


def test_it_waits_for_longer_than_the_kernel_can(unleased: Setting) -> None:
    text = json.dumps(unleased.conf | {"waitSeconds": 10**400})
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(
            [PLUGIN],
            input=text.encode(),
            env={"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_NETNS": "/x"}
            | {"CNI_PATH": str(unleased.plugins)},
            check=False,
            timeout=0.5,
        )


def test_it_waits_as_long_as_the_conf_says(unleased: Setting) -> None:
    unleased.conf["waitSeconds"] = 0.5
    begun = time.monotonic()
    assert "no lease on this host after " in unleased.fail("ADD")["msg"]
    assert time.monotonic() - begun >= 0.5


def test_status_is_50_without_a_lease_and_does_not_wait(unleased: Setting) -> None:
    unleased.conf |= {"cniVersion": "1.1.0", "waitSeconds": 60}
    with told(unleased, UNREACHABLE):
        error = unleased.fail("STATUS")
    assert error["code"] == 50
    assert "waiting for etcd 10.0.0.5:2379: connection refused" in error["msg"]
