"""The network config, against the specification's tables and against arbitrary documents."""

# ruff: noqa: N802, S104 - tests bear the numbers of the specification; 0.0.0.0 is a value here, not bound

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core.config import parse_config
from flanneld_py.errors import ConfigError
from flanneld_py.model import NetworkConfig, SubnetRange


def v4(document: str | dict[str, Any]) -> SubnetRange:
    config = parse_config(document if isinstance(document, str) else json.dumps(document))
    assert config.ranges.v4 is not None
    return config.ranges.v4


def v6(**fields: Any) -> SubnetRange:
    config = parse_config(json.dumps({"EnableIPv4": False, "EnableIPv6": True, **fields}))
    assert config.ranges.v4 is None
    assert config.ranges.v6 is not None
    return config.ranges.v6


def refusal(document: str | bytes | dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(json.dumps(document) if isinstance(document, dict) else document)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400
    return message


# --- flannel's own cases --------------------------------------------------------------------------


def test_T05_defaults_with_a_lower_case_key() -> None:
    config = parse_config('{ "network": "10.3.0.0/16" }')
    assert config.ranges.v4 == SubnetRange(
        IPv4Network("10.3.0.0/16"), 24, IPv4Address("10.3.1.0"), IPv4Address("10.3.255.0")
    )
    assert config.ranges.v6 is None
    assert config.networks == (IPv4Network("10.3.0.0/16"),)
    assert (config.backend_type, config.backend_options, config.nftables) == ("udp", {}, False)
    assert config.unknown_keys == ()


def test_T06_given_values_are_kept() -> None:
    text = '{"Network": "10.3.0.0/16", "SubnetMin": "10.3.5.0", "SubnetMax": "10.3.8.0", "SubnetLen": 28}'
    assert v4(text) == SubnetRange(
        IPv4Network("10.3.0.0/16"), 28, IPv4Address("10.3.5.0"), IPv4Address("10.3.8.0")
    )


def test_T07_empty_text_and_empty_object() -> None:
    assert refusal("").startswith("the config is not JSON: ")
    assert refusal("{}").startswith("Network is missing: expected a network such as")


def test_T08_backend_options_are_passed_on() -> None:
    backend = {"Type": "VXLAN", "VNI": 1, "Port": 8472, "Mac": "x", "GBP": True, "X": {"Yz": [1.5]}}
    config = parse_config(json.dumps({"Network": "10.3.0.0/16", "Backend": backend}))
    assert config.backend_type == "vxlan"
    assert config.backend_options == {"vni": 1, "port": 8472, "mac": "x", "gbp": True, "x": {"Yz": [1.5]}}


# --- subnet lengths and bounds --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "length", "lowest", "highest"),
    [
        ("10.0.0.0/8", 24, "10.0.1.0", "10.255.255.0"),
        ("10.3.0.0/22", 24, "10.3.1.0", "10.3.3.0"),
        ("10.3.0.0/23", 25, "10.3.0.128", "10.3.1.128"),
        ("10.3.0.0/28", 30, "10.3.0.4", "10.3.0.12"),
        ("128.0.0.0/1", 24, "128.0.1.0", "255.255.255.0"),
        ("10.3.77.1/16", 24, "10.3.1.0", "10.3.255.0"),
    ],
)
def test_ipv4_defaults(network: str, length: int, lowest: str, highest: str) -> None:
    expected = SubnetRange(ip_network(network, strict=False), length, ip_address(lowest), ip_address(highest))
    assert v4({"Network": network}) == expected


@pytest.mark.parametrize(
    ("network", "length", "lowest", "highest"),
    [
        ("fd00:5::/48", 64, "fd00:5:0:1::", "fd00:5:0:ffff::"),
        ("fd00:5::1/62", 64, "fd00:5:0:1::", "fd00:5:0:3::"),
        ("fd00:5::/63", 65, "fd00:5:0:0:8000::", "fd00:5:0:1:8000::"),
        ("fd00:5::/124", 126, "fd00:5::4", "fd00:5::c"),
        ("8000::/1", 64, "8000:0:0:1::", "ffff:ffff:ffff:ffff::"),
    ],
)
def test_ipv6_defaults(network: str, length: int, lowest: str, highest: str) -> None:
    expected = SubnetRange(ip_network(network, strict=False), length, ip_address(lowest), ip_address(highest))
    assert v6(IPv6Network=network) == expected


@pytest.mark.parametrize("prefix", [0, 1, 8, 16, 21, 22, 23, 24, 27, 28, 29, 30, 31, 32])
@pytest.mark.parametrize("length", [0, 1, 10, 18, 24, 25, 26, 29, 30, 31, 32, 33, 2**64])
def test_ipv4_lengths_as_specified(prefix: int, length: int) -> None:
    fits = prefix >= 1 and prefix <= 28 if length == 0 else prefix >= 1 and prefix + 2 <= length <= 30
    document = {"Network": f"128.0.0.0/{prefix}", "SubnetLen": length}
    if not fits:
        refusal(document)
        return
    found = v4(document)
    assert found.subnet_len == (length or (24 if prefix <= 22 else prefix + 2))
    assert int(found.subnet_min) - 2**31 == 1 << 32 - found.subnet_len
    assert int(found.subnet_max) - 2**31 == (1 << 32 - prefix) - (1 << 32 - found.subnet_len)


@pytest.mark.parametrize("prefix", [1, 48, 62, 63, 64, 124, 125, 127, 128])
@pytest.mark.parametrize("length", [0, 3, 50, 64, 65, 66, 126, 127, 128])
def test_ipv6_lengths_as_specified(prefix: int, length: int) -> None:
    fits = prefix <= 124 if length == 0 else prefix + 2 <= length <= 126
    document = {
        "EnableIPv6": True,
        "EnableIPv4": False,
        "IPv6Network": f"8000::/{prefix}",
        "IPv6SubnetLen": length,
    }
    if not fits:
        refusal(document)
        return
    assert v6(**document).subnet_len == (length or (64 if prefix <= 62 else prefix + 2))


@pytest.mark.parametrize("unset", ["0.0.0.0"])
def test_unspecified_ipv4_bounds_are_unset(unset: str) -> None:
    assert v4({"Network": "10.3.0.0/16", "SubnetMin": unset, "SubnetMax": unset}) == v4(
        {"Network": "10.3.0.0/16"}
    )


@pytest.mark.parametrize("unset", ["::", None])
def test_unspecified_ipv6_bounds_are_unset(unset: str | None) -> None:
    network = "fd00:5::/48"
    assert v6(IPv6Network=network, IPv6SubnetMin=unset, IPv6SubnetMax=unset) == v6(IPv6Network=network)


def test_the_first_subnet_may_be_asked_for() -> None:
    assert v4({"Network": "10.3.0.0/16", "SubnetMin": "10.3.0.0"}).subnet_min == IPv4Address("10.3.0.0")


def test_one_subnet_is_a_range() -> None:
    found = v4({"Network": "10.3.0.0/16", "SubnetMin": "10.3.7.0", "SubnetMax": "10.3.7.0"})
    assert found.subnet_min == found.subnet_max == IPv4Address("10.3.7.0")


def test_dual_stack() -> None:
    config = parse_config(
        '{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fd00:5::/48","EnableNFTables":true}'
    )
    assert config.networks == (IPv4Network("10.3.0.0/16"), IPv6Network("fd00:5::/48"))
    assert config.ranges.v6 is not None
    assert config.ranges.v6.subnet_min == IPv6Address("fd00:5:0:1::")
    assert config.nftables is True


# --- Go's reading of JSON -------------------------------------------------------------------------


def test_the_last_of_repeated_keys_wins_in_any_spelling() -> None:
    assert v4(
        '{"Network":"10.1.0.0/16","NETWORK":"10.2.0.0/16","network":"10.3.0.0/16"}'
    ).network == IPv4Network("10.3.0.0/16")
    config = parse_config(
        '{"Network":"10.1.0.0/16","Backend":{"Type":"a","VNI":1},"backend":{"type":"b","Vni":2,"VNI":3}}'
    )
    assert (config.backend_type, config.backend_options) == ("b", {"vni": 3})


def test_each_of_repeated_keys_is_checked() -> None:
    assert refusal('{"Network":5,"Network":"10.3.0.0/16"}').startswith("Network 5: expected an IPv4 network")


def test_null_leaves_booleans_lengths_and_options_as_they_were() -> None:
    text = '{"Network":"10.3.0.0/16","SubnetLen":26,"SubnetLen":null,"EnableIPv4":null,"EnableIPv6":null}'
    assert v4(text).subnet_len == 26
    config = parse_config(
        '{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","type":null,"VNI":5,"vni":null,"Port":null}}'
    )
    assert (config.backend_type, config.backend_options) == ("vxlan", {"vni": 5, "port": None})


def test_keys_fold_as_in_go() -> None:
    assert v4('{"networ\u212a":"10.3.0.0/16","\u017fubnetLen":26}').subnet_len == 26


def test_unknown_keys_are_kept_as_spelled() -> None:
    config = parse_config('{"Network":"10.3.0.0/16","SubNetwork":{"a":[1e999]},"Foo":1,"Foo":2,"":0}')
    assert config.unknown_keys == ("SubNetwork", "Foo", "")


def test_fields_of_a_disabled_family_are_read_but_not_weighed() -> None:
    assert v6(Network="10.3.0.0/32", SubnetLen=99, IPv6Network="fd00:5::/48").subnet_len == 64
    assert refusal({"Network": "10.3.0.0/16", "IPv6Network": "fd00"}).startswith(
        'IPv6Network "fd00": expected'
    )


def test_bytes_and_text_read_alike() -> None:
    text = '{"Network":"10.3.0.0/16","ключ":"é"}'
    assert parse_config(text) == parse_config(text.encode())


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            '{"Network":"10.3.0.0/16",}',
            "the config is not JSON: .* at line 1, column 26; store a JSON object such as",
        ),
        ("null", "the config is null: expected a JSON object such as"),
        ('["Network"]', r'the config is \["Network"\]: expected a JSON object'),
        ('{"Network":"10.3.0.0/16"} {}', "the config is not JSON"),
        ('{"Network":"10.3.0.0/16","x":NaN}', "the config is not JSON: it contains NaN"),
        ('{"Network":"10.3.0.0/16","x":-Infinity}', "the config is not JSON: it contains -Infinity"),
        ('{"Network":"10.3.0.0/16","x":"a\tb"}', "the config is not JSON: Invalid control character"),
        ('{"Network":"10.3.0.0/16","x":"\\ud800"}', "the config is not JSON text"),
        ('\ufeff{"Network":"10.3.0.0/16"}', "the config is not JSON"),
        ("\ud800", "the config is not UTF-8 text"),
        (b'{"Network":"10.3.0.0/16","x":"\xff"}', "the config is not UTF-8 text"),
        ('{"Network":"10.3.0.0/16"}'.encode("utf-16"), "the config is not UTF-8 text"),
        ("[" * 100_000, "the config is nested more than 64 levels deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "the config is nested more than 64 levels deep"),
        (
            '{"Network":"10.3.0.0/16","SubnetLen":' + "9" * 5000 + "}",
            "SubnetLen Infinity: expected a prefix length",
        ),
    ],
)
def test_documents_refused(document: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        parse_config(document)
    refusal(document)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("Network", None, "Network null: expected an IPv4 network such as"),
        ("Network", "", 'Network "": expected an IPv4 network'),
        ("Network", "10.3.0.0", 'Network "10.3.0.0": expected'),
        ("Network", "10.3.0.0/33", 'Network "10.3.0.0/33": expected'),
        ("Network", "10.3.0.0/255.255.0.0", 'Network "10.3.0.0/255.255.0.0": expected'),
        ("Network", "10.03.0.0/16", 'Network "10.03.0.0/16": expected'),
        ("Network", " 10.3.0.0/16", 'Network " 10.3.0.0/16": expected'),
        ("Network", "10.3.0.0/" + "1" * 5000, 'Network "10.3.0.0/1111'),
        ("Network", "fd00:5::/48", 'Network "fd00:5::/48": expected an IPv4 network'),
        ("Network", "0.0.0.0/0", "Network is 0.0.0.0/0: expected a network such as"),
        ("Network", "10.3.0.0/29", r"Network 10.3.0.0/29: expected /28 or larger, to hold four subnets"),
        ("Network", 168_000_000, "Network 168000000: expected"),
        ("SubnetLen", "24", 'SubnetLen "24": expected a prefix length such as 24, a whole number'),
        ("SubnetLen", 24.0, "SubnetLen 24.0: expected"),
        ("SubnetLen", -24, "SubnetLen -24: expected"),
        ("SubnetLen", True, "SubnetLen true: expected"),
        (
            "SubnetLen",
            31,
            "SubnetLen 31 in Network 10.3.0.0/16: expected a prefix length from 18 .* to 30; change it",
        ),
        ("SubnetLen", 17, "SubnetLen 17 in Network 10.3.0.0/16: expected a prefix length from 18"),
        ("SubnetMin", "", 'SubnetMin "": expected an IPv4 address'),
        ("SubnetMin", None, "SubnetMin null: expected an IPv4 address"),
        ("SubnetMin", "10.4.0.0", "SubnetMin 10.4.0.0: expected an address in 10.3.0.0/16"),
        ("SubnetMin", "10.3.5.7", "SubnetMin 10.3.5.7: expected the base of a /24 subnet such as 10.3.5.0"),
        ("SubnetMax", "10.2.255.0", "SubnetMax 10.2.255.0: expected an address in 10.3.0.0/16"),
        ("SubnetMax", "10.3.0.0", "SubnetMax 10.3.0.0 lies below SubnetMin 10.3.1.0: expected a range"),
        ("EnableIPv4", "true", 'EnableIPv4 "true": expected true or false, without quotes'),
        ("EnableIPv4", False, "EnableIPv4 and EnableIPv6 are both false"),
        ("EnableIPv6", 1, "EnableIPv6 1: expected true or false"),
        ("EnableIPv6", True, "IPv6Network is missing: expected .*, or set EnableIPv6 to false"),
        ("EnableNFTables", 0, "EnableNFTables 0: expected true or false"),
        ("IPv6Network", "10.3.0.0/16", 'IPv6Network "10.3.0.0/16": expected an IPv6 network'),
        ("IPv6Network", "::ffff:10.3.0.0/112", 'IPv6Network "::ffff:10.3.0.0/112": expected an IPv6 network'),
        ("IPv6Network", "fe80::%eth0/64", 'IPv6Network "fe80::%eth0/64": expected an IPv6 network'),
        ("IPv6SubnetMin", "", 'IPv6SubnetMin "": expected an IPv6 address'),
        ("IPv6SubnetMax", "10.3.0.0", 'IPv6SubnetMax "10.3.0.0": expected an IPv6 address'),
        ("Backend", None, "Backend null: expected an object"),
        ("Backend", "vxlan", 'Backend "vxlan": expected an object such as {"Type": "vxlan"}'),
        ("Backend", {}, 'Backend has no Type: add one, such as {"Type": "vxlan"}'),
        ("Backend", {"VNI": 1}, "Backend has no Type"),
        ("Backend", {"Type": None}, "Backend has no Type"),
        ("Backend", {"Type": ""}, 'Backend.Type "": expected the name of a backend'),
        ("Backend", {"Type": 5}, "Backend.Type 5: expected the name of a backend"),
        ("Backend", {"Type": "vx\nlan"}, r'Backend.Type "vx\\nlan": expected'),
    ],
)
def test_values_refused(field: str, value: Any, expected: str) -> None:
    document = {"Network": "10.3.0.0/16", field: value}
    with pytest.raises(ConfigError, match=f"^{expected}"):
        parse_config(json.dumps(document))
    refusal(document)


def test_an_inverted_ipv6_range_is_refused() -> None:
    message = refusal(
        {
            "EnableIPv6": True,
            "Network": "10.3.0.0/16",
            "IPv6Network": "fd00:5::/48",
            "IPv6SubnetMin": "fd00:5:0:9::",
            "IPv6SubnetMax": "fd00:5:0:8::",
        }
    )
    assert message.startswith("IPv6SubnetMax fd00:5:0:8:: lies below IPv6SubnetMin fd00:5:0:9::")


def test_the_empty_ipv6_network_is_refused() -> None:
    message = refusal({"EnableIPv6": True, "EnableIPv4": False, "IPv6Network": "2000::/0"})
    assert message.startswith("IPv6Network is ::/0: expected a network such as")


# --- any document at all --------------------------------------------------------------------------

FIELDS = [
    *("EnableIPv4", "EnableIPv6", "EnableNFTables", "Network", "SubnetLen", "SubnetMin", "SubnetMax"),
    *("IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax", "Backend", "Type", "x"),
]
KEYS = st.sampled_from(FIELDS).flatmap(
    lambda key: st.sampled_from([key, key.lower(), key.upper()])
) | st.text(max_size=5)
PLAUSIBLE = st.sampled_from(
    [
        "10.3.0.0/16",
        "10.3.0.0/27",
        "10.3.4.0",
        "10.3.5.0",
        "0.0.0.0",
        "fd00::/48",
        "fd00:0:0:3::",
        "::",
        "vxlan",
        "",
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 20, 24, 28, 64])
    | st.floats()
    | st.text()
    | PLAUSIBLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
DOCUMENTS = st.dictionaries(KEYS, VALUES, max_size=8).map(json.dumps)


def check(text: str | bytes) -> None:
    try:
        config = parse_config(text)
    except ConfigError as error:
        message = str(error)
        assert message
        assert message.isprintable()
        return
    assert isinstance(config, NetworkConfig)
    assert config.networks
    for found in config.ranges.values():
        bits = found.network.max_prefixlen
        assert found.network.prefixlen + 2 <= found.subnet_len <= bits - 2
        assert found.subnet_min in found.network
        assert found.subnet_max in found.network
        assert int(found.subnet_min) <= int(found.subnet_max)
        assert int(found.subnet_min) % (1 << bits - found.subnet_len) == 0
        assert int(found.subnet_max) % (1 << bits - found.subnet_len) == 0


@given(DOCUMENTS | st.text())
def test_any_document_gives_a_config_or_a_config_error(text: str) -> None:
    check(text)


@given(
    st.binary()
    | DOCUMENTS.flatmap(lambda text: st.binary(max_size=2).map(lambda noise: text.encode() + noise))
)
def test_any_bytes_give_a_config_or_a_config_error(data: bytes) -> None:
    check(data)


@given(
    st.fixed_dictionaries(
        {"Network": st.sampled_from(["10.3.0.0/16", "10.3.0.0/24", "10.3.0.0/28"])},
        optional={
            "SubnetLen": st.integers(16, 31),
            "SubnetMin": st.integers(0, 2**16).map(lambda offset: str(IPv4Address("10.3.0.0") + offset)),
            "SubnetMax": st.integers(0, 255).map(lambda third: f"10.3.{third}.0"),
            "Backend": st.sampled_from([{"Type": "udp"}, {"Type": "VXLAN", "VNI": 3}]),
        },
    ).map(json.dumps)
)
def test_plausible_documents_keep_the_rules(text: str) -> None:
    check(text)


@pytest.mark.parametrize("network", ["127.0.0.0/8", "224.0.0.0/8", "169.254.0.0/16"])
def test_a_network_that_cannot_be_routed(network: str) -> None:
    with pytest.raises(ConfigError, match=f'Network "{network}": expected a network whose addresses can be'):
        parse_config(json.dumps({"Network": network}))
