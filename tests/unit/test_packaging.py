"""What an installed flanneld-py promises: commands, one version, nothing left out, no scapy."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import flanneld_py
from flanneld_py.lab.requirements import obstacle

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "flanneld_py"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

IMPORT_ALL_BUT_LAB = """
import importlib, pkgutil, sys
import flanneld_py
for module in pkgutil.walk_packages(flanneld_py.__path__, "flanneld_py."):
    if not (module.name + ".").startswith("flanneld_py.lab.") and not module.name.endswith(".__main__"):
        importlib.import_module(module.name)
print(*sys.modules)
"""


def makefile_targets() -> dict[str, str]:
    """Each target's name and its line in `make help`, "" for those not listed."""
    rules = re.findall(r"^([a-z][a-z-]*):(?!=)(?:.*?## (.*))?", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return dict(rules)


def readme_make_commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = (line.split("#")[0].strip() for block in blocks for line in block.splitlines())
    return [line.removeprefix("sudo ") for line in lines if line.removeprefix("sudo ").startswith("make")]


@pytest.mark.parametrize("name", PYPROJECT["project"]["scripts"])
def test_entry_point_is_callable(name: str) -> None:
    (entry,) = metadata.entry_points(group="console_scripts", name=name)
    assert callable(entry.load())


def test_scapy_stays_out_of_daemon_and_ctl() -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL_BUT_LAB], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr
    loaded = result.stdout.split()
    assert "flanneld_py.model" in loaded
    assert "scapy" not in loaded


def test_scapy_is_no_dependency_of_a_plain_install() -> None:
    names = [name for name in metadata.requires("flanneld-py") or [] if "extra ==" not in name]
    assert any(name.startswith("etcd3") for name in names)
    assert not any(name.startswith("scapy") for name in names)


def test_version_stands_in_one_place() -> None:
    assert metadata.version("flanneld-py") == flanneld_py.__version__
    assert "version" not in PYPROJECT["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{flanneld_py.__version__}]" in changelog


def test_every_file_is_in_the_wheel() -> None:
    """Setuptools passes over folders without __init__.py, and over data files nobody named.

    Nobody names the extension: it is built for the wheel, and one that lies here may be of another version.
    """
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["flanneld_py"]
    data = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert PACKAGE / "py.typed" in data
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in files if path.suffix != ".py"} - set(PACKAGE.rglob("*.so")) == data
    folders = {folder for path in files for folder in path.parents if folder.is_relative_to(PACKAGE)}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_readme_names_real_make_targets() -> None:
    commands = readme_make_commands()
    assert "make demo" in commands
    words = {word for command in commands for word in command.split()[1:]}
    targets = {word for word in words if "=" not in word and not word.startswith("-")}
    assert targets <= makefile_targets().keys()


def test_make_installs_what_the_lab_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_args, **_kwargs: None)
    asked = obstacle(["nft", "strace", "tcpdump", "iperf3"]) or ""
    packages = set(asked.partition("apt-get install ")[2].split())
    assert {"iproute2", "iperf3"} <= packages
    assert packages <= set(re.findall(r"\w=([\w-]+)", (ROOT / "Makefile").read_text()))


def test_make_help_lists_what_people_run() -> None:
    listed = {name for name, line in makefile_targets().items() if line}
    assert listed == {
        "help",
        "demo",
        "test",
        "check",
        "fuzz",
        "day",
        "sanitize",
        "chaos",
        "reliability",
        "bench",
        "docs",
        "install",
        "uninstall",
        "fmt",
        "clean",
    }
    shown = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    assert all(f"make {name}" in shown for name in listed)
