"""What cni/flannel makes of a conf and a subnet.env (T48, T50 to T53 of flannel's behaviours, and more)."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.cni_calls import DUAL, IPV4, IPV6, PLUGIN, load

flannel = load()
CONF = {"name": "cni-flannel", "type": "flannel"}
DELEGATED = {
    "name": "cni-flannel",
    "type": "bridge",
    "isGateway": True,
    "ipMasq": False,
    "mtu": 1472,
    "ipam": {
        "type": "host-local",
        "ranges": [[{"subnet": "10.1.17.0/24"}]],
        "routes": [{"dst": "10.1.0.0/16"}],
    },
}


def built(lease: str = IPV4, **conf: Any) -> dict[str, Any]:
    config: dict[str, Any] = flannel.delegate_config(CONF | conf, flannel.Lease(lease))
    return config


def refusal(**conf: Any) -> Any:
    with pytest.raises(flannel.Failure) as caught:
        built(**conf)
    return caught.value


def read(lease: str) -> tuple[list[str], list[str], int, bool]:
    env = flannel.Lease(lease)
    return [str(net) for net in env.networks], [str(net) for net in env.subnets], env.mtu, env.ipmasq


# --- the delegate's config ------------------------------------------------------------------------


def test_the_least_conf_gives_flannels_bridge() -> None:
    assert built() == DELEGATED


def test_t50_defaults_of_a_conf_with_name_and_type() -> None:
    call = flannel.Call(
        {"CNI_COMMAND": "STATUS", "CNI_PATH": "/"}, json.dumps(CONF | {"cniVersion": "1.1.0"}).encode()
    )
    assert (call.subnet_file, call.data_dir) == ("/run/flannel/subnet.env", "/var/lib/cni/flannel")
    assert call.wait_seconds() == 5


ROUTES = [{"dst": "10.96.0.0/12"}, {"dst": "192.168.244.0/24", "gw": "10.1.17.20"}]


def test_t52_an_ipam_of_the_conf_is_kept() -> None:
    ipam = {"type": "my-ipam", "some": {"more": [1]}, "routes": ROUTES}
    assert built(ipam=ipam)["ipam"] == {
        "type": "my-ipam",
        "some": {"more": [1]},
        "routes": [*ROUTES, {"dst": "10.1.0.0/16"}],
        "ranges": [[{"subnet": "10.1.17.0/24"}]],
    }


def test_t53_an_ipam_without_type_is_host_local() -> None:
    assert built(ipam={"routes": ROUTES})["ipam"] == {
        "type": "host-local",
        "routes": [*ROUTES, {"dst": "10.1.0.0/16"}],
        "ranges": [[{"subnet": "10.1.17.0/24"}]],
    }


def test_t49_ipv4_comes_before_ipv6() -> None:
    ipam = built(IPV6 + IPV4)["ipam"]
    assert ipam["ranges"] == [[{"subnet": "10.1.17.0/24"}], [{"subnet": "fc00::/64"}]]
    assert ipam["routes"] == [{"dst": "10.1.0.0/16"}, {"dst": "fc00::/48"}]


def test_the_delegate_has_the_last_word() -> None:
    delegate = {"type": "ptp", "mtu": 1400, "ipMasq": True, "isGateway": False, "dns": {"domain": "a"}}
    config = built(delegate=delegate, dns={"domain": "b"})
    assert config == DELEGATED | delegate


def test_only_a_bridge_becomes_a_gateway() -> None:
    assert "isGateway" not in built(delegate={"type": "ptp"})


def test_masquerading_is_the_delegates_task_unless_the_daemon_does_it() -> None:
    assert built(IPV4.replace("true", "false"))["ipMasq"] is True


def test_every_key_of_the_conf_is_kept() -> None:
    kept: dict[str, Any] = {
        "cniVersion": "1.0.0",
        "dns": {"nameservers": ["10.1.0.1"]},
        "args": {"cni": {"ips": ["10.1.17.9"]}},
        "capabilities": {"portMappings": True},
        "runtimeConfig": {"portMappings": [{"hostPort": 80}]},
        "prevResult": {"cniVersion": "1.0.0"},
        "example.org/key": [None, 1.5, {"a": "ü"}],
    }
    ours: dict[str, Any] = {"subnetFile": "/a", "dataDir": "/b", "waitSeconds": 1}
    assert built(**kept, **ours) == DELEGATED | kept


def test_name_version_and_runtime_config_are_the_confs() -> None:
    delegate = {"cniVersion": "0.2.0", "runtimeConfig": {"a": 1}}
    assert built(delegate=delegate) == DELEGATED | delegate
    given_too: dict[str, Any] = {"cniVersion": "1.0.0", "runtimeConfig": {"b": 1}}
    assert built(delegate=delegate, **given_too) == DELEGATED | given_too


def test_options_of_the_delegate_beside_it_mean_nothing() -> None:
    """As in flannel: a conf that worked there with a key in the wrong place does the same here."""
    assert built(mtu=9000, ipMasq=True, isGateway=False) == DELEGATED


@pytest.mark.parametrize(
    ("conf", "part"),
    [
        ({"delegate": {"type": 1}}, "needs a string"),
        ({"delegate": {"name": "x"}}, "must not have 'name'"),
        ({"delegate": {"ipam": {}}}, "must not have 'ipam'"),
        ({"delegate": []}, ""),
        ({"delegate": "bridge"}, 'delegate in the conf is "bridge", not an object'),
        ({"delegate": {"type": "flannel"}}, "would call itself"),
        ({"ipam": [1]}, "ipam in the conf is [1], not an object"),
        ({"ipam": {"routes": {}}}, ""),
        ({"ipam": {"routes": "10.1.0.0/16"}}, "not a list"),
        (
            {"ipam": {"routes": [{"dst": "10.1.0.0"}]}},
            'invalid route of ipam in the conf: {"dst":"10.1.0.0"}',
        ),
        ({"ipam": {"routes": [{"gw": "10.1.0.1"}]}}, "invalid route"),
        ({"ipam": {"routes": [{"dst": "::/0", "gw": "here"}]}}, "invalid route"),
        ({"ipam": {"routes": ["10.1.0.0/16"]}}, "invalid route"),
    ],
)
def test_a_conf_that_cannot_be_is_refused(conf: dict[str, Any], part: str) -> None:
    if not part:  # what is empty counts as absent
        assert built(**conf) == DELEGATED
        return
    failure = refusal(**conf)
    assert failure.code == 999
    assert part in failure.msg


def documented() -> list[dict[str, Any]]:
    """The confs of docs/cni.md."""
    text = (PLUGIN.parents[1] / "docs" / "cni.md").read_text()
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("conf", documented(), ids=lambda conf: "list" if "plugins" in conf else "single")
def test_the_confs_in_the_manual_do(conf: dict[str, Any]) -> None:
    common = {key: conf[key] for key in ("cniVersion", "name")}
    (ours,) = [part for part in conf.get("plugins", [conf]) if part["type"] == "flannel"]
    call = flannel.Call(
        {"CNI_COMMAND": "GC", "CNI_PATH": "/"}, json.dumps(ours | common | {"cniVersion": "1.1.0"}).encode()
    )
    config = flannel.delegate_config(call.conf, flannel.Lease(DUAL))
    assert config["type"] == "bridge"
    assert not {"subnetFile", "dataDir", "delegate", "waitSeconds"} & config.keys()
    assert ours.keys() <= {"cniVersion", "name", "type", "subnetFile", "dataDir", "delegate", "ipam"}


def test_the_manual_has_the_defaults() -> None:
    text = (PLUGIN.parents[1] / "docs" / "cni.md").read_text()
    for field, default in (
        ("subnetFile", f"`{flannel.SUBNET_FILE}`"),
        ("dataDir", f"`{flannel.DATA_DIR}`"),
        ("waitSeconds", flannel.WAIT_SECONDS),
    ):
        assert f"\n| `{field}` | {default} | " in text


# --- subnet.env -----------------------------------------------------------------------------------


def test_t51_an_ipv4_file() -> None:
    assert read(IPV4) == (["10.1.0.0/16"], ["10.1.17.0/24"], 1472, True)


def test_t48_an_ipv6_file() -> None:
    assert read(IPV6) == (["fc00::/48"], ["fc00::/64"], 1472, True)


def test_a_dual_stack_file_with_lists() -> None:
    more = DUAL.replace("10.1.0.0/16", "10.1.2.3/16,10.9.0.0/16,10.1.0.0/16")
    assert read(more) == (
        ["10.1.0.0/16", "10.9.0.0/16", "fc00::/48"],
        ["10.1.17.0/24", "fc00::/64"],
        1472,
        True,
    )


def test_other_lines_are_passed_over() -> None:
    noise = "# flannel\n\nFLANNEL_MTU\nOTHER=1\n"
    assert read(noise + IPV4.replace("\n", "\r\n")) == read(IPV4)


@pytest.mark.parametrize("value", ["True", "1", "", '"true"', " true"])
def test_only_true_is_true(value: str) -> None:
    assert read(IPV4.replace("true", value))[3] is False


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "",
            "FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, "
            "FLANNEL_MTU, FLANNEL_IPMASQ missing",
        ),
        (IPV4.replace("NETWORK", "NET"), "FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK missing"),
        (IPV6.replace("SUBNET", "SUB"), "FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET missing"),
        (IPV4.replace("FLANNEL_MTU=", "FLANNEL_MTU "), "FLANNEL_MTU missing"),
        (IPV4.replace("1472", "x"), "FLANNEL_MTU=x"),
        (IPV4.replace("1472", "4294967296"), "FLANNEL_MTU=4294967296"),
        (IPV4.replace("1472", "-1"), "FLANNEL_MTU=-1"),
        (IPV4.replace("10.1.0.0/16", "10.1.0.0"), "invalid CIDR address: 10.1.0.0"),
        (IPV4.replace("10.1.0.0/16", "10.1.0.0/16,"), "invalid CIDR address: "),
        (IPV4.replace("10.1.0.0/16", "10.1.0.0/33"), "invalid CIDR address: 10.1.0.0/33"),
        (IPV4.replace("10.1.17.1/24", "10.1.17/24"), "invalid CIDR address: 10.1.17/24"),
        (IPV4.replace("10.1.17.1/24", "fc00::/64"), "not an IPv4 network: fc00::/64"),
        (IPV6.replace("fc00::1/64", "fc00::g/64"), "invalid CIDR address: fc00::g/64"),
        (
            IPV4.replace("10.1.17.1/24", "255.255.255.255/32"),
            "no subnet but a single address: 255.255.255.255/32",
        ),
    ],
)
def test_a_file_that_does_not_do_says_why(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        flannel.Lease(text)
    assert reason in str(caught.value)


# --- networks and JSON without their modules ------------------------------------------------------


@given(st.ip_addresses(), st.integers(0, 128))
def test_networks_are_as_in_ipaddress(address: Any, length: int) -> None:
    from ipaddress import ip_network  # noqa: PLC0415 - the oracle

    length = min(length, address.max_prefixlen - 1)
    net, oracle = flannel.Net(f"{address}/{length}"), ip_network(f"{address}/{length}", strict=False)
    if "." not in str(net) or address.version == 4:  # C writes ::ffff:1.2.3.4 so
        assert str(net) == str(oracle)
        assert net.gateway() == f"{oracle[1]}/{length}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_json_is_as_in_json(value: object) -> None:
    assert json.loads(flannel.render(value)) == value
    assert flannel.parse(f" {json.dumps(value)}\r\n") == value


@given(st.text(max_size=12) | JSON.map(json.dumps).map(lambda text: text[:-1]))
def test_what_is_no_json_is_none_here_either(text: str) -> None:
    try:
        expected = json.loads(text, parse_constant=flannel._Scanning.parse_constant)
    except ValueError:
        with pytest.raises(ValueError, match=r"."):
            flannel.parse(text)
    else:
        assert flannel.parse(text) == expected
