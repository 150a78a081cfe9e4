"""subnet.env as others read and write it, and environment files."""

# ruff: noqa: N802 - tests bear the numbers of the specification

from __future__ import annotations

import subprocess
import tracemalloc
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.addresses import PerFamily
from flanneld_py.core.hostfiles import (
    SubnetEnv,
    parse_environment_file,
    parse_networks,
    parse_subnet_env,
    render_subnet_env,
    socket_path,
    status_path,
    stray_lines,
)

V4 = SubnetEnv(
    PerFamily(IPv4Network("10.5.0.0/16")), PerFamily(IPv4Network("10.5.34.0/24")), 1450, ipmasq=True
)
DUAL = SubnetEnv(
    PerFamily(IPv4Network("10.5.0.0/16"), IPv6Network("fd00:5::/48")),
    PerFamily(IPv4Network("10.5.34.0/24"), IPv6Network("fd00:5:0:34::/64")),
    1430,
    ipmasq=False,
)
V6 = SubnetEnv(PerFamily(v6=DUAL.networks.v6), PerFamily(v6=DUAL.subnets.v6), 1430, ipmasq=False)
V4_TEXT = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
DUAL_TEXT = (
    "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\n"
    "FLANNEL_IPV6_NETWORK=fd00:5::/48\nFLANNEL_IPV6_SUBNET=fd00:5:0:34::1/64\n"
    "FLANNEL_MTU=1430\nFLANNEL_IPMASQ=false\n"
)
V6_TEXT = (
    "FLANNEL_IPV6_NETWORK=fd00:5::/48\nFLANNEL_IPV6_SUBNET=fd00:5:0:34::1/64\n"
    "FLANNEL_MTU=1430\nFLANNEL_IPMASQ=false\n"
)


@pytest.mark.parametrize(("env", "text"), [(V4, V4_TEXT), (DUAL, DUAL_TEXT), (V6, V6_TEXT)])
def test_subnet_env_to_the_byte_and_back(env: SubnetEnv, text: str) -> None:
    assert render_subnet_env(env) == text
    assert parse_subnet_env(text) == env


def test_a_family_without_subnet_is_left_out() -> None:
    text = "FLANNEL_MTU=0\nFLANNEL_IPMASQ=false\n"
    assert render_subnet_env(SubnetEnv(networks=DUAL.networks)) == text
    assert render_subnet_env(SubnetEnv(subnets=DUAL.subnets)) == text


def test_subnet_env_can_be_sourced_by_sh(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(render_subnet_env(DUAL))
    script = (
        '. "$1"; echo "$FLANNEL_NETWORK $FLANNEL_SUBNET $FLANNEL_IPV6_SUBNET $FLANNEL_MTU $FLANNEL_IPMASQ"'
    )
    out = subprocess.run(["sh", "-c", script, "sh", path], check=True, capture_output=True, text=True).stdout
    assert out == "10.5.0.0/16 10.5.34.1/24 fd00:5:0:34::1/64 1430 false\n"


def test_T19_invalid_networks_in_a_list_are_passed_over() -> None:
    value = "10.244.1.0/24,not-a-cidr,10.244.2.0/24"
    expected = (IPv4Network("10.244.1.0/24"), IPv4Network("10.244.2.0/24"))
    assert parse_networks(value, 4) == expected
    assert parse_subnet_env(f"FLANNEL_SUBNET={value}").subnets == PerFamily()


def test_T20_T21_a_value_without_any_network_is_absent() -> None:
    assert parse_subnet_env("FLANNEL_SUBNET=not-a-cidr") == SubnetEnv()
    assert parse_subnet_env("FLANNEL_IPV6_SUBNET=not-a-cidr") == SubnetEnv()


@pytest.mark.parametrize(
    "line",
    [
        "FLANNEL_SUBNET=10.5.34.1/24",
        "export FLANNEL_SUBNET=10.5.34.1/24",
        'FLANNEL_SUBNET="10.5.34.1/24"',
        "FLANNEL_SUBNET='10.5.34.1/24' # ours",
        "FLANNEL_SUBNET=10.5.34.1/24 # ours",
        "# FLANNEL_SUBNET=10.9.9.0/24\n\n  FLANNEL_SUBNET = 10.5.34.1/24\r\n",
        "FLANNEL_SUBNET=10.9.9.1/24\nFLANNEL_SUBNET=10.5.34.1/24",
        "FLANNEL_SUBNET=bad,10.5.34.99/24",
        "garbage\nFLANNEL_SUBNET=10.5.34.1/24",
    ],
)
def test_forms_of_an_assignment(line: str) -> None:
    assert parse_subnet_env(line).subnets.v4 == IPv4Network("10.5.34.0/24")


@pytest.mark.parametrize(
    "value",
    [
        "",
        "10.5.34.1",
        "10.5.34.1/33",
        "10.5.34.1/255.255.255.0",
        "fd00::/64",
        "10.5.034.1/24",
        "10.5.34.1/ 24",
    ],
)
def test_values_that_are_no_ipv4_network(value: str) -> None:
    assert parse_subnet_env(f"FLANNEL_SUBNET={value}\nFLANNEL_MTU=1400").subnets == PerFamily()


@pytest.mark.parametrize(
    ("value", "mtu"), [("1450", 1450), ("", 0), ("-1", 0), ("9" * 5000, 0), ("1e3", 0), ("٣", 0)]
)
def test_mtu(value: str, mtu: int) -> None:
    assert parse_subnet_env(f"FLANNEL_MTU={value}").mtu == mtu


@given(st.text() | st.text("FLANEL_SUBT=10./24,\"'\\# \n"))
def test_any_text_reads_as_something(text: str) -> None:
    env = parse_subnet_env(text)
    again = parse_subnet_env(render_subnet_env(env))
    if env.networks.v4 is not None and env.subnets.v4 is not None:
        assert again.subnets.v4 == env.subnets.v4
    assert again.mtu == env.mtu
    assert again.ipmasq == env.ipmasq


# --- environment files (systemd.exec(5)) ----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("A=1", {"A": "1"}),
        ("A=1\nB=2\n", {"A": "1", "B": "2"}),
        ("# A=1\n; B=2\n  # C=3\nD=4", {"D": "4"}),
        ("no assignment\nA=1", {"A": "1"}),
        ("1A=1\nA-B=2\n=3", {}),
        ("A=", {"A": ""}),
        ("A=\nB=2", {"A": "", "B": "2"}),
        ("A=1\nA=2", {"A": "2"}),
        ("export A=1", {"A": "1"}),
        ("  A =  two words \t\r\n", {"A": "two words"}),
        ('A=it\'s "so"', {"A": 'it\'s "so"'}),
        ("A=x # no comment here", {"A": "x # no comment here"}),
        ("A='single \\ \"quoted\" # text'", {"A": 'single \\ "quoted" # text'}),
        ("A=\"double 'quoted' # text\"", {"A": "double 'quoted' # text"}),
        ('A=" kept "  ', {"A": " kept "}),
        ('A="a\\"b\\\\c\\$d\\`e\\nf"', {"A": 'a"b\\c$d`e\\nf'}),
        ("A='one\ntwo'\nB=3", {"A": "one\ntwo", "B": "3"}),
        ('A="one\ntwo \\\nthree"\nB=3', {"A": "one\ntwo three", "B": "3"}),
        ("A=one \\\ntwo\nB=3", {"A": "one two", "B": "3"}),
        ("A=a\\ b\\\\c\\#d", {"A": "a b\\c#d"}),
        ("A=kept\\  \nB=2", {"A": "kept ", "B": "2"}),
        ("A='x'\"y\"z", {"A": "xyz"}),
        ("A='open\nB=2", {"A": "open\nB=2"}),
        ('A="open', {"A": "open"}),
        ("A=end\\", {"A": "end"}),
        (
            "FLANNELD_ETCD_ENDPOINTS=https://a:2379,https://b:2379",
            {"FLANNELD_ETCD_ENDPOINTS": "https://a:2379,https://b:2379"},
        ),
    ],
)
def test_environment_file(text: str, expected: dict[str, str]) -> None:
    assert parse_environment_file(text) == expected


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", []),
        ("# A\n\n ; B\nA=1\nexport B=2\n", []),
        ("bad line\nA=1\n1A=1\n\nA-B=2", [1, 3, 5]),
        ("A='one\ntwo'\nbad\nB=\\\nthree\nbad", [3, 6]),
    ],
)
def test_lines_that_assign_nothing(text: str, numbers: list[int]) -> None:
    assert stray_lines(text) == numbers


@given(st.dictionaries(st.from_regex(r"[A-Z_][A-Z0-9_]{0,8}", fullmatch=True), st.text()))
def test_quoted_values_come_back(variables: dict[str, str]) -> None:
    def quoted(value: str) -> str:
        for special in ("\\", '"', "$", "`"):
            value = value.replace(special, f"\\{special}")
        return f'"{value}"'

    text = "".join(f"{name}={quoted(value)}\n" for name, value in variables.items())
    assert parse_environment_file(text) == variables


@given(st.text() | st.text("AB= \t\n\\\"'#;"))
def test_no_text_is_too_strange_for_an_environment_file(text: str) -> None:
    assert all(name.isidentifier() for name in parse_environment_file(text))
    assert all(1 <= number <= text.count("\n") + 1 for number in stray_lines(text))


def test_a_long_file_is_read_in_linear_time() -> None:
    text = "A=" + " " * 500_000 + "x" + "\\ " * 100_000 + '\nB="' + "\\" * 500_000
    assert set(parse_environment_file(text)) == {"A", "B"}


# --- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subnet_file", "status", "socket"),
    [
        ("/run/flannel/subnet.env", "/run/flannel/status.json", "/run/flannel/flanneld-py.sock"),
        ("/run/x/a.env", "/run/x/a.status.json", "/run/x/a.flanneld-py.sock"),
        ("/run/x/a.b.env", "/run/x/a.b.status.json", "/run/x/a.b.flanneld-py.sock"),
        ("plain", "plain.status.json", "plain.flanneld-py.sock"),
        ("subnet.env", "status.json", "flanneld-py.sock"),
    ],
)
def test_places_beside_the_subnet_file(subnet_file: str, status: str, socket: str) -> None:
    assert (status_path(subnet_file), socket_path(subnet_file)) == (status, socket)


@pytest.mark.parametrize("text", ["x" * 1_000_000, '"' + "x" * 1_000_000, "\\x" * 500_000])
def test_a_value_of_a_megabyte_takes_no_hundred_of_memory(text: str) -> None:
    """To keep the way back to each character takes 200 bytes for it."""
    tracemalloc.start()
    try:
        values = parse_environment_file(f"FLANNEL_MTU={text}")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert set(values["FLANNEL_MTU"]) == {"x"}
    assert peak < 50_000_000


def test_a_subnet_env_that_is_far_too_long_is_not_taken_apart() -> None:
    assert parse_subnet_env(V4_TEXT + "#" * 60_000) == V4
    assert parse_subnet_env(V4_TEXT + "FLANNEL_NETWORK=" + "10.5.0.0/16," * 10_000) == SubnetEnv()
