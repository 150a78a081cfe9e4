"""Real containers: podman with the CNI backend on hosts of the lab, each like a machine of its own."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flanneld_py.lab.process import DIE_WITH_PARENT, descendants, environment, search_path
from flanneld_py.lab.waiting import wait_for
from tests.netns.cni import DEBIAN, FLANNEL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from flanneld_py.lab import Host

NETWORK = "flannel"
IMAGE = "localhost/lab:1"
PAGE = "a page\n"
DOWNLOAD = """#!/bin/sh
# Numbered lines of 500 digits, one every 10 ms, until somebody makes /data/stop; the last line is `end`.
printf 'Content-Type: text/plain\\r\\n\\r\\n'
n=0
while [ ! -e /data/stop ]; do n=$((n + 1)); printf '%0500d\\n' $n; usleep 10000; done
echo end
"""
WHO = """#!/bin/sh
# The address that this server is asked from.
printf 'Content-Type: text/plain\\r\\n\\r\\n%s\\n' "$REMOTE_ADDR"
"""
WEB = {"index.html": PAGE, "cgi-bin/download": DOWNLOAD, "cgi-bin/who": WHO}
FILES = {
    "etc/passwd": "root:x:0:0:root:/:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    **{f"www/{name}": text for name, text in WEB.items()},
}
HTTPD = ("httpd", "-f", "-p", "0.0.0.0:80", "-h")
"""Of busybox; its folder follows. Without an address it would be asked from IPv4-mapped ones."""
CONTAINERS_CONF = """
[containers]
cgroups = "disabled"
# What the kernel refuses without CAP_SYS_RESOURCE is not asked for.
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
[network]
network_backend = "cni"
cni_plugin_dirs = ["{plugins}", "{debian}"]
network_config_dir = "{networks}"
"""
STORAGE_CONF = """
[storage]
driver = "vfs"
graphroot = "/var/lib/containers/storage"
runroot = "/run/containers/storage"
"""


def pack_image(path: Path, commands: Sequence[str] = (), files: Mapping[str, str] = FILES) -> Path:
    """A root file system as a tar: busybox with all its names, and commands of this machine."""
    busybox = _command("busybox")
    programs = {"bin/busybox": busybox} | {f"bin/{name}": _command(name) for name in commands}
    libraries = {name.lstrip("/"): name for program in programs.values() for name in _libraries(program)}
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    with tarfile.open(path, "w") as tar:
        for folder in ("bin", "etc", "tmp", "proc", "sys", "dev", "data"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name, source in (programs | libraries).items():
            tar.add(os.path.realpath(source), name)
        for name in {f"bin/{applet}" for applet in listed} - programs.keys():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text.encode()), 0o755 if text.startswith("#!") else 0o644
            tar.addfile(entry, io.BytesIO(text.encode()))
    return path


def _command(name: str) -> str:
    found = shutil.which(name, path=search_path())
    assert found is not None, f"{name} is not installed"
    return found


def _libraries(file: str) -> list[str]:
    """What the dynamic loader would open, and itself."""
    done = subprocess.run(["ldd", file], capture_output=True, text=True, check=False)
    return re.findall(r"(?:=> |^\s*)(/\S+) \(", done.stdout, re.MULTILINE) if done.returncode == 0 else []


class Machine:
    """A host with podman, in pid and mount namespaces, so that nothing is left of it."""

    def __init__(self, host: Host, **delegate: Any) -> None:
        """Set podman up, with a network: cni/flannel with these options of its delegate, and portmap."""
        self.host = host
        self.folder = host.directory / "podman"
        self.networks = self.folder / "net.d"
        self.networks.mkdir(parents=True)
        plugins = [
            {
                "type": "flannel",
                "subnetFile": str(host.subnet_file),
                "delegate": {"isDefaultGateway": True, "hairpinMode": True, **delegate},
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ]
        conflist = {"cniVersion": "1.0.0", "name": NETWORK, "plugins": plugins}
        (self.networks / "10-flannel.conflist").write_text(json.dumps(conflist))
        conf = CONTAINERS_CONF.format(plugins=FLANNEL.parent, debian=DEBIAN, networks=self.networks)
        (self.folder / "containers.conf").write_text(conf)
        (self.folder / "storage.conf").write_text(STORAGE_CONF)
        self._holder = host.workspace.spawn(
            f"{host.name}-machine",
            ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "sleep", "infinity"],
        )
        first = wait_for(lambda: descendants(self._holder.pid)[1:], 5, f"the first process of {host.name}")
        self._init = first[0]
        wait_for(Path(f"/proc/{self._init}/root/proc/1/stat").exists, 5, "its /proc")
        self.run(["mount", "-t", "sysfs", "sysfs", "/sys"])  # that of the host's network namespace
        # Containers without cgroups: there is nothing to limit, and nothing to leave behind.
        self.run(["mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"])
        # What podman and the plugins write at its usual places.
        for place in ("var/lib", "var/tmp", "run"):
            (self.folder / place).mkdir(parents=True)
        for place in ("var", "run"):
            self.run(["mount", "--bind", str(self.folder / place), f"/{place}"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.host.workspace.discard(self._holder)

    def entered(self, argv: Sequence[str]) -> list[str]:
        target = ["--target", str(self._init), "--pid", "--mount"]
        return ["nsenter", f"--net={self.host.path}", *target, "--", *argv]

    def run(self, argv: Sequence[str], timeout: float = 60) -> str:
        """A command's output, in all namespaces of the machine; raises CommandFailed."""
        return self.host.workspace.run(self.entered(argv), env=self._env, timeout=timeout)

    def start(self, argv: Sequence[str]) -> subprocess.Popen[str]:
        """A command in the background, its output in pipes."""
        env = environment(self.host.workspace.directory, self._env)
        command = [*DIE_WITH_PARENT, *self.entered(argv)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @property
    def _env(self) -> dict[str, str]:
        return {
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
        }

    def podman(self, *args: str) -> str:
        return self.run(["podman", *args]).strip()

    def launch(
        self,
        name: str,
        *command: str,
        port: int | None = None,
        options: Sequence[str] = (),
        image: str = IMAGE,
    ) -> str:
        """Start a container on the overlay and wait until it listens at this TCP port; its address."""
        self.podman("run", "--detach", f"--name={name}", f"--network={NETWORK}", *options, image, *command)
        if port is not None:
            listening = partial(self.inside, name, "netstat", "-ltn")
            wait_for(listening, 10, f"{name} to listen", lambda seen: f":{port} " in seen)
        return self.address(name)

    def address(self, name: str) -> str:
        """Of a container."""
        template = f"{{{{.NetworkSettings.Networks.{NETWORK}.IPAddress}}}}"
        return self.podman("inspect", "--format", template, name)

    def inside(self, name: str, *command: str) -> str:
        """Output of a command in a container."""
        return self.podman("exec", name, *command)

    def fetch(self, name: str, url: str) -> str:
        """What a container downloads; CommandFailed when it takes 10 s."""
        return self.inside(name, "timeout", "10", "wget", "-qO-", url)

    def answered(self, name: str, path: str) -> list[int]:
        """Sequence numbers in the output of a ping."""
        return [int(number) for number in re.findall(r"seq=(\d+)", self.inside(name, "cat", path))]

    @property
    def allocated(self) -> list[str]:
        """Addresses that host-local has given away."""
        folder = self.folder / "var/lib/cni/networks" / NETWORK
        return sorted(path.name for path in folder.glob("[0-9]*"))

    @property
    def states(self) -> list[str]:
        """Files of cni/flannel."""
        folder = self.folder / "var/lib/cni/flannel"
        return sorted(path.name for path in folder.iterdir() if stat.S_ISREG(path.stat().st_mode))
