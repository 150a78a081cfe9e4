"""`make install` and `make uninstall`: what lies where, that it runs, that nothing else is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.netns.scenes import config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanneld_py.lab import Lab

ROOT = Path(__file__).parents[2]
PACKAGES = "usr/lib/flanneld-py/python3."
FILES = {
    "etc/NetworkManager/conf.d/10-flanneld-py.conf": 0o644,
    "etc/default/flanneld-py": 0o640,
    "opt/cni/bin/flannel": 0o755,
    "usr/bin/flannelctl": 0o755,
    "usr/bin/flanneld-py": 0o755,
    "usr/bin/mk-docker-opts.sh": 0o755,
    "usr/lib/flanneld-py/installed": 0o644,
    "usr/lib/systemd/network/10-flanneld-py.link": 0o644,
    "usr/lib/systemd/network/10-flanneld-py.network": 0o644,
    "usr/lib/systemd/networkd.conf.d/10-flanneld-py.conf": 0o644,
    "usr/lib/systemd/system/flanneld-py.service": 0o644,
    "usr/share/flanneld-py/docker.service.d/flannel.conf": 0o644,
    "usr/share/flanneld-py/supervisor/flanneld-py.conf": 0o644,
    "usr/share/flanneld-py/supervisor/flanneld-py.sh": 0o755,
}
"""Path → mode, beside the packages."""
GO_PLUGIN = "opt/cni/bin/flannel"
SETTINGS = "etc/default/flanneld-py"
EXTENSION = "flanneld_py/udp/_pump.abi3.so"
QUICK = {"PIP_NO_DEPS": "1"}
"""For pip, where it does not matter whether the commands would run."""
BARE = {"PATH": "/usr/bin:/bin", "PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere"}
"""As a service may be started, and with what must not lead Python astray."""


@dataclass(frozen=True)
class Installed:
    """A DESTDIR."""

    root: Path
    said: list[str]
    """By make, in order."""

    def make(self, target: str, **more: str) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | more
        argv = [
            "make",
            "--no-print-directory",
            "-C",
            str(ROOT),
            target,
            f"DESTDIR={self.root}",
            "PREFIX=/usr",
        ]
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        self.said.extend(done.stdout.splitlines())

    def files(self) -> dict[str, int]:
        """Path → mode, without the packages and what is not a file."""
        found = (path for path in self.root.rglob("*") if not path.is_dir())
        paths = {str(path.relative_to(self.root)): path.lstat().st_mode & 0o7777 for path in found}
        return {path: mode for path, mode in paths.items() if not path.startswith(PACKAGES)}

    def run(self, command: str, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        argv = [str(self.root / command), *args]
        done = subprocess.run(argv, env=BARE, cwd="/", capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done

    @property
    def packages(self) -> Path:
        (found,) = self.root.glob(f"{PACKAGES}*")
        return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """Where Go flannel's plugin was before."""
    root = tmp_path_factory.mktemp("destdir")
    plugin = root / GO_PLUGIN
    plugin.parent.mkdir(parents=True)
    plugin.write_text("Go's\n")
    there = Installed(root, [])
    there.make("install")
    yield there
    shutil.rmtree(root)


def test_every_file_is_where_it_is_said_to_be(installed: Installed) -> None:
    assert installed.files() == FILES | {f"{GO_PLUGIN}.before-flanneld-py": 0o644}
    assert (
        f"==> {installed.root}/{GO_PLUGIN} was there before; it is put aside as flannel.before-flanneld-py"
        in (installed.said)
    )
    assert {path.name for path in installed.packages.iterdir()} >= {"flanneld_py", "grpc", "etcd3", "click"}
    assert (installed.packages / EXTENSION).exists()
    assert not any("udp" in line for line in installed.said)


def test_nothing_is_left_out(installed: Installed) -> None:
    texts = [(installed.root / name).read_text() for name in FILES]
    for folder in ("cni", "supervisor", "systemd"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                text = path.read_text().replace("/usr/local/bin/", "/usr/bin/")
                text = text.replace("/usr/local/share/", "/usr/share/")
                # The CNI plugin has its compiled self around it.
                assert any(text in one if path.parent.name == "cni" else text == one for one in texts), path


def test_no_file_speaks_of_another_place(installed: Installed) -> None:
    for name in FILES:
        text = (installed.root / name).read_text()
        assert "/usr/local/" not in text, name
        assert str(installed.root) not in text, name
    for compiled in installed.packages.glob("flanneld_py/cli/__pycache__/*.pyc"):
        assert str(installed.root).encode() not in compiled.read_bytes()


def test_the_commands_run_from_where_they_lie(installed: Installed) -> None:
    version = installed.run("usr/bin/flannelctl", "--version").stdout.split()[1]
    assert version in installed.run("usr/bin/flanneld-py", "--version").stderr
    env, output = installed.root / "subnet.env", installed.root / "docker.env"
    env.write_text("FLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n")
    written = []
    for command in (("usr/bin/flannelctl", "docker-opts"), ("usr/bin/mk-docker-opts.sh",)):
        installed.run(*command, "-f", str(env), "-d", str(output))
        written.append(output.read_text())
        output.unlink()
    env.unlink()
    assert written[0] == written[1]
    assert 'DOCKER_OPTS=" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"\n' in written[0]
    assert installed.run("usr/bin/flannelctl", "wait-ready", "--timeout=tea", code=2).stdout == ""
    # Running has compiled nothing anew, which a read-only /usr would not take.
    assert not list(installed.root.rglob("*.new-flanneld-py"))


def test_a_link_to_a_command_finds_the_packages(installed: Installed, tmp_path: Path) -> None:
    link = tmp_path / "flannelctl"
    link.symlink_to(installed.root / "usr/bin/flannelctl")
    assert subprocess.run([str(link), "--version"], env=BARE, check=True, capture_output=True).stdout


def test_the_cni_plugin_runs(installed: Installed) -> None:
    plugin = installed.root / GO_PLUGIN
    done = subprocess.run([str(plugin)], env={"CNI_COMMAND": "VERSION"}, capture_output=True, check=True)
    assert "1.0.0" in json.loads(done.stdout)["supportedVersions"]


def test_the_daemon_serves_a_host(lab: Lab, installed: Installed) -> None:
    lab.etcd.put_config(config("vxlan"))
    host = lab.add_host("alpha")
    daemon = host.spawn("installed", [str(installed.root / "usr/bin/flanneld-py"), *host.flags], env=BARE)
    where = (f"--subnet-file={host.subnet_file}", f"--etcd-prefix={host.prefix}")
    ready = installed.run("usr/bin/flannelctl", *where, "wait-ready", "--timeout=20s")
    assert ready.stdout.startswith("ready: 10.5.")
    assert host.subnet_env()["FLANNEL_NETWORK"] == "10.5.0.0/16"
    assert [route["dst"] for route in host.ip("route", "show", "proto", "96")] == []
    assert host.ip("link", "show", "flannel.1")
    assert daemon.terminate() == 0


@pytest.mark.parametrize(("command", "code"), [("flanneld-py", 78), ("flannelctl", 1)])
def test_another_python_after_an_upgrade_of_the_system(installed: Installed, command: str, code: int) -> None:
    packages = installed.packages
    elsewhere = packages.rename(packages.with_name("python3.0"))
    try:
        said = installed.run(f"usr/bin/{command}", "--version", code=code).stderr
    finally:
        elsewhere.rename(packages)
    assert said == (
        f"{command}: no {packages}: this system's Python is another one than at the installation; "
        "run `make install` again\n"
    )


@pytest.mark.parametrize(
    "script",
    [".ci/install", ".ci/phase", ".ci/prepare", "systemd/mk-docker-opts.sh", "supervisor/flanneld-py.sh"],
)
def test_shell_scripts_are_in_order(script: str) -> None:
    done = subprocess.run(["shellcheck", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_cannot_be_installed_says_why(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    cases = {
        ("install", f"PYTHON={old}"): f"Python 3.11 or newer is needed; {old} is none.",
        (
            "install",
            "PREFIX=usr",
        ): "usr: PREFIX, CNIBINDIR and DESTDIR are expected to begin with",
        ("uninstall", "PREFIX=/usr"): f"{tmp_path}/usr/lib/flanneld-py/installed is not there: nothing was",
    }
    for (target, setting), said in cases.items():
        name, _, value = setting.partition("=")
        environ = {"PATH": os.environ["PATH"], "DESTDIR": str(tmp_path), name: value}
        done = subprocess.run(
            [ROOT / ".ci/install", target], env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert done.stderr.startswith(said)
    assert list(tmp_path.iterdir()) == [old]


def test_what_broke_off_can_be_taken_away(tmp_path: Path) -> None:
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt/cni").touch()
    before = sorted(tmp_path.rglob("*"))
    broken = Installed(tmp_path, [])
    with pytest.raises(AssertionError, match="opt/cni"):
        broken.make("install", **QUICK)
    assert (tmp_path / "usr/bin/flannelctl").exists()
    broken.make("uninstall")
    assert sorted(tmp_path.rglob("*")) == before


def test_again_and_away(installed: Installed) -> None:
    """The last one: it removes what the others look at."""
    before = installed.files()
    settings, unit = installed.root / SETTINGS, installed.root / "usr/lib/systemd/system/flanneld-py.service"
    default = settings.read_text()
    settings.write_text("FLANNELD_IFACE=eth7\n")
    unit.write_text("of an older version\n")
    stale = installed.root / "usr/bin/flannel-of-an-older-version"
    stale.touch()
    listing = installed.root / "usr/lib/flanneld-py/installed"
    listing.write_text(f"{listing.read_text()}file 0 /usr/bin/{stale.name}\n")

    installed.make("install", **QUICK, CC="false")

    assert any("backend udp will run in Python, slower" in line for line in installed.said)
    assert not (installed.packages / EXTENSION).exists()
    assert installed.files() == before | {f"{SETTINGS}.dist": 0o640}
    assert settings.read_text() == "FLANNELD_IFACE=eth7\n"
    assert Path(f"{settings}.dist").read_text() == default
    assert "ExecStart=/usr/bin/flanneld-py" in unit.read_text()
    assert re.search(
        r"flanneld-py is as you changed it; the new default is .* flanneld-py\.dist", installed.said[-2]
    )

    drop_in = installed.root / "etc/systemd/system/docker.service.d/flannel.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.touch()
    installed.make("uninstall")

    # Copied by hand, and without our programs Docker would not start.
    assert (
        installed.said[-1]
        == f"==> made by hand, and yours to remove (docs/installation.md, Removal): {drop_in}"
    )
    shutil.rmtree(installed.root / "etc/systemd")
    assert installed.files() == {SETTINGS: 0o640, GO_PLUGIN: 0o644}
    assert (installed.root / GO_PLUGIN).read_text() == "Go's\n"
    left = {str(path.relative_to(installed.root)) for path in installed.root.rglob("*") if path.is_dir()}
    assert left == {"etc", "etc/default", "opt", "opt/cni", "opt/cni/bin"}
    assert f"==> {settings} stays: it was changed" in installed.said
