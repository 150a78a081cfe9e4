"""What a container runtime does with cni/flannel on a host, with Debian's bridge and host-local."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flanneld_py.lab.netns import Namespace
from flanneld_py.lab.process import DIE_WITH_PARENT, environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flanneld_py.lab import Host

FLANNEL = Path(__file__).parents[2] / "cni" / "flannel"
DEBIAN = "/usr/lib/cni"
"""Where the package containernetworking-plugins has its plugins: CNI up to 1.0.0."""
NAME = "cbr0"
ANSWER = 30
"""Seconds within which a plugin must have ended."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a plugin did."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """Of a call that must have succeeded; empty when it printed nothing."""
        assert self.exit_code == 0, self
        assert self.stderr == ""
        parsed: dict[str, Any] = json.loads(self.stdout or "{}")
        return parsed

    @property
    def error(self) -> dict[str, Any]:
        """Of a call that must have failed."""
        assert self.exit_code == 1, self
        parsed: dict[str, Any] = json.loads(self.stdout)
        assert {"code", "msg"} <= parsed.keys() <= {"code", "msg", "details"}
        return parsed


class Runtime:
    """Calls the plugin on a host, with a conf and folders of its own."""

    def __init__(self, host: Host, version: str = "1.0.0", **conf: Any) -> None:
        """Take the host's subnet.env; `conf` has further keys of the network config."""
        self.host = host
        self.folder = host.directory / "cni"
        self.data_dir = self.folder / "flannel"
        self.ipam_dir = self.folder / "networks"
        self.path = DEBIAN
        """$CNI_PATH"""
        self.conf: dict[str, Any] = {
            "cniVersion": version,
            "name": NAME,
            "type": "flannel",
            "subnetFile": str(host.subnet_file),
            "dataDir": str(self.data_dir),
            "ipam": {"dataDir": str(self.ipam_dir)},
            **conf,
        }

    def write_lease(self, *lines: str) -> None:
        """A subnet.env, for hosts without a daemon; FLANNEL_IPMASQ=true: the delegate needs no iptables."""
        text = "\n".join([*lines, "FLANNEL_MTU=1450", "FLANNEL_IPMASQ=true", ""])
        self.host.subnet_file.write_text(text)

    def container(self, name: str = "c1") -> Container:
        return Container(self, name)

    def start(
        self,
        verb: str,
        env: Mapping[str, str],
        conf: Mapping[str, Any] | None = None,
        plugin: Sequence[str] = (os.fspath(FLANNEL),),
    ) -> subprocess.Popen[str]:
        """Start the plugin in the host; its conf is in its stdin already."""
        command = [*DIE_WITH_PARENT, *self.host.entered(plugin)]
        child = subprocess.Popen(
            command,
            env=environment(self.host.workspace.directory)
            | {"CNI_COMMAND": verb, "CNI_PATH": self.path, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdin is not None
        child.stdin.write(json.dumps(self.conf if conf is None else conf))
        child.stdin.close()
        child.stdin = None
        return child

    def call(
        self, verb: str, env: Mapping[str, str] | None = None, conf: Mapping[str, Any] | None = None
    ) -> Answer:
        return finished(self.start(verb, env or {}, conf))

    def gc(self, *valid: Container) -> Answer:
        """GC with the attachments `eth0` of these containers as the valid ones."""
        attachments = [{"containerID": container.name, "ifname": "eth0"} for container in valid]
        return self.call("GC", conf={**self.conf, "cni.dev/valid-attachments": attachments})

    def status(self) -> Answer:
        return self.call("STATUS")

    @property
    def states(self) -> list[str]:
        """Names of the files in dataDir, those with a dot included."""
        return sorted(path.name for path in self.data_dir.iterdir()) if self.data_dir.exists() else []

    @property
    def allocated(self) -> dict[str, tuple[str, ...]]:
        """Address → container and interface, as host-local keeps it."""
        return {
            path.name: tuple(path.read_text().split())
            for path in (self.ipam_dir / NAME).glob("*")
            if path.name[0].isdigit() or ":" in path.name
        }


class Container(Namespace):
    """A network namespace to be attached."""

    def __init__(self, runtime: Runtime, name: str) -> None:
        super().__init__(runtime.host.workspace, f"{runtime.host.name}-{name}")
        self.runtime = runtime
        self.name = name
        self.results: dict[str, dict[str, Any]] = {}
        """Interface → result of its ADD, which CHECK and DEL get as prevResult."""

    def env(self, ifname: str) -> dict[str, str]:
        return {"CNI_CONTAINERID": self.name, "CNI_IFNAME": ifname, "CNI_NETNS": self.path}

    def start_add(self, ifname: str = "eth0") -> subprocess.Popen[str]:
        return self.runtime.start("ADD", self.env(ifname))

    def add(self, ifname: str = "eth0") -> list[str]:
        """Attach it; its addresses, each with its prefix length."""
        result = finished(self.start_add(ifname)).result
        self.results[ifname] = result
        return addresses(result)

    def refused_add(self, ifname: str = "eth0") -> dict[str, Any]:
        """The error of an ADD that must fail."""
        return finished(self.start_add(ifname)).error

    def delete(self, ifname: str = "eth0") -> Answer:
        return self._later("DEL", ifname)

    def check(self, ifname: str = "eth0") -> Answer:
        return self._later("CHECK", ifname)

    def _later(self, verb: str, ifname: str) -> Answer:
        conf = self.runtime.conf
        if ifname in self.results:
            conf = {**conf, "prevResult": self.results[ifname]}
        return self.runtime.call(verb, self.env(ifname), conf)


def finished(child: subprocess.Popen[str]) -> Answer:
    """What the plugin did, once it has ended."""
    with child:
        stdout, stderr = child.communicate(timeout=ANSWER)
    return Answer(child.returncode, stdout, stderr)


def addresses(result: dict[str, Any]) -> list[str]:
    return [ip["address"] for ip in result["ips"]]
