"""What operators are told about their mistakes: every case of tests/messages.txt, line by line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from flanneld_py.lab.daemon import COMMAND
from tests.netns.etcd_servers import Authority
from tests.netns.test_ctl import CONNECTION

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.lab import Host, Lab

MESSAGES = Path(__file__).parents[1] / "messages.txt"
AT_LEAST = 35
COMMANDS = {"flanneld-py": COMMAND, "flannelctl": (sys.executable, "-m", "flanneld_py.cli.ctl.main")}
NO_VXLAN = (sys.executable, "-m", "tests.netns.no_vxlan_daemon")
EXIT_CODES = {"flanneld-py": {2, 78}, "flannelctl": {1, 2, 75}}
"""Of mistakes: wrong usage, what a restart does not cure; a problem found, etcd not reached."""
ENDS_WITHIN = 15
"""Seconds; one that does not end by itself waits."""
ROOT = Path(__file__).parents[2]
TLS_PORT, PASSWORD_PORT = 3379, 3389
SUBNET_FILE = "--subnet-file="
PREFIX = "/messages/network"


@dataclass(frozen=True, slots=True)
class Case:
    """A block of messages.txt."""

    title: str
    given: tuple[str, ...]
    command: str
    ends: str
    """`exit 2`, or `waits` with the code of a problem."""
    fix: str = ""
    said: tuple[str, ...] = ()


@dataclass(slots=True)
class Scene:
    """What a case is carried out in."""

    lab: Lab
    host: Host
    words: dict[str, str]
    """What stands for what in the file."""
    env: dict[str, str] = field(default_factory=dict)
    wrapper: list[str] = field(default_factory=list)
    commands: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(COMMANDS))
    bare: bool = False

    def filled(self, text: str) -> str:
        for word, value in self.words.items():
            text = text.replace(f"{{{word}}}", value)
        return text

    def emptied(self, text: str) -> str:
        """The opposite; the longest values first, as one may be part of another."""
        for word, value in sorted(self.words.items(), key=lambda item: -len(item[1])):
            text = re.sub(rf"{re.escape(value)}(?!\d)", f"{{{word}}}", text)
        return text


def read_cases(text: str) -> list[Case]:
    """The blocks of a file in the format that messages.txt describes."""
    cases = []
    for block in re.split(r"^== ", text, flags=re.MULTILINE)[1:]:
        title, *lines = block.strip().splitlines()
        fields: dict[str, list[str]] = {"given": [], "$": [], "exit": [], "waits": [], "fix": [], "|": []}
        for line in lines:
            kind, _, rest = line.partition(" ")
            assert kind in fields, f"{title}: {line!r} begins with none of {', '.join(fields)}"
            fields[kind].append(rest)
        (command,) = fields["$"]
        (ends,) = [f"{kind} {rest}" for kind in ("exit", "waits") for rest in fields[kind]]
        cases.append(
            Case(title, tuple(fields["given"]), command, ends, " ".join(fields["fix"]), tuple(fields["|"]))
        )
    return cases


CASES = {case.title: case for case in read_cases(MESSAGES.read_text())}


# --- preparations ---------------------------------------------------------------------------------


def prepare(scene: Scene, given: str) -> None:
    for begin, step in PREPARATIONS.items():
        if given == begin or given.startswith(f"{begin} "):
            step(scene, given[len(begin) + 1 :])
            return
    pytest.fail(f"given {given}: no such preparation")


def store_config(scene: Scene, text: str) -> None:
    scene.lab.etcd.put_config(text)


def store_record(scene: Scene, text: str) -> None:
    key, value = text.split(" ", 1)
    scene.lab.etcd.ctl("put", f"{scene.lab.etcd.prefix}/subnets/{key}", "--", value)


def run_on_host(scene: Scene, script: str) -> None:
    scene.host.run(["sh", "-ec", scene.filled(script)])


def set_variable(scene: Scene, setting: str) -> None:
    name, _, value = setting.partition("=")
    scene.env[name] = value


def start_daemon(scene: Scene, _: str) -> None:
    daemon = scene.host.start_daemon()
    daemon.wait_ready()
    scene.words["pid"] = str(daemon.pid)
    scene.words["comm"] = Path(f"/proc/{daemon.pid}/comm").read_text().strip()


def listen(scene: Scene, port: str) -> None:
    scene.host.spawn("listener", [sys.executable, "-m", "http.server", port])
    wait_for(lambda: scene.host.run(["ss", "-Hltn"]), 5, "a listener", lambda text: f":{port} " in text)


def drop_net_admin(scene: Scene, _: str) -> None:
    scene.wrapper += ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]


def take_vxlan_away(scene: Scene, _: str) -> None:
    scene.commands["flanneld-py"] = NO_VXLAN


def leave_flags_out(scene: Scene, _: str) -> None:
    scene.bare = True


def start_etcd_with_tls(scene: Scene, _: str) -> None:
    """It wants certificates of its clients, too."""
    authority = Authority(scene.host.directory / "tls")
    Authority(scene.host.directory / "other")
    certificate, key = authority.issue("server", "IP:192.0.2.254")
    authority.issue("client")
    url = start_etcd(
        scene,
        "https",
        TLS_PORT,
        f"--cert-file={certificate}",
        f"--key-file={key}",
        f"--trusted-ca-file={authority.ca}",
        "--client-cert-auth",
    )
    scene.words["tls"] = url
    trusted = [f"--cacert={authority.ca}", f"--cert={certificate}", f"--key={key}"]
    etcdctl(scene, url, *trusted, "endpoint", "health")


def start_etcd_with_password(scene: Scene, _: str) -> None:
    url = scene.words["password"] = start_etcd(scene, "http", PASSWORD_PORT)
    for line in ("user add root:secret", "user grant-role root root", "auth enable"):
        etcdctl(scene, url, *line.split())


def start_etcd(scene: Scene, scheme: str, port: int, *options: str) -> str:
    """A second one in the underlay, with an empty directory; its URL."""
    url, peers = f"{scheme}://192.0.2.254:{port}", f"http://127.0.0.1:{port + 1}"
    scene.lab.etcd.namespace.spawn(
        f"etcd-{port}",
        [
            "etcd",
            f"--data-dir={scene.host.directory}/etcd-{port}",
            f"--listen-client-urls={url}",
            f"--advertise-client-urls={url}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
            *options,
        ],
    )
    return url


def etcdctl(scene: Scene, url: str, *args: str) -> None:
    """As soon as it answers."""
    scene.lab.etcd.namespace.run(
        ["etcdctl", f"--endpoints={url}", "--dial-timeout=10s", "--command-timeout=10s", *args],
        env={"ETCDCTL_API": "3"},
    )


PREPARATIONS: dict[str, Callable[[Scene, str], None]] = {
    "config": store_config,
    "record": store_record,
    "host": run_on_host,
    "variable": set_variable,
    "daemon": start_daemon,
    "listener": listen,
    "etcd with TLS": start_etcd_with_tls,
    "etcd with password": start_etcd_with_password,
    "no CAP_NET_ADMIN": drop_net_admin,
    "no vxlan": take_vxlan_away,
    "no flags": leave_flags_out,
}
"""How a preparation begins → what does it, with the rest of its line."""


# --- carrying out ---------------------------------------------------------------------------------


def carry_out(case: Case, lab: Lab) -> Case:
    """The same case with what really happens."""
    # Always the same one: the MAC of our device is made from it.
    lab.etcd.prefix = PREFIX
    lab.etcd.ctl("del", "--prefix", f"{PREFIX}/")
    host = lab.add_host("alpha")
    scene = Scene(lab, host, {"dir": str(host.directory)})
    for given in case.given:
        prepare(scene, given)
    name, *args = shlex.split(scene.filled(case.command))
    flags = {"flanneld-py": host.flags, "flannelctl": [f for f in host.flags if f.startswith(CONNECTION)]}[
        name
    ]
    argv = [*scene.wrapper, *scene.commands[name], *([] if scene.bare else flags), *args]
    if case.ends.startswith("waits"):
        return wait_for_problem(case, scene, argv)
    done = subprocess.run(
        host.entered(argv),
        check=False,
        capture_output=True,
        text=True,
        timeout=ENDS_WITHIN,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "FLANNELD_ENV_FILE": os.devnull, **scene.env},
    )
    assert "Traceback" not in done.stdout + done.stderr
    return replace(case, ends=f"exit {done.returncode}", said=tuple(grave(scene, done.stderr)))


def wait_for_problem(case: Case, scene: Scene, argv: list[str]) -> Case:
    """What the daemon says, and what its status has; it must neither end nor call itself ready."""
    code = case.ends.removeprefix("waits").strip()
    process = scene.host.spawn("daemon", argv, env=scene.env)
    files = [Path(arg.removeprefix(SUBNET_FILE)) for arg in argv if arg.startswith(SUBNET_FILE)]
    status_file = files[-1].with_name("status.json")

    def problem() -> dict[str, str] | None:
        assert process.running, process.output()
        if not status_file.exists():
            return None
        status = json.loads(status_file.read_text())
        assert status["ready"] is False
        return next((problem for problem in status["problems"] if problem["code"] == code), None)

    fix = ""
    if code:
        found = wait_for(problem, ENDS_WITHIN, f"problem {code}", interval=0.02) or {}
        fix = scene.emptied(found["fix"])
    expected = len(case.said) or 1
    lines = wait_for(
        lambda: grave(scene, process.stderr.read_text()), 5, "a line", lambda seen: len(seen) >= expected
    )
    assert "Traceback" not in process.output()
    assert process.terminate() == 0
    return replace(case, ends=case.ends, fix=fix, said=tuple(lines[:expected] if case.said else lines))


def grave(scene: Scene, stderr: str) -> list[str]:
    """All of it but what the log says below warnings; of that, no time."""
    kept = []
    for line in stderr.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            kept.append(line)
            continue
        if event["level"] not in ("info", "debug"):
            kept.append(json.dumps({key: value for key, value in event.items() if key != "ts"}))
    return [scene.emptied(line) for line in kept]


# --- the cases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", CASES)
def test_what_is_said(lab: Lab, title: str) -> None:
    case = CASES[title]
    assert carry_out(case, lab) == case


def test_there_are_enough_and_all_end_as_they_should() -> None:
    assert len(CASES) >= AT_LEAST
    assert len(CASES) == MESSAGES.read_text().count("\n== ")
    for case in CASES.values():
        ends, _, code = case.ends.partition(" ")
        assert case.said, case.title
        if ends == "exit":
            assert int(code) in EXIT_CODES[case.command.split()[0]], case.title
            assert len([line for line in case.said if not line.startswith("{")]) == 1, case.title


def test_the_format_is_checked() -> None:
    with pytest.raises(AssertionError, match="'givn daemon' begins with none of given"):
        read_cases("== a\ngivn daemon\n$ flanneld-py\nexit 2\n")
    (case,) = read_cases("text\n\n== a b\ngiven daemon\n$ flanneld-py -x\nwaits code\nfix it\n| one\n| two\n")
    assert case == Case("a b", ("daemon",), "flanneld-py -x", "waits code", "it", ("one", "two"))
