"""A machine with a real systemd: a Debian of its own in systemd-nspawn, in the network of a lab's host."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from flanneld_py.lab import LabError, wait_for
from flanneld_py.lab.process import descendants

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from flanneld_py.lab import Host
    from flanneld_py.lab.workspace import Workspace

CHECKOUT = Path(__file__).parents[2]
SYSTEMD = CHECKOUT / "systemd"
BUILD = CHECKOUT / "build"
PACKAGES = ("systemd", "iproute2", "iptables", "nftables", "procps", "python3", "udev")
DPKG = ["force-unsafe-io", "path-exclude=/usr/share/doc/*", "path-exclude=/usr/share/locale/*"]
"""Half of the time, as nobody needs these files after a power failure."""
ALONE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--")
"""Prefixes a command whose death is that of all its processes; nspawn's machines outlive it otherwise."""
CONTROL_GROUPS = ("unshare", "--mount", "--cgroup", "sh", "-euc")
"""Prefixes a script that mounts them, so that it does not matter how this system has them. In a namespace of
their own, as a mount in the first one would set the options of all."""
MOUNT = """
mount -t tmpfs none /sys/fs/cgroup # the kernel refuses a file system where itself is mounted
mount -t cgroup2 none /sys/fs/cgroup
cd /sys/fs/cgroup
"""
ENTER = f"""{MOUNT}
mkdir "$1"
echo 0 >"$1/cgroup.procs"
shift
mount -t tmpfs none /run
cd /
exec "$@"
"""
"""Leaves no trace elsewhere, and two machines in one control group would kill each other's services."""
REMOVE = f"""{MOUNT}
[ ! -d "$1" ] || find "$1" -depth -type d -exec rmdir {{}} +
"""
MIRROR = "http://deb.debian.org/debian"
LEVELS = 3
"""Of process ids: this system's, those of `ALONE`, and the machine's own."""
UNIT = "flanneld-py.service"
SOURCE, PACKAGES_OF_PYTHON = "/opt/flanneld-py/source", "/opt/flanneld-py/packages"
LAUNCHER = """#!{python}
from flanneld_py.cli.daemon import main
main()
"""
INSTALLED = {
    UNIT: "/usr/local/lib/systemd/system",
    "10-flanneld-py.link": "/usr/local/lib/systemd/network",
    "10-flanneld-py.network": "/usr/local/lib/systemd/network",
    "networkd.conf": "/usr/local/lib/systemd/networkd.conf.d",
}
"""File of systemd/ → where it lies on a machine."""


def debian(workspace: Workspace) -> Path:
    """The root of a Debian like this one, with systemd; made once, kept in build/ for the runs that follow.

    Raises:
        CommandFailed: debootstrap failed.
    """
    release = _os_release()
    suite = release["VERSION_CODENAME"] if release.get("ID") == "debian" else "bookworm"
    recipe = "\n".join((suite, *PACKAGES, *DPKG))
    root = BUILD / f"debian-{suite}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    BUILD.mkdir(exist_ok=True)
    with _alone(BUILD):
        if not root.exists():
            unfinished = root.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            _debootstrap(workspace, suite, unfinished)
            unfinished.rename(root)
    return root


def _os_release() -> dict[str, str]:
    lines = Path("/etc/os-release").read_text().splitlines()
    return {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _debootstrap(workspace: Workspace, suite: str, root: Path) -> None:
    (root / "etc/dpkg/dpkg.cfg.d").mkdir(parents=True)
    (root / "etc/dpkg/dpkg.cfg.d/test").write_text("".join(f"{line}\n" for line in DPKG))
    command = [
        "debootstrap",
        "--variant=minbase",
        f"--include={','.join(PACKAGES)}",
        suite,
        str(root),
        MIRROR,
    ]
    # Mounts and processes of its own: whatever ends it, nothing stays.
    workspace.run([*ALONE, *command], timeout=280)


class Machine:
    """A booted systemd with flanneld-py installed, not started. What it changes on its disk ends with it."""

    def __init__(
        self, host: Host, root: Path, variables: Mapping[str, str], files: Mapping[str, str]
    ) -> None:
        """Switch it on in the network of `host`, whose run directory is its /run/flannel.

        Args:
            host: which no daemon of the lab runs on.
            root: of a Debian.
            variables: FLANNELD_… of its environment file, besides those that name etcd.
            files: path on the machine → text, in addition.
        """
        self._host = host
        self._directory = host.directory / "machine"
        self._directory.mkdir()
        python = Path(sys.executable).resolve()
        settings = {"FLANNELD_ETCD_ENDPOINTS": host.etcd.endpoint, "FLANNELD_ETCD_PREFIX": host.prefix}
        texts = {
            "/usr/local/bin/flanneld-py": LAUNCHER.format(python=python),
            "/etc/default/flanneld-py": _lines(settings | dict(variables)),
            f"/etc/systemd/system/{UNIT}.d/path.conf": (
                f"[Service]\nEnvironment=PYTHONPATH={SOURCE}:{PACKAGES_OF_PYTHON}\n"
            ),
            **files,
        }
        binds = {
            str(CHECKOUT / "flanneld_py"): f"{SOURCE}/flanneld_py",
            sysconfig.get_path("purelib"): PACKAGES_OF_PYTHON,
            **{str(SYSTEMD / name): f"{folder}/{name}" for name, folder in INSTALLED.items()},
            **{self._file(number, text): path for number, (path, text) in enumerate(texts.items())},
        }
        if sys.base_prefix != "/usr":  # not Debian's Python: it comes along
            binds |= {path: path for path in (str(python), f"{sys.base_prefix}/lib")}
        self._group = f"{host.workspace.directory.name}-{host.name}"
        nspawn = [
            "systemd-nspawn",
            "--quiet",
            "--register=no",
            "--keep-unit",
            "--link-journal=no",
            "--console=pipe",
            f"--machine={host.name}",
            f"--directory={root}",
            "--volatile=overlay",
            "--capability=CAP_NET_ADMIN,CAP_NET_RAW",
            f"--bind={host.run_directory}:/run/flannel",
            *(f"--bind-ro={there}:{here}" for there, here in binds.items()),
            "--boot",
        ]
        env = {"SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network", "SYSTEMD_NSPAWN_LOCK": "0"}  # /proc/sys/net
        enter = [*CONTROL_GROUPS, ENTER, "sh", self._group]
        self._process = host.spawn("machine", [*ALONE, *enter, *nspawn], env=env)
        self._init = 0

    def boot(self) -> None:
        """Wait until it is up."""
        wait_for(self._is_up, 30, f"{self._host.name} to boot")

    def _file(self, number: int, text: str) -> str:
        path = self._directory / str(number)
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def _is_up(self) -> bool:
        if not self._process.running:
            raise LabError(f"{self._host.name} did not boot: {self._process.output().strip()}")
        first = self._first_processes()
        if len(first) != 1:
            return False
        (self._init,) = first
        asked = self._ask(["systemctl", "is-system-running"])
        return asked.stdout.strip() in {"running", "degraded"}

    def _first_processes(self) -> list[int]:
        """Process 1 of the machine, as the host numbers it; none or several only at the very beginning."""
        return [pid for pid in descendants(self._process.pid) if _is_first(pid)]

    def _ask(self, argv: Sequence[str], timeout: float = 30) -> subprocess.CompletedProcess[str]:
        enter = [
            "nsenter",
            f"--target={self._init}",
            "--mount",
            "--uts",
            "--ipc",
            "--net",
            "--pid",
            "--cgroup",
        ]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
        return subprocess.run(
            [*enter, "--", *argv],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def run(self, *argv: str) -> str:
        """What a command on the machine prints; LabError if it fails."""
        done = self._ask(argv)
        if done.returncode:
            raise LabError(
                f"{' '.join(argv)}: {done.returncode}: {done.stdout}{done.stderr}\n{self.journal()}"
            )
        return done.stdout

    def path(self, path: str) -> Path:
        """A file of the machine's."""
        return Path(f"/proc/{self._init}/root{path}")

    def show(self, name: str, unit: str = UNIT) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def journal(self, unit: str = UNIT) -> str:
        """What a unit and systemd said about it."""
        return self._ask(["journalctl", "--unit", unit, "--output=cat", "--no-pager"]).stdout

    def wait_state(self, state: str, timeout: float = 20) -> None:
        """Until flanneld-py is in this ActiveState."""
        try:
            wait_for(lambda: self.show("ActiveState"), timeout, f"{UNIT} to be {state}", lambda s: s == state)
        except LabError as late:
            raise LabError(f"{late}\n{self.journal()}") from None

    def start(self) -> None:
        """Start flanneld-py and wait until it is ready."""
        self.run("systemctl", "start", UNIT)

    def close(self) -> None:
        """Power off at once."""
        self._host.discard(self._process)
        # Whoever was in it is about to be reaped.
        wait_for(self._group_removed, 10, f"the control group {self._group} to be empty")

    def _group_removed(self) -> bool:
        argv = [*CONTROL_GROUPS, REMOVE, "sh", self._group]
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0


@contextmanager
def machine(
    host: Host, root: Path, variables: Mapping[str, str] | None = None, files: Mapping[str, str] | None = None
) -> Iterator[Machine]:
    """A `Machine`, powered off at the end."""
    booted = Machine(host, root, variables or {}, files or {})
    try:
        booted.boot()
        yield booted
    finally:
        booted.close()


def _is_first(pid: int) -> bool:
    with suppress(OSError):  # it ended while we looked
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return line.split()[LEVELS:] == ["1"]
    return False


def _lines(variables: Mapping[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in variables.items())
