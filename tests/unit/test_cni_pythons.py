"""cni/flannel on each Python that is here, and on one that lacks the modules it takes its shortcuts by."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cni_calls import DUAL, PLUGIN, Setting

COMPILE = PLUGIN.parents[1] / ".ci" / "compile-plugin"
SUPPORTED = ("python3.11", "python3.12", "python3.13", "python3.14")
AS_MAIN = f"exec(compile(open({str(PLUGIN)!r}).read(), 'flannel', 'exec'))"
# Each takes away, or changes, what the plugin uses and the language does not promise. `json` keeps what it
# had when it was imported, as it would fit a `_json` of other parameters.
LACKING = {
    "nothing": "pass",
    "_json": "sys.modules['_json'] = None",
    "_json's scanner": "import _json; del _json.make_scanner",
    "_json's encoder": "import _json; del _json.make_encoder",
    "_json's quoting": "import _json; del _json.encode_basestring_ascii",
    "an encoder of these parameters": "import json, _json; _json.make_encoder = lambda **_: None",
    "a scanner of these settings": "import json, _json; _json.make_scanner = lambda context: context.missing",
    "a scanner called so": "import json, _json; _json.make_scanner = lambda context: lambda text: None",
    "_socket": "import socket; sys.modules['_socket'] = None",
}


def interpreters() -> list[str]:
    """Ours, and others of SUPPORTED that start; a name in $PATH may be one of a Python that is not there."""
    found = [sys.executable]
    for name in SUPPORTED:
        path = shutil.which(name)
        if path is None or name == f"python3.{sys.version_info.minor}":
            continue
        if not subprocess.run(
            [path, "-IS", "-c", ""], capture_output=True, check=False, timeout=30
        ).returncode:
            found.append(path)
    return found


def a_life(setting: Setting) -> None:
    """All verbs, and an error of each kind of cause: JSON, addresses, the system."""
    setting.install("host-local", "#!/bin/sh\n")
    setting.subnet_file.write_text(DUAL)
    setting.conf |= {"cniVersion": "1.1.0", "args": {"ü": [1.5, None, True, '"\\\n\u2028']}}
    setting.succeed("ADD")
    added = setting.calls[-1].config
    assert added["args"] == setting.conf["args"]
    assert added["ipam"]["ranges"] == [[{"subnet": "10.1.17.0/24"}], [{"subnet": "fc00::/64"}]]
    setting.succeed("CHECK")
    setting.succeed("STATUS")
    setting.conf["cni.dev/valid-attachments"] = [{"containerID": "c1", "ifname": "eth0"}]
    setting.succeed("GC")
    setting.succeed("DEL")
    assert setting.states == {}
    assert setting.fail("ADD", stdin='{"name": "a"')["code"] == 6
    assert setting.fail("ADD", stdin='{"name": NaN}')["code"] == 6
    assert setting.fail("ADD", stdin="[" * 200_000)["code"] == 6
    setting.subnet_file.write_text(DUAL.replace("fc00::1/64", "fc00::g/64"))
    assert "invalid CIDR address: fc00::g/64" in setting.fail("ADD")["details"]
    setting.subnet_file.unlink()
    assert "no daemon has told its status" in setting.fail("ADD")["msg"]
    problem = {"reason": "etcd x: gone", "since": "2026-01-01T00:00:00.5Z"}
    status = {"state": "waiting", "pid": 1, "problems": [problem]}
    (setting.folder / "status.json").write_text(json.dumps(status))
    assert "waiting for etcd x: gone, for " in setting.fail("ADD")["msg"]


@pytest.mark.parametrize("python", interpreters(), ids=lambda path: Path(path).name)
def test_each_python_does_the_same(tmp_path: Path, python: str) -> None:
    setting = Setting(tmp_path)
    setting.command = [python, "-IS", "-W", "error", str(PLUGIN)]
    a_life(setting)


@pytest.mark.parametrize("missing", LACKING.values(), ids=LACKING)
def test_without_a_shortcut_it_does_the_same(tmp_path: Path, missing: str) -> None:
    setting = Setting(tmp_path)
    setting.command = [sys.executable, "-IS", "-c", f"import sys; {missing}\n{AS_MAIN}"]
    a_life(setting)


def installed(setting: Setting, was: str, becomes: str) -> str:
    """The plugin as `make install` puts it, with one thing changed."""
    argv = [sys.executable, "-IS", os.fspath(COMPILE), sys.executable]
    made = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30).stdout
    assert made.startswith(f"#!{sys.executable} -IS\n")
    assert f"\nTEXT = r'''{PLUGIN.read_text()}'''\n" in made
    assert made.count(was) == 1
    setting.install("flannel", made.replace(was, becomes))
    return str(setting.plugins / "flannel")


def test_installed_it_is_compiled_already(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.command = [installed(setting, "\nTEXT = r'''", "\nTEXT = '''raise SystemExit\n")]
    a_life(setting)


def test_installed_it_serves_another_python_too(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.command = [
        installed(setting, f'cache_tag == "{sys.implementation.cache_tag}"', 'cache_tag == "other"')
    ]
    a_life(setting)


def test_the_shortcuts_are_taken(tmp_path: Path) -> None:
    """What they are there for: the slow modules stay out of an ADD."""
    setting = Setting(tmp_path)
    setting.data_dir.mkdir()
    slow = ["json", "os", "socket", "ipaddress", "subprocess", "typing", "signal", "datetime"]
    setting.command = [sys.executable, "-IS", "-v", str(PLUGIN)]
    done = setting.run("ADD")
    assert done.returncode == 0
    assert "import '_socket'" in done.stderr
    assert [name for name in slow if f"import '{name}' " in done.stderr] == []
