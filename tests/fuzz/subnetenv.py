"""An old subnet.env, ours or flannel's, or whatever else stands there: to the daemon, and to the plugin."""

from __future__ import annotations

from ipaddress import ip_network
from typing import TYPE_CHECKING

from flanneld_py.core.hostfiles import (
    exported_names,
    parse_environment_file,
    parse_subnet_env,
    render_subnet_env,
    stray_lines,
)
from tests.fuzz.target import Target, one_line
from tests.unit import cni_calls

if TYPE_CHECKING:
    from collections.abc import Iterator

plugin = cni_calls.load()


def check(data: bytes) -> None:
    _check_daemon(data.decode(errors="backslashreplace"))  # as daemon/oldfiles.py reads files
    _check_plugin(data.decode(errors="replace"))


def _check_daemon(text: str) -> None:
    env = parse_subnet_env(text)
    for version, net in (*env.networks.items(), *env.subnets.items()):
        assert net.version == version
    assert 0 <= env.mtu < 10**9
    whole = all(
        env.networks.get(family) and net.prefixlen < net.max_prefixlen for family, net in env.subnets.items()
    )
    if whole and len(env.networks.values()) == len(env.subnets.values()):
        assert parse_subnet_env(render_subnet_env(env)) == env
    names = parse_environment_file(text)
    assert set(exported_names(text)) <= names.keys()
    lines = text.count("\n") + 1
    strays = stray_lines(text)
    assert strays == sorted(set(strays))
    assert all(1 <= number <= lines for number in strays)


def _check_plugin(text: str) -> None:
    try:
        lease = plugin.Lease(text)
    except ValueError as error:
        one_line(str(error)[:80].encode("unicode_escape").decode(), "FLANNEL_", "CIDR", "network", "subnet")
        return
    assert all(net.gateway() for net in lease.subnets)
    assert lease.subnets
    assert 0 <= lease.mtu < 1 << 32
    for net in (*lease.networks, *lease.subnets):
        again = ip_network(str(net))  # raises where bits of the host are set
        assert (again.version, again.prefixlen) == (net.family, net.length)


def seeds() -> Iterator[bytes]:
    for text in (cni_calls.IPV4, cni_calls.IPV6, cni_calls.DUAL):
        yield text.encode()
        yield text.replace("=", "='").replace("\n", "'\n").encode()
        yield ("export " + text.replace("\n", "\r\n")).encode()
    yield cni_calls.IPV4.replace("10.1.0.0/16", "10.1.0.0/16,10.2.0.0/16,,10.3.0.0/16").encode()
    yield b'A="1\\\n2"\nB=a\\ b\\\n c # d\n; x\nstray\n= 1\nFLANNEL_MTU=\'14\'"72"\n'
    yield b"FLANNEL_NETWORK=0.0.0.0/0\nFLANNEL_SUBNET=::/0\nFLANNEL_MTU=-1\nFLANNEL_IPMASQ=yes\n\\"


TARGET = Target(
    check,
    seeds,
    words=(
        *("FLANNEL_NETWORK=", "FLANNEL_SUBNET=", "FLANNEL_IPV6_NETWORK=", "FLANNEL_IPV6_SUBNET="),
        *(
            "FLANNEL_MTU=",
            "FLANNEL_IPMASQ=",
            "true",
            "export ",
            "10.1.0.0/16",
            "fc00::/48",
            "::ffff:1.2.3.4/120",
        ),
    ),
    plugins=(plugin,),
)
