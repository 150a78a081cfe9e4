"""Messages as bytes, checked against pyroute2's decoders, and answers that a kernel seldom gives."""

from __future__ import annotations

import errno
import socket
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from flanneld_py.drivers import netlink
from flanneld_py.drivers import rtmessages as rt
from flanneld_py.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanneld_py.addresses import IPAddress, IPNetwork

CREATE_REPLACE = 0x1 | 0x100 | 0x400
AF_INET, AF_INET6, AF_BRIDGE = 2, 10, 7
MAC = "82:4b:b1:2c:8f:a1"
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
networks = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(lambda t: IPv4Network(t, strict=False)),
    st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 128)).map(lambda t: IPv6Network(t, strict=False)),
)
indexes = st.integers(1, 2**31 - 1)
macs = st.binary(min_size=6, max_size=6).map(lambda b: b.hex(":"))


def decoded(kind: Any, data: bytes) -> Any:
    """One message, all of it, read by somebody else's decoder."""
    message = kind(data)
    message.decode()
    assert message["header"]["length"] == len(data)
    assert len(data) % 4 == 0
    return message


def family(version: int) -> int:
    return AF_INET if version == 4 else AF_INET6


@given(indexes, addresses, macs)
def test_neighbours(index: int, address: IPAddress, mac: str) -> None:
    made = decoded(ndmsg, *rt.set_neighbours([(index, address, mac)]))
    gone = decoded(ndmsg, rt.delete_neighbour(index, address))
    assert (made["header"]["type"], made["header"]["flags"]) == (28, CREATE_REPLACE)
    assert (gone["header"]["type"], gone["header"]["flags"]) == (29, 1)
    for message in (made, gone):
        assert (message["family"], message["ifindex"], message["state"], message["flags"]) == (
            family(address.version), index, 0x80, 0,
        )  # fmt: skip
        assert ip_address(message.get_attr("NDA_DST")) == address
    assert made.get_attr("NDA_LLADDR") == mac


@given(indexes, addresses, macs)
def test_fdb_entries(index: int, address: IPAddress, mac: str) -> None:
    made = decoded(ndmsg, *rt.set_fdb([(index, address, mac)]))
    gone = decoded(ndmsg, rt.delete_fdb(index, mac))
    assert (made["header"]["type"], made["header"]["flags"]) == (28, CREATE_REPLACE)
    assert (gone["header"]["type"], gone["header"]["flags"]) == (29, 1)
    for message in (made, gone):
        assert (message["family"], message["ifindex"], message["state"], message["flags"]) == (
            AF_BRIDGE, index, 0x80, 2,
        )  # fmt: skip
        assert message.get_attr("NDA_LLADDR") == mac
    (data,) = rt.set_fdb([(index, address, mac)])
    assert netlink.attributes(data, 28, len(data))[1] == address.packed
    assert gone.get_attr("NDA_DST") is None


@given(st.integers(1, 2**32 - 1), indexes, addresses, st.booleans(), st.booleans())
def test_nexthops(number: int, index: int, via: IPAddress, onlink: bool, new: bool) -> None:
    """By hand, from linux/nexthop.h: pyroute2 does not know them."""
    data = rt.set_nexthop(number, 96, index, via, onlink=onlink, new=new)
    assert struct.unpack_from("=IHHII", data) == (len(data), 104, 0x601 if new else CREATE_REPLACE, 0, 0)
    assert struct.unpack_from("=BBBBI", data, 16) == (family(via.version), 0, 96, 0, 4 if onlink else 0)
    expected = {1: struct.pack("=I", number), 5: struct.pack("=I", index), 6: via.packed}
    assert netlink.attributes(data, 24, len(data)) == expected
    gone = rt.delete_nexthop(number)
    assert struct.unpack_from("=IHHII", gone) == (len(gone), 105, 1, 0, 0)
    assert netlink.attributes(gone, 24, len(gone)) == {1: expected[1]}


@given(networks, st.integers(1, 255), indexes, addresses, st.booleans(), st.booleans())
def test_routes(
    destination: IPNetwork, protocol: int, index: int, via: IPAddress, onlink: bool, new: bool
) -> None:
    if destination.version == 4:
        data = rt.set_route4(destination, protocol, index, new=new)
        made = decoded(rtmsg, data)
        assert netlink.attributes(data, 28, len(data))[30] == struct.pack("=I", index)  # RTA_NH_ID
        flags = 0
    else:
        gateway = IPv6Address(int(via))
        data = rt.set_route6(destination, protocol, index, gateway, 7 << 18, onlink=onlink, new=new)
        made = decoded(rtmsg, data)
        assert made.get_attr("RTA_METRICS").get_attr("RTAX_LOCK") == 7 << 18
        assert (made.get_attr("RTA_OIF"), ip_address(made.get_attr("RTA_GATEWAY"))) == (index, gateway)
        flags = 4 if onlink else 0
    assert (made["header"]["type"], made["header"]["flags"]) == (24, 0x601 if new else CREATE_REPLACE)
    assert (made["family"], made["dst_len"], made["table"], made["proto"], made["scope"], made["type"]) == (
        family(destination.version), destination.prefixlen, 254, protocol, 0, 1,
    )  # fmt: skip
    assert made["flags"] == flags
    assert ip_address(made.get_attr("RTA_DST")) == destination.network_address


@given(networks, st.integers(1, 255), indexes, st.booleans())
def test_routes_to_a_device(destination: IPNetwork, protocol: int, index: int, new: bool) -> None:
    if destination.version == 4:
        made = decoded(rtmsg, rt.set_direct_route4(destination, protocol, index, new=new))
    else:
        made = decoded(rtmsg, rt.set_direct_route6(destination, protocol, index, 7 << 18, new=new))
        assert made.get_attr("RTA_METRICS").get_attr("RTAX_LOCK") == 7 << 18
    assert (made["header"]["type"], made["header"]["flags"]) == (24, 0x601 if new else CREATE_REPLACE)
    assert (made["family"], made["dst_len"], made["proto"]) == (
        family(destination.version), destination.prefixlen, protocol,
    )  # fmt: skip
    assert (ip_address(made.get_attr("RTA_DST")), made.get_attr("RTA_OIF")) == (
        destination.network_address, index,
    )  # fmt: skip


@given(networks, st.integers(1, 255))
def test_blackhole_routes(destination: IPNetwork, protocol: int) -> None:
    made = decoded(rtmsg, rt.set_blackhole(destination, protocol, 7 << 18))
    assert (made["header"]["type"], made["type"], made["proto"]) == (24, 6, protocol)
    assert made.get_attr("RTA_METRICS").get_attr("RTAX_LOCK") == 7 << 18


@given(networks, st.integers(1, 255), st.sampled_from([0, 4]), st.sampled_from([0, 50, 1024]))
def test_deleting_routes(destination: IPNetwork, protocol: int, tos: int, metric: int) -> None:
    gone = decoded(rtmsg, rt.delete_route(destination, protocol, tos, metric))
    assert (gone["header"]["type"], gone["header"]["flags"]) == (25, 1)
    assert (gone["family"], gone["dst_len"], gone["tos"], gone["table"], gone["proto"]) == (
        family(destination.version), destination.prefixlen, tos, 254, protocol,
    )  # fmt: skip
    assert (gone["scope"], gone["type"]) == (255, 0)
    assert gone.get_attr("RTA_PRIORITY") == (metric or None)


@given(networks, networks, addresses)
def test_inside(outer: IPNetwork, inner: IPNetwork, address: IPAddress) -> None:
    inside = rt.Inside([outer])
    same = outer.version == inner.version
    assert inside.network(inner.network_address.packed, inner.prefixlen) == (
        same and inner.subnet_of(outer)  # type: ignore[arg-type]
    )
    assert inside.address(address.packed) == (address in outer)
    assert not rt.Inside(()).address(address.packed)


@pytest.mark.parametrize("text", ["", "82:4b", "82:4b:b1:2c:8f:a1:00", "xx:4b:b1:2c:8f:a1"])
def test_what_is_no_mac_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"MAC address|hexadecimal"):
        rt.mac_bytes(text)


def test_addresses_and_networks_are_read() -> None:
    assert rt.address(bytes([10, 5, 3, 0])) == IPv4Address("10.5.3.0")
    assert rt.network(IPv6Address("fd00:5:3::").packed, 64) == IPv6Network("fd00:5:3::/64")


@given(st.binary(max_size=200))
def test_rubbish_is_read_without_harm(data: bytes) -> None:
    for payload in netlink.attributes(data, 0, len(data)).values():
        assert payload in data
    for _, flags, _, _, start, end in netlink.messages(data):
        assert 16 <= start <= end <= len(data)
        netlink.error_of(data, flags, start, end)


# --- answers --------------------------------------------------------------------------------------


def answer(kind: int, sequence: int, body: bytes = b"", flags: int = 2) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


def error(sequence: int, code: int, text: str = "", *, whole: bytes = b"") -> bytes:
    """NLMSG_ERROR; `whole`: with all of the refused message, as without NETLINK_CAP_ACK."""
    refused = struct.pack("=IHHII", 16 + len(whole), 24, 5, sequence, 0) + whole
    words = struct.pack("=HH", 5 + len(text), 1) + text.encode() + b"\0" if text else b""
    return answer(2, sequence, struct.pack("=i", -code) + refused + words, 0x200 | (0 if whole else 0x100))


DONE = struct.pack("=i", 0)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, netlink.NetlinkSocket]]:
    """A netlink socket whose other end is played by the test: what it sends there lies ready."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = netlink.NetlinkSocket()
    real = client._socket
    monkeypatch.setattr(client, "_socket", ours)
    yield theirs, client
    for one in (real, ours, theirs):
        one.close()


def test_an_interrupted_dump_is_repeated(kernel: tuple[socket.socket, netlink.NetlinkSocket]) -> None:
    theirs, client = kernel
    theirs.send(answer(24, 1, b"half") + answer(24, 1, b"torn", flags=2 | 0x10))
    theirs.send(answer(3, 1, DONE))
    theirs.send(answer(24, 1, b"late"))  # of the first dump: not ours to read any more
    theirs.send(answer(24, 2, b"good"))
    theirs.send(answer(24, 2, b"more") + answer(3, 2, DONE))
    rows = client.dump("routes", 26, b"")
    assert [datagram[start:end] for datagram, start, end in rows] == [b"good", b"more"]


def test_a_dump_interrupted_for_ever_is_given_up(
    kernel: tuple[socket.socket, netlink.NetlinkSocket],
) -> None:
    theirs, client = kernel
    for sequence in range(1, 100):
        theirs.send(answer(3, sequence, DONE, flags=2 | 0x10))
    with pytest.raises(KernelError, match="cannot read routes from the kernel: they kept changing"):
        client.dump("routes", 26, b"")


def test_a_refused_dump_says_why(kernel: tuple[socket.socket, netlink.NetlinkSocket]) -> None:
    theirs, client = kernel
    theirs.send(error(1, errno.EINVAL, "Invalid header for dump request"))
    with pytest.raises(
        KernelError, match=r"routes from the kernel: Invalid header for dump request \(EINVAL\)"
    ):
        client.dump("routes", 26, b"")
    theirs.send(error(2, errno.ENOENT, "ipv4: FIB table does not exist"))
    assert client.dump("routes", 26, b"", absent=(errno.ENOENT,)) == []


def test_errors_find_their_messages(kernel: tuple[socket.socket, netlink.NetlinkSocket]) -> None:
    theirs, client = kernel
    theirs.send(error(2, errno.EINVAL, "Nexthop has invalid gateway"))
    theirs.send(error(3, errno.EPERM))
    theirs.send(error(4, errno.ENODEV, "no such thing", whole=bytes(28)))
    theirs.send(error(5, 0))
    outcomes = client.transact([rt.delete_nexthop(number) for number in range(5)])
    assert [outcome and outcome.reason for outcome in outcomes] == [
        None,
        "Nexthop has invalid gateway (EINVAL)",
        "not permitted, needs CAP_NET_ADMIN (EPERM)",
        "no such thing (ENODEV)",
        None,
    ]
    sent = theirs.recv(65536)
    flags = [flags for _, flags, _, _, _, _ in netlink.messages(sent)]
    assert flags == [1, 1, 1, 1, 5]  # only the last asks for an answer


def test_lost_answers_are_no_successes(kernel: tuple[socket.socket, netlink.NetlinkSocket]) -> None:
    theirs, client = kernel
    theirs.send(error(1, errno.EINVAL))
    outcomes = client.transact([rt.delete_nexthop(number) for number in range(3)])
    assert [outcome and outcome.reason for outcome in outcomes] == [
        "Invalid argument (EINVAL)",
        "the kernel's answer was lost (ENOBUFS)",
        "the kernel's answer was lost (ENOBUFS)",
    ]


def test_sequence_numbers_begin_anew(kernel: tuple[socket.socket, netlink.NetlinkSocket]) -> None:
    theirs, client = kernel
    client._sequence = 0xFFFF_FFFE
    theirs.send(error(2, 0))
    assert client.transact([rt.delete_nexthop(number) for number in range(2)]) == [None, None]
    assert [sequence for _, _, sequence, _, _, _ in netlink.messages(theirs.recv(65536))] == [1, 2]
