"""What cni/flannel has its delegate do, and what it keeps in dataDir meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.cni_calls import IPV4, Setting

REFUSE = """echo '{"cniVersion":"1.0.0","code":111,"msg":"no","details":"really"}'; exit 1"""
REFUSAL = {"code": 111, "msg": "no", "details": "really"}
UNSUITED = 'case $(cat "$NOTES/stdin") in *1.1.0*) echo \'{"code":1,"msg":"incompatible"}\'; exit 1 ;; esac'


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


# --- ADD and DEL ----------------------------------------------------------------------------------


def test_state_is_what_the_delegate_got_and_stands_before_it(setting: Setting) -> None:
    setting.do("ADD", f'cp -r "{setting.data_dir}" "$NOTES/seen"')
    result = json.loads(setting.succeed("ADD"))
    assert result == {"cniVersion": "1.0.0", "ips": [{"address": "10.1.17.2/24"}]}
    (call,) = setting.calls
    assert (call.verb, call.container, call.ifname, call.netns) == ("ADD", "c1", "eth0", "/run/netns/no-such")
    assert setting.states == {"c1": call.config}
    assert json.loads((setting.notes / "seen" / "c1").read_text()) == call.config
    assert (setting.data_dir.stat().st_mode & 0o777, (setting.data_dir / "c1").stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )


def test_del_uses_what_was_saved(setting: Setting) -> None:
    setting.succeed("ADD")
    setting.subnet_file.unlink()
    setting.conf |= {"delegate": {"type": "absent"}, "cniVersion": "0.4.0"}
    setting.succeed("DEL")
    add, delete = setting.calls
    assert (delete.verb, delete.config) == ("DEL", add.config)
    assert setting.states == {}
    setting.succeed("DEL")
    assert setting.verbs == ["ADD", "DEL"], "there was nothing to do"


def test_del_hands_on_the_runtimes_prev_result(setting: Setting) -> None:
    setting.succeed("ADD")
    setting.conf["prevResult"] = {"cniVersion": "1.0.0"}
    setting.succeed("DEL")
    assert setting.calls[1].config == setting.calls[0].config | {"prevResult": {"cniVersion": "1.0.0"}}


def test_s15_state_stays_until_the_delegates_del_succeeds(setting: Setting) -> None:
    setting.succeed("ADD")
    setting.do("DEL", REFUSE)
    assert setting.fail("DEL") == REFUSAL
    assert list(setting.states) == ["c1"]
    setting.do("DEL", "true")
    setting.succeed("DEL")
    assert setting.verbs == ["ADD", "DEL", "DEL"]
    assert setting.states == {}


def test_a_failed_add_is_undone(setting: Setting) -> None:
    setting.do("ADD", REFUSE)
    assert setting.fail("ADD") == REFUSAL
    assert setting.verbs == ["ADD", "DEL"]
    assert setting.calls[0].config == setting.calls[1].config
    assert setting.states == {}


def test_what_could_not_be_undone_is_left_for_del(setting: Setting) -> None:
    setting.do("ADD", REFUSE)
    setting.do("DEL", REFUSE.replace('"no"', '"nor that"'))
    error = setting.fail("ADD")
    assert (error["code"], error["msg"]) == (111, "no")
    assert error["details"] == "really; undoing it failed too, DEL tries again: nor that"
    assert list(setting.states) == ["c1"]


def test_an_add_for_what_stands_takes_nothing_down(setting: Setting) -> None:
    """Runtimes must not do it; one that does so shall not cut its container off."""
    setting.succeed("ADD")
    before = setting.states
    setting.do("ADD", REFUSE)
    setting.subnet_file.write_text(IPV4.replace("10.1.17", "10.1.99"))
    assert setting.fail("ADD") == REFUSAL
    assert setting.verbs == ["ADD", "ADD"]
    assert setting.states == before


@pytest.mark.parametrize(
    ("shell", "part"),
    [
        ("echo it went wrong >&2; exit 3", "exited with 3 and no result: it went wrong"),
        ("echo no JSON; exit 1", "exited with 1 and no result: no JSON"),
        ("kill -9 $$", "was killed by signal 9 and no result: it said nothing"),
        ("echo no JSON; exit 0", "exited with 0 and no result: no JSON"),
        ("echo []; exit 0", "exited with 0 and no result: []"),
    ],
)
def test_a_delegate_that_dies_without_json(setting: Setting, shell: str, part: str) -> None:
    setting.do("ADD", shell)
    error = setting.fail("ADD")
    assert error["code"] == 0
    assert part in error["msg"]
    assert setting.verbs == ["ADD", "DEL"]
    assert setting.states == {}


def test_a_delegate_that_cannot_be_run(setting: Setting) -> None:
    setting.install("noter", "no program")
    assert setting.fail("ADD")["code"] == 999
    assert list(setting.states) == ["c1"], "neither could its DEL be run"


def test_much_output_does_not_block(setting: Setting) -> None:
    setting.do("ADD", "head -c 300000 /dev/zero | tr '\\0' ' '; head -c 300000 /dev/zero | tr '\\0' x >&2")
    done = setting.run("ADD")
    assert json.loads(done.stdout)["ips"]
    assert done.stderr == "x" * 300_000, "what the delegate says is handed on"


def test_the_delegate_does_not_inherit_what_python_ignores(setting: Setting) -> None:
    setting.do("ADD", 'grep SigIgn /proc/self/status >"$NOTES/signals"')
    setting.succeed("ADD")
    ignored = int((setting.notes / "signals").read_text().split()[1], 16)
    assert [number for number in range(1, 32) if ignored >> number - 1 & 1] == []


# --- several interfaces -----------------------------------------------------------------------------


def test_s16_each_interface_has_its_own_state(setting: Setting) -> None:
    for ifname, mtu in (("eth0", 1400), ("net1", 1300), ("net2", 1200)):
        setting.conf["delegate"] = {"type": "noter", "mtu": mtu}
        setting.succeed("ADD", ifname=ifname)
    assert {name: state["mtu"] for name, state in setting.states.items()} == {
        "c1": 1400,
        "c1@net1": 1300,
        "c1@net2": 1200,
    }
    setting.succeed("DEL", ifname="net1")
    setting.succeed("DEL", ifname="net1")
    setting.succeed("DEL", ifname="eth0")
    setting.succeed("DEL", ifname="eth0")
    assert list(setting.states) == ["c1@net2"]
    setting.succeed("DEL", ifname="net2")
    assert [(call.ifname, call.config["mtu"]) for call in setting.calls if call.verb == "DEL"] == [
        ("net1", 1300),
        ("eth0", 1400),
        ("net2", 1200),
    ]
    assert setting.states == {}


def test_a_failed_second_interface_leaves_the_first_alone(setting: Setting) -> None:
    setting.succeed("ADD")
    setting.do("ADD", REFUSE)
    setting.fail("ADD", ifname="net1")
    assert list(setting.states) == ["c1"]
    assert [(call.verb, call.ifname) for call in setting.calls[1:]] == [("ADD", "net1"), ("DEL", "net1")]


def test_containers_are_told_apart(setting: Setting) -> None:
    setting.succeed("ADD", container="c1")
    setting.succeed("ADD", container="c2")
    setting.succeed("DEL", container="c1")
    assert list(setting.states) == ["c2"]


def test_what_flannels_plugin_attached_is_detached(setting: Setting) -> None:
    saved = {"name": "cni-flannel", "type": "noter", "mtu": 1111}
    setting.data_dir.mkdir()
    (setting.data_dir / "c1").write_text(json.dumps(saved))
    setting.succeed("ADD", ifname="net1")
    assert list(setting.states) == ["c1", "c1@net1"]
    setting.succeed("DEL", ifname="net1")
    setting.succeed("DEL", ifname="eth0")
    assert setting.calls[-1].config == saved
    assert setting.states == {}


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_damaged_state_is_named_and_left(setting: Setting, text: str) -> None:
    setting.data_dir.mkdir()
    (setting.data_dir / "c1").write_text(text)
    done = setting.run("DEL")
    assert (done.returncode, done.stdout) == (0, "")
    assert f"{setting.data_dir}/c1 is damaged" in done.stderr
    assert (setting.data_dir / "c1").read_text() == text


def test_del_removes_what_a_kill_left_half_written(setting: Setting) -> None:
    setting.data_dir.mkdir()
    (setting.data_dir / ".c1@eth0").write_text("{")
    setting.succeed("DEL")
    assert list(setting.data_dir.iterdir()) == []


# --- CHECK, GC, STATUS ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("verb", ["GC", "DEL"])
def test_gc_removes_nothing_that_the_delegate_did_not(setting: Setting, verb: str) -> None:
    setting.succeed("ADD")
    setting.do(verb, REFUSE)
    error = gc(setting).fail("GC")
    assert "no" in error["msg"]
    assert list(setting.states) == ["c1"]


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


@pytest.mark.parametrize("missing", ["noter", "host-local", "subnet.env", "conf"])
def test_status_is_50_when_add_cannot_work(setting: Setting, missing: str) -> None:
    setting.conf["cniVersion"] = "1.1.0"
    setting.install("host-local", "#!/bin/sh\n")
    match missing:
        case "subnet.env":
            setting.subnet_file.unlink()
        case "conf":
            setting.conf["delegate"] = {"ipam": {}}
        case _:
            (setting.plugins / missing).unlink()
    assert setting.fail("STATUS")["code"] == 50


# --- delegates from before CNI 1.1 ------------------------------------------------------------------


def test_an_older_delegate_serves_1_1_0(setting: Setting) -> None:
    setting.conf["cniVersion"] = "1.1.0"
    setting.install("host-local", "#!/bin/sh\n")
    for verb in ("ADD", "DEL", "CHECK"):
        setting.do(verb, UNSUITED)
    setting.do("VERSION", """echo '{"supportedVersions":["0.4.0","1.0.0"]}'; exit""")
    assert json.loads(setting.succeed("ADD"))["cniVersion"] == "1.1.0"
    setting.conf["prevResult"] = {"cniVersion": "1.1.0", "ips": []}
    setting.succeed("CHECK")
    assert setting.calls[-1].config["prevResult"]["cniVersion"] == "1.0.0"
    for verb in ("STATUS", "GC"):
        setting.conf["cni.dev/valid-attachments"] = [{"containerID": "c1", "ifname": "eth0"}]
        setting.succeed(verb)
        assert setting.verbs[-1] == "VERSION", "it would not understand the verb"
    setting.succeed("DEL")
    assert setting.states == {}


def test_another_refusal_of_the_version_needs_no_undoing(setting: Setting) -> None:
    setting.do("ADD", """echo '{"code":1,"msg":"incompatible"}'; exit 1""")
    assert setting.fail("ADD")["code"] == 1
    assert setting.verbs == ["ADD"]
    assert setting.states == {}
