"""CHECK, GC and STATUS of cni/flannel: what the delegate is asked, and what becomes of dataDir."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.cni_calls import REFUSAL, REFUSE, Setting


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def test_check_is_passed_on_with_the_previous_result(setting: Setting) -> None:
    setting.succeed("ADD")
    ips = [
        {"address": "10.1.17.2/24", "gateway": "10.1.17.1"},
        {"address": "fc00::2/64", "gateway": "fc00::1"},
    ]
    routes = [{"dst": "10.1.0.0/16"}, {"dst": "fc00::/48"}, {"dst": "0.0.0.0/0", "gw": "10.1.17.9"}]
    setting.conf["prevResult"] = {"cniVersion": "1.0.0", "ips": ips, "routes": routes}
    assert setting.succeed("CHECK") == ""
    config = setting.calls[1].config
    assert config["prevResult"]["ips"] == ips
    assert [route["gw"] for route in config.pop("prevResult")["routes"]] == [
        "10.1.17.1",
        "fc00::1",
        "10.1.17.9",
    ]
    assert config == setting.calls[0].config
    setting.do("CHECK", REFUSE)
    assert setting.fail("CHECK") == REFUSAL


def test_check_of_a_stranger_is_code_3(setting: Setting) -> None:
    assert setting.fail("CHECK")["code"] == 3
    assert setting.calls == []


def gc(setting: Setting, *valid: tuple[str, str]) -> Setting:
    attachments = [{"containerID": container, "ifname": ifname} for container, ifname in valid]
    setting.conf |= {"cniVersion": "1.1.0", "cni.dev/valid-attachments": attachments}
    return setting


def test_gc_detaches_what_is_no_longer_valid(setting: Setting) -> None:
    setting.succeed("ADD")
    setting.succeed("ADD", ifname="net1")
    setting.succeed("ADD", container="c2")
    other = {"name": "other", "type": "noter"}
    (setting.data_dir / "c9").write_text(json.dumps(other))
    assert gc(setting, ("c1", "net1")).succeed("GC", container="", ifname="", CNI_NETNS="") == ""
    assert list(setting.states) == ["c1@net1", "c9"]
    (forwarded,) = [call for call in setting.calls if call.verb == "GC"]
    assert forwarded.config["cni.dev/valid-attachments"] == setting.conf["cni.dev/valid-attachments"]
    assert [(call.container, call.ifname, call.netns) for call in setting.calls if call.verb == "DEL"] == [
        ("c1", "eth0", ""),
        ("c2", "eth0", ""),
    ]


def test_gc_removes_nothing_that_the_delegate_did_not(setting: Setting) -> None:
    setting.succeed("ADD")
    setting.succeed("ADD", container="c2")
    setting.do("DEL", f'if [ "$CNI_CONTAINERID" = c1 ]; then {REFUSE}; fi')
    error = gc(setting).fail("GC")
    assert error["msg"] == f"not all could be collected: {setting.data_dir}/c1: no"
    assert list(setting.states) == ["c1"], "c2 is collected all the same"


@pytest.mark.parametrize(
    ("verb", "shell", "part"),
    [
        ("GC", REFUSE, ": no"),
        ("VERSION", "echo garbage; exit", "VERSION of the delegate "),
        ("VERSION", "kill -9 $$", "killed by signal 9"),
        ("VERSION", "echo '{\"supportedVersions\":7}'; exit", "names no versions but 7"),
    ],
)
def test_gc_collects_though_the_delegate_cannot(setting: Setting, verb: str, shell: str, part: str) -> None:
    setting.succeed("ADD")
    setting.do(verb, shell)
    assert part in gc(setting).fail("GC")["msg"]
    assert setting.states == {}


def test_gc_and_status_with_a_delegate_that_knows_no_version(setting: Setting) -> None:
    setting.install("host-local", "#!/bin/sh\n")
    setting.succeed("ADD")
    setting.do("VERSION", "exit")
    gc(setting).succeed("GC")
    setting.succeed("STATUS")
    assert setting.states == {}
    assert setting.verbs == ["ADD", "VERSION", "DEL", "VERSION"]


def test_gc_among_things_that_are_no_attachments(setting: Setting) -> None:
    setting.succeed("ADD")
    (setting.data_dir / "lost+found").mkdir()
    (setting.data_dir / "old").mkdir()
    (setting.data_dir / "dangling").symlink_to("nowhere")
    gc(setting).succeed("GC")
    assert sorted(path.name for path in setting.data_dir.iterdir()) == ["dangling", "lost+found", "old"]


def test_gc_keeps_state_of_unknown_interface_for_its_container(setting: Setting) -> None:
    setting.data_dir.mkdir()
    (setting.data_dir / "c1").write_text(json.dumps({"name": "cni-flannel", "type": "noter"}))
    gc(setting, ("c1", "net7")).succeed("GC")
    assert list(setting.states) == ["c1"]
    gc(setting).succeed("GC")
    assert setting.states == {}


def test_gc_works_without_a_lease_and_without_state(setting: Setting) -> None:
    setting.succeed("ADD")
    setting.subnet_file.unlink()
    gc(setting).succeed("GC")
    assert setting.states == {}
    setting.data_dir.rmdir()
    setting.succeed("GC")


def test_status_is_the_delegates(setting: Setting) -> None:
    setting.install("host-local", "#!/bin/sh\n")
    setting.conf["cniVersion"] = "1.1.0"
    assert setting.succeed("STATUS") == ""
    assert setting.verbs == ["VERSION", "STATUS"]
    setting.do("STATUS", REFUSE.replace("111", "51"))
    assert setting.fail("STATUS")["code"] == 51


@pytest.mark.parametrize("missing", ["noter", "host-local", "subnet.env", "conf", "dataDir", "a way to it"])
def test_status_is_50_when_add_cannot_work(setting: Setting, missing: str) -> None:
    setting.conf["cniVersion"] = "1.1.0"
    setting.install("host-local", "#!/bin/sh\n")
    match missing:
        case "subnet.env":
            setting.subnet_file.unlink()
        case "conf":
            setting.conf["delegate"] = {"ipam": {}}
        case "dataDir":
            setting.data_dir.write_text("")
        case "a way to it":
            setting.conf["dataDir"] = f"{setting.subnet_file}/flannel"
        case _:
            (setting.plugins / missing).unlink()
    assert setting.fail("STATUS")["code"] == 50


@pytest.mark.parametrize(
    ("verb", "shell"),
    [
        ("VERSION", "echo garbage; exit"),
        ("VERSION", "echo 5; exit"),
        ("VERSION", "kill -9 $$"),
        ("VERSION", "echo '{\"supportedVersions\":7}'; exit"),
        ("VERSION", 'echo \'{"code":true,"msg":"x"}\'; exit 1'),
        ("STATUS", "kill -9 $$"),
    ],
)
def test_status_is_50_when_the_delegate_does_not_work(setting: Setting, verb: str, shell: str) -> None:
    setting.conf["cniVersion"] = "1.1.0"
    setting.install("host-local", "#!/bin/sh\n")
    setting.do(verb, shell)
    assert setting.fail("STATUS")["code"] == 50


@pytest.mark.parametrize(
    "odd",
    [
        {"routes": ["x"]},
        {"routes": 5},
        {"routes": [{"dst": 5}]},
        {"ips": [{"gateway": 5}], "routes": [{"dst": "0.0.0.0/0"}]},
        {"ips": "x", "routes": [{"dst": "0.0.0.0/0"}]},
    ],
)
def test_an_odd_prev_result_is_for_the_delegate_to_refuse(setting: Setting, odd: dict[str, object]) -> None:
    setting.succeed("ADD")
    setting.conf["prevResult"] = odd
    setting.succeed("CHECK")
    assert setting.calls[-1].config["prevResult"] == odd


def test_gc_frees_what_is_damaged_and_leaves_the_file(setting: Setting) -> None:
    """It may be the file of another network, whose DEL will need it."""
    setting.succeed("ADD")
    setting.succeed("ADD", container="c2")
    for container in ("c1", "c2"):
        (setting.data_dir / container).write_text("")
    done = gc(setting, ("c2", "eth0")).run("GC")
    assert (done.returncode, "c1 is damaged" in done.stderr, "c2 is" in done.stderr) == (0, True, False)
    assert [(call.container, call.ifname) for call in setting.calls if call.verb == "DEL"] == [("c1", "eth0")]
    assert sorted(path.name for path in setting.data_dir.iterdir()) == ["c1", "c2"]
