"""What cni/flannel has its delegate do, and what it keeps in dataDir meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from signal import SIG_IGN, SIGPIPE, SIGXFSZ, getsignal, valid_signals

import pytest

from tests.unit.cni_calls import IPV4, REFUSAL, REFUSE, Setting

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


@pytest.mark.parametrize("odd", [None, {}, [], "text", 5])
def test_del_hands_on_no_result_that_is_none(setting: Setting, odd: object) -> None:
    setting.succeed("ADD")
    setting.conf["prevResult"] = odd
    setting.succeed("DEL")
    assert setting.calls[1].config == setting.calls[0].config


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
    ours = {number for number in valid_signals() if getsignal(number) is SIG_IGN} - {SIGPIPE, SIGXFSZ}
    found = {number for number in range(1, 32) if ignored >> number - 1 & 1}
    assert found - ours == set(), "only what whoever runs the tests ignores, as nohup does"


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


DAMAGED = (
    "",
    "{",
    "[]",
    "null",
    "{}",
    '{"name":"cni-flannel"}',
    '{"type":"noter"}',
    '{"name":"cni-flannel","type":5}',
    '{"name":"cni-flannel","type":"noter","cniVersion":7}',
    "\xff",
)


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_state_is_replaced_by_the_conf_and_the_lease(setting: Setting, text: str) -> None:
    setting.succeed("ADD")
    (setting.data_dir / "c1").write_text(text, "latin-1")
    done = setting.run("DEL")
    assert (done.returncode, done.stdout) == (0, "")
    assert f"{setting.data_dir}/c1 is damaged" in done.stderr
    add, delete = setting.calls
    assert (delete.verb, delete.container, delete.config) == ("DEL", "c1", add.config)
    assert setting.states == {}


def test_damaged_state_stays_until_there_is_a_lease(setting: Setting) -> None:
    setting.succeed("ADD")
    setting.subnet_file.unlink()
    (setting.data_dir / "c1").write_text("")
    error = setting.fail("DEL")
    assert (error["code"], f"{setting.data_dir}/c1 is damaged, " in error["msg"]) == (999, True)
    assert setting.verbs == ["ADD"]
    setting.subnet_file.write_text(IPV4)
    assert setting.run("DEL").returncode == 0
    assert list(setting.data_dir.iterdir()) == []


def test_del_removes_what_a_kill_left_half_written(setting: Setting) -> None:
    setting.data_dir.mkdir()
    (setting.data_dir / ".c1@eth0").write_text("{")
    setting.succeed("DEL")
    assert list(setting.data_dir.iterdir()) == []


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


def test_an_older_delegate_and_no_previous_result(setting: Setting) -> None:
    setting.conf |= {"cniVersion": "1.1.0", "prevResult": None}
    setting.do("ADD", UNSUITED)
    assert json.loads(setting.succeed("ADD"))["cniVersion"] == "1.1.0"
    assert [call.config["cniVersion"] for call in setting.calls] == ["1.1.0", "1.0.0"]
    setting.succeed("DEL")
    assert setting.states == {}
