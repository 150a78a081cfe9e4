"""cni/flannel as a module, and called as a runtime calls it, with a delegate that notes what it is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

PLUGIN = Path(__file__).parents[2] / "cni" / "flannel"
IPV4 = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
IPV6 = (
    "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00::1/64\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
)
DUAL = IPV4 + IPV6
DELEGATE = r"""#!/bin/sh
# Notes each call in $NOTES; does as $NOTES/do-VERB says, else as a plugin that is content.
n=$(ls "$NOTES" | grep -c '^call-')
cat >"$NOTES/stdin"
printf '%s %s %s %s\n' "$CNI_COMMAND" "$CNI_CONTAINERID" "$CNI_IFNAME" "$CNI_NETNS" >"$NOTES/env"
cat "$NOTES/env" "$NOTES/stdin" >"$NOTES/call-$n"
if [ -e "$NOTES/do-$CNI_COMMAND" ]; then . "$NOTES/do-$CNI_COMMAND"; fi
case $CNI_COMMAND in
    ADD) echo '{"cniVersion":"1.0.0","ips":[{"address":"10.1.17.2/24"}]}' ;;
    VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["0.4.0","1.0.0","1.1.0"]}' ;;
esac
"""
REFUSE = """echo '{"cniVersion":"1.0.0","code":111,"msg":"no","details":"really"}'; exit 1"""
"""For Setting.do."""
REFUSAL = {"code": 111, "msg": "no", "details": "really"}


def load() -> Any:
    """The plugin's functions."""
    loader = SourceFileLoader("cni_flannel", str(PLUGIN))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    writes = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # no __pycache__ in cni/, which is a folder that people copy
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
    return module


@dataclass(frozen=True)
class Call:
    """One call that the delegate got."""

    verb: str
    container: str
    ifname: str
    netns: str
    config: dict[str, Any]


@dataclass
class Setting:
    """A folder with subnet.env, plugins, state, and the notes of the delegate "noter"."""

    folder: Path
    conf: dict[str, Any] = field(default_factory=dict)
    lease: str | None = IPV4

    def __post_init__(self) -> None:
        self.notes, self.plugins = self.folder / "notes", self.folder / "plugins"
        for folder in (self.notes, self.plugins):
            folder.mkdir()
        self.install("noter", DELEGATE)
        self.data_dir = self.folder / "state"
        self.subnet_file = self.folder / "subnet.env"
        if self.lease is not None:
            self.subnet_file.write_text(self.lease)
        self.command = [str(PLUGIN)]
        """What is run as the plugin."""
        self.conf = {
            "cniVersion": "1.0.0",
            "name": "cni-flannel",
            "type": "flannel",
            "subnetFile": str(self.subnet_file),
            "dataDir": str(self.data_dir),
            "delegate": {"type": "noter"},
            "waitSeconds": 0,
            **self.conf,
        }

    def install(self, name: str, text: str) -> None:
        """A plugin of this name in $CNI_PATH."""
        (self.plugins / name).write_text(text)
        (self.plugins / name).chmod(0o755)

    def do(self, verb: str, shell: str) -> None:
        """What the delegate does from now on when it gets this verb."""
        (self.notes / f"do-{verb}").write_text(f"{shell}\n")

    def env(self, verb: str, container: str = "c1", ifname: str = "eth0", **more: str) -> dict[str, str]:
        """What a runtime's call has in its environment; nothing that is empty."""
        variables = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": container,
            "CNI_IFNAME": ifname,
            "CNI_NETNS": "/run/netns/no-such",
            "CNI_PATH": f"/nonexistent:{self.plugins}",
            "NOTES": str(self.notes),
            "PATH": os.environ.get("PATH", os.defpath),
            **more,
        }
        return {name: value for name, value in variables.items() if value}

    def run(
        self, verb: str, container: str = "c1", ifname: str = "eth0", stdin: str | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command,
            input=json.dumps(self.conf) if stdin is None else stdin,
            env=self.env(verb, container, ifname, **env),
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    def succeed(self, verb: str, container: str = "c1", ifname: str = "eth0", **env: str) -> str:
        """What a call prints that must succeed, without a word on stderr."""
        done = self.run(verb, container, ifname, **env)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def fail(self, verb: str, container: str = "c1", ifname: str = "eth0", **more: Any) -> dict[str, Any]:
        """The error object of a call that must fail."""
        done = self.run(verb, container, ifname, **more)
        assert done.returncode == 1, done
        error: dict[str, Any] = json.loads(done.stdout)
        return error

    @property
    def calls(self) -> list[Call]:
        """What the delegate got so far, in order."""
        found = []
        for number in range(len(list(self.notes.glob("call-*")))):
            first, _, stdin = (self.notes / f"call-{number}").read_text().partition("\n")
            verb, container, ifname, netns = first.split(" ")
            found.append(Call(verb, container, ifname, netns, json.loads(stdin)))
        return found

    @property
    def verbs(self) -> list[str]:
        return [call.verb for call in self.calls]

    @property
    def states(self) -> dict[str, Any]:
        """Name → content of each file in dataDir, those with a dot included."""
        if not self.data_dir.exists():
            return {}
        return {path.name: json.loads(path.read_text()) for path in sorted(self.data_dir.iterdir())}
