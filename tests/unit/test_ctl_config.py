"""flannelctl config: what a config means, and keys that mean nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flanneld_py.backends import BACKENDS, backend_of
from flanneld_py.cli.ctl.commands import command
from flanneld_py.cli.ctl.config import explain
from flanneld_py.core.config import parse_config
from flanneld_py.core.configkeys import KEYS, unknown_keys
from flanneld_py.errors import ConfigError, UsageError

UNREACHED = ("--etcd-endpoints=http://127.0.0.1:1", "--env-file=/dev/null")


def document(**fields: Any) -> str:
    return json.dumps({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}, **fields})


def explained(**fields: Any) -> list[str]:
    config = parse_config(document(**fields))
    return list(explain(config, backend_of(config)))


def strangers(**fields: Any) -> list[str]:
    config = parse_config(document(**fields))
    return list(unknown_keys(config, backend_of(config).keys))


def flannelctl(*args: str, text: str = "") -> Result:
    return CliRunner().invoke(command, [*UNREACHED, "config", *args], input=text, standalone_mode=False)


# --- meaning --------------------------------------------------------------------------------------


def test_the_defaults_are_told() -> None:
    assert explained() == [
        "IPv4 network   10.5.0.0/16",
        "  subnets      255 of /24: room for 255 hosts, 253 pod addresses on each",
        "  from, to     10.5.1.0/24, 10.5.255.0/24",
        "backend        vxlan: vni 1, port 8472, gbp false, learning false, direct routing false, "
        "tx checksum auto",
        "MTU            the interface's less 50 (1450 on Ethernet)",
        "to be open     UDP 8472 between the hosts",
    ]


def test_one_subnet() -> None:
    lines = explained(SubnetLen=30, SubnetMin="10.5.1.0", SubnetMax="10.5.1.0")
    assert "  subnets      1 of /30: room for 1 host, 1 pod addresses on each" in lines
    assert "  from, to     10.5.1.0/30, 10.5.1.0/30" in lines


def test_both_families() -> None:
    lines = explained(EnableIPv6=True, IPv6Network="fd00:5::/48")
    assert "IPv6 network   fd00:5::/48" in lines
    assert "  subnets      65535 of /64: room for 65535 hosts, 2^64 pod addresses on each" in lines
    assert "  from, to     fd00:5:0:1::/64, fd00:5:0:ffff::/64" in lines
    assert lines[-2] == "MTU            the interface's less 70 (1430 on Ethernet)"


def test_host_gw_takes_nothing_off_the_mtu() -> None:
    assert explained(Backend={"Type": "host-gw"})[-2:] == [
        "backend        host-gw",
        "MTU            the interface's",
    ]


def test_a_given_mtu() -> None:
    lines = explained(Backend={"Type": "vxlan", "MTU": 1400, "Port": 4789})
    assert lines[-3:] == [
        "backend        vxlan: vni 1, port 4789, gbp false, learning false, direct routing false, "
        "tx checksum auto",
        "MTU            1350, or the interface's less 50 where that is smaller",
        "to be open     UDP 4789 between the hosts",
    ]


def test_an_mtu_that_most_interfaces_do_not_have() -> None:
    lines = explained(Backend={"Type": "vxlan", "MTU": 9000})
    assert (
        lines[-2] == "MTU            8950, or the interface's less 50 where that is smaller: 1450 on Ethernet"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("families", [{}, {"EnableIPv6": True, "IPv6Network": "fd00:5::/48"}])
def test_every_backend_can_be_explained(backend: str, families: dict[str, Any]) -> None:
    fields = {"Backend": {"Type": backend, "Nonsense": 1}, **families}
    lines = explained(**fields)
    assert any(line.startswith(f"backend        {backend}") for line in lines)
    told = f"unknown key Backend.Nonsense: {backend} has no such option; remove it"
    assert strangers(**fields) == [told]


# --- unknown keys ---------------------------------------------------------------------------------


def test_the_known_fields_are_those_that_are_read() -> None:
    samples = {
        **dict.fromkeys(("EnableIPv4", "EnableIPv6", "EnableNFTables"), True),
        "Network": "10.5.0.0/16",
        "SubnetLen": 24,
        "SubnetMin": "10.5.1.0",
        "SubnetMax": "10.5.9.0",
        "IPv6Network": "fd00:5::/48",
        "IPv6SubnetLen": 64,
        "IPv6SubnetMin": "fd00:5:0:1::",
        "IPv6SubnetMax": "fd00:5:0:9::",
        "Backend": {"Type": "vxlan"},
    }
    assert samples.keys() == {key.name for key in KEYS}
    assert parse_config(json.dumps(samples)).unknown_keys == ()


def test_the_nearest_name_is_given() -> None:
    assert strangers(SubnetLn=24) == ["unknown key SubnetLn: did you mean SubnetLen?"]
    assert strangers(Backend={"Type": "vxlan", "Prt": 1}) == [
        "unknown key Backend.Prt: did you mean Backend.Port?"
    ]
    assert strangers(mtu=1400) == ["unknown key mtu: did you mean Backend.MTU?"]
    assert strangers(zzzz=1) == ["unknown key zzzz: nothing reads it; remove it"]
    assert strangers(**{"\x1b[2J": 1}) == ['unknown key "\\u001b[2J": nothing reads it; remove it']
    assert strangers(Backend={"Type": "host-gw", "VNI": 7}) == [
        "unknown key Backend.VNI: host-gw has no such option; remove it"
    ]


def test_case_does_not_matter() -> None:
    assert strangers(subnetLEN=24) == []
    assert strangers(Backend={"type": "VXLAN", "vni": 3}) == []


# --- commands that need no etcd -------------------------------------------------------------------


def test_check_of_a_file_of_input_and_of_an_argument(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(document() + "\n")
    results = [
        flannelctl("check", str(file)),
        flannelctl("check", "-", text=document()),
        flannelctl("check", document()),
    ]
    for result in results:
        assert (result.exception, result.return_value) == (None, 0)
        assert "10.5.0.0/16" in result.stdout


def test_check_reports_unknown_keys_as_a_problem() -> None:
    result = flannelctl("check", document(SubnetLn=24))
    assert result.return_value == 1
    assert "10.5.0.0/16" in result.stdout, "what it means is told all the same"
    assert "did you mean SubnetLen?" in result.stderr


@pytest.mark.parametrize("action", ["check", "set"])
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ("{}", "Network is missing"),
        (document(Network="10.5.0.0"), "Network"),
        (document(Backend={"Type": "vxlna"}), "host-gw, udp or vxlan"),
        (document(Backend={"Type": "vxlan", "VNI": "1"}), "Backend.VNI"),
    ],
)
def test_a_wrong_config_is_refused(action: str, text: str, named: str) -> None:
    """The registry is out of reach here, so `set` has not even tried to write."""
    result = flannelctl(action, text)
    assert isinstance(result.exception, ConfigError)
    assert named in str(result.exception)


MISSPELT = {
    '{"Netwrk": "10.5.0.0/16"}': "unknown key Netwrk: did you mean Network?",
    '{"Network": "10.5.0.0/16", "Backend": {"Typ": "vxlan"}}': (
        "unknown key Backend.Typ: did you mean Backend.Type?"
    ),
}
"""Of what must be there."""


@pytest.mark.parametrize("text", MISSPELT)
def test_what_is_missing_because_it_is_misspelt(text: str) -> None:
    assert str(flannelctl("check", text).exception).endswith(f"; {MISSPELT[text]}")


DOUBTFUL = {
    # Without Backend it is udp.
    '{"Network": "10.5.0.0/16", "Backnd": {"Type": "vxlan"}}': "unknown key Backnd: did you mean Backend?",
    '{"Network": "10.5.0.0/16", "network": "10.6.0.0/16", "Backend": {"Type": "vxlan"}}': (
        "Network is given 2 times (Network, network), the last one counts; remove the others"
    ),
    '{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "vni": 2, "VNI": 3}}': (
        "Backend.vni is given 2 times (vni, VNI), the last one counts; remove the others"
    ),
    '{"Network": "10.5.0.0/16", "IPv6Network": "fd00:5::/48", "Backend": {"Type": "vxlan"}}': (
        'IPv6Network has no effect without "EnableIPv6": true; add that, or remove it'
    ),
}
"""Taken as flannel takes it, and hardly meant so."""


@pytest.mark.parametrize("text", DOUBTFUL)
def test_what_is_hardly_meant_is_told_and_not_set(text: str) -> None:
    result = flannelctl("check", text)
    assert (result.return_value, result.stderr) == (1, f"flannelctl: {DOUBTFUL[text]}\n")
    assert str(flannelctl("set", text).exception).startswith(f"{DOUBTFUL[text]}; nothing was written")


def test_set_refuses_unknown_keys() -> None:
    result = flannelctl("set", document(SubnetLn=24, Backend={"Type": "vxlan", "Prt": 1}))
    assert isinstance(result.exception, ConfigError)
    for expected in (
        "did you mean SubnetLen?",
        "did you mean Backend.Port?",
        "nothing was written",
        "--force",
    ):
        assert expected in str(result.exception)


def test_a_source_that_cannot_be_read(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "absent"):
        result = flannelctl("set", os.fspath(source))
        assert isinstance(result.exception, UsageError)
        assert str(source) in str(result.exception)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in str(flannelctl("check", f"{tmp_path}/binary").exception)
