"""Answers that no kernel should give, each found by a fuzz target (tests/fuzz): an error that says so."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from flanneld_py.drivers import blackholes, hostroutes, links, nfreader
from flanneld_py.drivers import nfmessages as nf
from flanneld_py.drivers import rtmessages as rt
from flanneld_py.drivers.monitor import Heard, Monitor
from flanneld_py.drivers.netlink import attribute
from flanneld_py.drivers.nfdecode import decode_expressions
from flanneld_py.drivers.nfmonitor import NfMonitor, Touched
from flanneld_py.errors import KernelError
from flanneld_py.model import Scope
from flanneld_py.packetfilter import Verdict
from tests.fuzz import netlink, nftables
from tests.fuzz.kernel import FuzzedSocket, Message, Wire
from tests.unit import cni_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCOPE = Scope("/coreos.com/network", netlink.NETWORKS)
plugin = cni_calls.load()


def answers(*messages: Message) -> FuzzedSocket:
    """The socket of a driver to which the kernel says this, whatever is asked."""
    return FuzzedSocket(Wire(messages, netlink.KINDS))


# --- rtnetlink ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (links.read_devices, netlink.LINK),
        (links.read_addresses, netlink.ADDRESS),
        (lambda socket: hostroutes.read_main(socket, 4, {}), netlink.ROUTE),
        (lambda socket: hostroutes.look_up(socket, netlink.PEER[0]), netlink.ROUTE),
    ],
)
def test_a_message_cut_short_is_an_error_that_says_of_what(
    read: Callable[[FuzzedSocket], object], kind: int
) -> None:
    with pytest.raises(KernelError, match=r"^cannot understand .+ that the kernel shows: "):
        read(answers(Message(kind, 0, b"\2")))


def test_a_route_to_an_address_of_three_bytes() -> None:
    body = rt.RTMSG.pack(2, 24, 0, 0, 254, 96, 0, rt.RTN_BLACKHOLE, 0) + attribute(rt.RTA_DST, b"\x0a\5\1")
    metric = attribute(rt.RTA_PRIORITY, struct.pack("=I", rt.BLACKHOLE_METRIC))
    wire = Wire([Message(netlink.ROUTE, 0, body + metric)], netlink.KINDS)
    with patch.object(blackholes, "NetlinkSocket", lambda: FuzzedSocket(wire)):
        driver = blackholes.Blackholes(SCOPE.prefix)
    assert driver.observe(SCOPE).blackholes == {}


@pytest.mark.parametrize("code", [-(1 << 31), -5000])
def test_an_error_of_a_number_that_there_is_not(code: int) -> None:
    with pytest.raises(KernelError, match=r"^cannot read links from the kernel: .*4095"):
        links.read_devices(answers(Message(netlink.REFUSED, 0, struct.pack("=i", code) + bytes(16))))


def test_words_of_the_kernel_that_cannot_be_printed() -> None:
    refused = struct.pack("=iIHHII", -17, 16, 0, 0, 0, 0) + attribute(1, b"\x1b[2J\n\0")
    with pytest.raises(KernelError) as caught:
        links.read_devices(answers(Message(netlink.REFUSED, 0, refused)))
    assert str(caught.value) == "cannot read links from the kernel: File exists (EEXIST)"


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    made = Monitor()
    yield made
    made.close()


@pytest.mark.parametrize("body", [b"", b"\2"], ids=["empty", "short"])
def test_a_notification_that_makes_no_sense_is_a_reason_to_look_at_everything(
    monitor: Monitor, body: bytes
) -> None:
    monitor.follow(netlink.WANTED, SCOPE)
    wire = Wire([Message(netlink.NEIGHBOUR, 0, body)], netlink.KINDS)
    wire.tell()
    with patch.object(monitor, "_socket", wire):
        assert monitor._drain() == Heard(overflow=True)


def test_a_device_of_a_negative_number() -> None:
    assert links.device_name(-1) == ""


# --- nf_tables ------------------------------------------------------------------------------------


def test_a_notification_of_rules_without_a_body() -> None:
    monitor = NfMonitor()
    wire = Wire([Message(nftables.RULE, 0, b"")], nftables.KINDS)
    wire.tell()
    with patch.object(monitor, "_socket", wire):
        heard = monitor._drain()
    monitor.close()
    assert heard == Touched(overflow=True)


def test_a_chain_without_a_body() -> None:
    generation = nf.body() + attribute(nf.GEN_ID, b"\0\0\0\7")
    messages = [Message(nftables.GENERATION, 0, generation), Message(nftables.CHAIN, 0, b"")]
    wire = Wire(messages, nftables.KINDS)
    with patch.object(nfreader, "NetlinkSocket", lambda _: FuzzedSocket(wire)):
        reader = nfreader.NfReader()
    with pytest.raises(KernelError, match=r"^cannot understand the packet-filter rules"):
        reader.chains()


def test_a_part_of_a_header_that_fits_into_no_register_takes_no_memory() -> None:
    register = attribute(1, b"\0\0\0\1")
    size = register + attribute(2, b"\0\0\0\1") + attribute(3, b"\0\0\0\x0c") + attribute(4, b"\xff" * 4)
    mask = register + attribute(2, b"\0\0\0\1") + attribute(4, b"") + attribute(5, b"")
    compared = register + attribute(2, b"\0\0\0\0") + attribute(3, attribute(1, b"\1"))
    expressions = [
        attribute(1, name + b"\0") + attribute(2, found)
        for name, found in ((b"payload", size), (b"bitwise", mask), (b"cmp", compared))
    ]
    (((match,), _),) = decode_expressions("ip", expressions, lambda _: None).ways
    assert match.field == "other"


# --- the CNI plugin -------------------------------------------------------------------------------


class Answering:
    """In the place of the plugin's `_socket`: one datagram to whatever is asked."""

    def __init__(self, datagram: bytes) -> None:
        self._datagram = datagram

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)

    def if_nametoindex(self, _: str) -> int:
        return 7

    def socket(self, *_: int) -> Answering:
        return self

    def send(self, _: bytes) -> None:
        """Taken."""

    def recv(self, _: int) -> bytes:
        return self._datagram

    def close(self) -> None:
        """Nothing to give back."""


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (bytes(16), "the kernel answers with a message of 0 bytes"),
        (struct.pack("=IHHII", 999, 20, 0, 0, 0), "the kernel answers with a message of 999 bytes"),
        (struct.pack("=IHHIIBBBBI", 24, 20, 0, 0, 0, 2, 24, 0, 0, 7), "cannot understand .* says of cni0"),
        (struct.pack("=IHHII", 16, 20, 0, 0, 0), "cannot understand .* says of cni0"),
    ],
    ids=["no length", "a length beyond the end", "no address", "no body"],
)
def test_what_the_plugin_says_of_an_answer_about_the_bridge(datagram: bytes, reason: str) -> None:
    lease = plugin.Lease(cni_calls.IPV4)
    with patch.object(plugin, "_socket", Answering(datagram)), pytest.raises(OSError, match=reason):
        plugin.bridge_misfit({"type": "bridge", "isGateway": True}, lease)


def test_a_zero_byte_in_an_address_is_named_with_it() -> None:
    with pytest.raises(ValueError, match=r"^invalid CIDR address: 10\.1\.0\x000/16$"):
        plugin.Net("10.1.0\x000/16")


def test_one_key_of_a_map_with_two_verdicts() -> None:
    twice = [nfreader.Element(7, False, Verdict("jump", "a")), nfreader.Element(7, False, Verdict("accept"))]
    assert nfreader._points(twice) == [((7, 7), twice[0].verdict), ((7, 7), twice[1].verdict)]
