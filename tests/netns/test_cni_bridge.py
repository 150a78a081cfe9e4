"""A bridge that is left from another lease: named, and put right where nobody is on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.netns.cni import Runtime
from tests.netns.test_cni_verbs import FILES

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

LEASED = ("FLANNEL_NETWORK=10.5.0.0/16", "FLANNEL_SUBNET=10.5.7.1/24")


@pytest.fixture
def alpha(lab: Lab) -> Host:
    return lab.add_host("alpha")


def make_bridge(host: Host, *addresses: str, name: str = "cni0", port: bool = False) -> None:
    host.ip_batch(
        [
            f"link add {name} address 0a:58:0a:05:03:01 type bridge",
            f"link set {name} up",
            *(f"address add {address} dev {name} nodad" for address in addresses),
            *([f"link add veth1 master {name} type veth peer name veth1p"] if port else []),
        ]
    )


def held(host: Host, name: str = "cni0") -> list[str]:
    shown = host.ip("address", "show", "dev", name)[0]["addr_info"]
    return [f"{info['local']}/{info['prefixlen']}" for info in shown if info["scope"] == "global"]


def leased(host: Host, *lines: str, version: str = "1.0.0", **delegate: object) -> Runtime:
    runtime = Runtime(host, version, delegate=delegate)
    runtime.write_lease(*(lines or LEASED))
    return runtime


def test_a_bridge_in_use_is_named_and_left(alpha: Host) -> None:
    make_bridge(alpha, "10.5.3.1/24", port=True)
    runtime = leased(alpha)
    error = runtime.container().refused_add()
    assert error["code"] == 999
    assert error["msg"].startswith("bridge cni0 has 10.5.3.1/24, the lease is 10.5.7.0/24: ")
    assert "ip link delete cni0" in error["msg"]
    assert error["details"] == "its ports: veth1"
    assert held(alpha) == ["10.5.3.1/24"]
    assert (runtime.states, runtime.allocated) == ([], {})
    runtime.conf["cniVersion"] = "1.1.0"
    status = runtime.status().error
    assert (status["code"], status["msg"]) == (50, error["msg"])


def test_it_is_put_right_when_the_last_port_has_gone(alpha: Host) -> None:
    make_bridge(alpha, "10.5.3.1/24", port=True)
    runtime = leased(alpha, version="1.1.0")
    container = runtime.container()
    container.refused_add()
    alpha.ip("link", "delete", "veth1")
    assert runtime.status().result == {}
    assert held(alpha) == ["10.5.3.1/24"], "STATUS only looks"
    assert container.add() == ["10.5.7.2/24"]
    assert held(alpha) == ["10.5.7.1/24"]


@pytest.mark.parametrize(
    ("families", "wrong", "right"),
    [
        ("ipv4", ["10.1.18.1/24", "192.168.7.1/24"], ["10.1.17.1/24"]),
        ("ipv4", ["10.1.17.1/25"], ["10.1.17.1/24"]),
        ("ipv4", ["10.1.18.1/24", "10.1.18.9/24"], ["10.1.17.1/24"]),
        ("ipv6", ["fc00:0:0:1::1/64"], ["fc00::1/64"]),
        ("ipv6", ["fc00::2/64", "fd00::1/64"], ["fc00::1/64", "fd00::1/64"]),
        ("dual-stack", ["10.1.18.1/24", "fc00::5/60"], ["10.1.17.1/24", "fc00::1/64"]),
    ],
)
def test_what_does_not_fit_goes(alpha: Host, families: str, wrong: list[str], right: list[str]) -> None:
    make_bridge(alpha, *wrong)
    leased(alpha, *FILES[families]).container().add()
    assert sorted(held(alpha)) == sorted(right)


def test_another_bridge_by_name(alpha: Host) -> None:
    make_bridge(alpha, "10.5.3.1/24")
    make_bridge(alpha, "10.5.4.1/24", name="br5")
    leased(alpha, bridge="br5").container().add()
    assert held(alpha, "br5") == ["10.5.7.1/24"]
    assert held(alpha) == ["10.5.3.1/24"]


def test_an_address_after_the_right_one_is_nobodys_business(alpha: Host) -> None:
    make_bridge(alpha, "10.5.7.1/24", "192.168.7.1/24", port=True)
    leased(alpha).container().add()
    assert held(alpha) == ["10.5.7.1/24", "192.168.7.1/24"]


def test_a_bridge_that_shall_have_no_address_is_left(alpha: Host) -> None:
    make_bridge(alpha, "10.5.3.1/24", port=True)
    leased(alpha, isGateway=False).container().add()
    assert held(alpha) == ["10.5.3.1/24"]


def test_the_delegates_own_remedy_is_left_to_it(alpha: Host) -> None:
    make_bridge(alpha, "10.5.3.1/24", port=True)
    leased(alpha, forceAddress=True).container().add()
    assert held(alpha) == ["10.5.7.1/24"]
