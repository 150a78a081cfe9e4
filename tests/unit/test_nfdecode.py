"""Expressions of nf_tables as bytes: what our tools do not write, what makes no sense, and old kernels."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.drivers import netlink, nfmonitor, nfreader
from flanneld_py.drivers.nfdecode import Elements, Meaning, decode_expressions, split_counters
from flanneld_py.drivers.nfmessages import comment_of
from flanneld_py.drivers.nfreader import NfReader
from flanneld_py.errors import KernelError
from flanneld_py.packetfilter import Mark, Match, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

EQ, NEQ, LTE, GTE = 0, 1, 3, 5
META_MARK, META_IIFNAME = 3, 6
NAMES = [
    *("bitwise", "byteorder", "cmp", "connlimit", "counter", "ct", "dup", "dynset", "exthdr", "fib"),
    *("flow_offload", "hash", "immediate", "last", "limit", "log", "lookup", "masq", "match", "meta"),
    *("nat", "notrack", "numgen", "objref", "osf", "payload", "queue", "quota", "range", "redir", "reject"),
    *("rt", "socket", "synproxy", "target", "tproxy", "tunnel", "xfrm", "anything"),
]


def attribute(kind: int, value: int | str | bytes | Mapping[int, Any]) -> bytes:
    """A number of four bytes, a name, a value as it is, or attributes."""
    if isinstance(value, int):
        data = struct.pack("!I", value)
    elif isinstance(value, str):
        data = value.encode() + b"\0"
    elif isinstance(value, bytes):
        data = value
    else:
        data = b"".join(attribute(*item) for item in value.items())
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def expression(name: str, **found: Any) -> bytes:
    """Its attributes are given as a1, a2 and so on."""
    return attribute(1, name) + attribute(2, {int(key[1:]): value for key, value in found.items()})


def compare(value: bytes, operator: int = EQ, register: int = 1) -> bytes:
    return expression("cmp", a1=register, a2=operator, a3={1: value})


def payload(offset: int, size: int, register: int = 1) -> bytes:
    """Of the network header."""
    return expression("payload", a1=register, a2=1, a3=offset, a4=size)


def decoded(*expressions: bytes, family: Any = "ip", elements: Elements | None = None) -> Meaning:
    return decode_expressions(family, expressions, lambda _: elements)


def matches(*expressions: bytes) -> tuple[Match, ...]:
    ((found, verdict),) = decoded(*expressions).ways
    assert verdict == Verdict("none")
    return found


def host(number: int) -> bytes:
    return struct.pack("=I", number)


# --- what makes no sense --------------------------------------------------------------------------


@given(st.sampled_from(["ip", "ip6", "inet"]), st.binary())
def test_no_bytes_are_too_strange(family: Any, data: bytes) -> None:
    asked, _ = split_counters(data)
    decode_expressions(family, (*asked, data), lambda _: None)
    comment_of(data)


values = st.recursive(
    st.one_of(
        st.integers(0, 25),
        st.binary(max_size=20),
        st.sampled_from(["conntrack", "mark", "state", "comment", "MASQUERADE", "__set0"]),
        st.sampled_from([1, 2, 4, 8, 16]).flatmap(lambda n: st.binary(min_size=n, max_size=n)),
    ),
    lambda inner: st.dictionaries(st.integers(1, 3), inner, max_size=3),
    max_leaves=4,
)
expressions = st.tuples(st.sampled_from(NAMES), st.dictionaries(st.integers(1, 8), values, max_size=8)).map(
    lambda both: attribute(1, both[0]) + attribute(2, both[1])
)
sensible = st.one_of(
    st.sampled_from(range(40)).map(lambda key: expression("meta", a1=1, a2=key)),
    st.tuples(st.sampled_from([0, 9, 12, 16, 8, 24]), st.integers(0, 20)).map(lambda both: payload(*both)),
    st.sampled_from(range(20)).map(lambda key: expression("ct", a1=1, a2=key)),
    st.tuples(st.binary(max_size=20), st.integers(0, 7)).map(lambda both: compare(*both)),
    st.tuples(st.binary(max_size=17), st.binary(max_size=17)).map(
        lambda both: expression("range", a1=1, a2=0, a3={1: both[0]}, a4={1: both[1]})
    ),
    st.integers(0, 16).flatmap(
        lambda n: st.tuples(st.binary(min_size=n, max_size=n), st.binary(min_size=n, max_size=n)).map(
            lambda both: expression("bitwise", a1=1, a2=1, a3=n, a4={1: both[0]}, a5={1: both[1]}, a6=0)
        )
    ),
    st.just(expression("lookup", a1="s", a2=1)),
    st.just(expression("lookup", a1="s", a2=1, a3=0)),
    expressions,
)
elements = st.none() | st.builds(
    lambda size, spans: Elements(size, spans, [Verdict("drop")] * len(spans)),
    st.sampled_from([1, 2, 4, 16]),
    st.lists(st.tuples(st.integers(0, 2**130), st.integers(0, 2**130)), max_size=4),
)


@given(st.sampled_from(["ip", "ip6", "inet"]), st.lists(sensible, max_size=8), elements)
def test_no_expressions_are_too_strange(family: Any, data: list[bytes], found: Elements | None) -> None:
    meaning = decode_expressions(family, data, lambda _: found)
    assert meaning == decode_expressions(family, data, lambda _: found)
    hash(meaning)


# --- what other versions of the tools write -------------------------------------------------------


def test_registers_of_four_bytes() -> None:
    """NFT_REG32_00 … are the four quarters of NFT_REG_1, and so on."""
    found = matches(
        payload(16, 2, register=9), payload(12, 4, register=8), compare(bytes((10, 5)), register=9)
    )
    assert str(found[0].values[0]) == "10.5.0.0/16"
    assert matches(expression("meta", a1=1, a2=META_MARK), compare(host(1), register=8))[0].field == "mark"


def test_a_register_that_was_loaded_over_is_not_taken_for_what_it_was() -> None:
    over = matches(
        payload(12, 4, register=9), expression("meta", a1=1, a2=META_IIFNAME), compare(bytes(4), register=9)
    )
    assert over[0].field == "other"


def test_one_register_may_be_compared_twice() -> None:
    found = matches(payload(12, 4), compare(bytes((10, 0, 0, 0)), NEQ), compare(bytes((10, 0, 0, 1)), NEQ))
    assert [(match.field, str(match.values[0]), match.negated) for match in found] == [
        ("saddr", "10.0.0.0/32", True),
        ("saddr", "10.0.0.1/32", True),
    ]


def test_a_lowest_and_a_highest_value_of_different_loads_are_two_conditions() -> None:
    low, high = compare(bytes((128, 0, 0, 0)), GTE), compare(bytes((127, 255, 255, 255)), LTE)
    assert len(matches(payload(12, 4), low, payload(16, 4), high)) == 2
    assert len(matches(payload(12, 4), low, high)) == 2  # nothing is in both


def test_a_range_that_ends_before_it_begins_is_no_address() -> None:
    """Found by arbitrary expressions."""
    backwards = expression("range", a1=1, a2=0, a3={1: bytes((10, 0, 0, 2))}, a4={1: bytes((10, 0, 0, 1))})
    assert matches(payload(12, 4), backwards) == (Match("other", ("saddr 167772162-167772161",)),)


def test_a_flipped_value_is_flipped_back() -> None:
    flip = expression("bitwise", a1=1, a2=1, a3=4, a4={1: b"\xff" * 4}, a5={1: host(0x3)}, a6=0)
    assert matches(expression("meta", a1=1, a2=META_MARK), flip, compare(host(0x1))) == (
        Match("mark", (Mark(0x2),)),
    )


def test_bitwise_of_two_registers_is_not_understood() -> None:
    both = expression("bitwise", a1=1, a2=1, a3=4, a6=3, a8=2)
    (found,) = matches(expression("meta", a1=1, a2=META_MARK), both, compare(host(1)))
    assert found.field == "other"


def test_an_address_in_an_inet_table_needs_its_version() -> None:
    (found,), _ = decoded(payload(12, 4), compare(bytes((10, 0, 0, 1))), family="inet").ways[0]
    assert found == Match("other", ("network header bytes 12-15 167772161",))


def test_masquerading_to_ports_is_not_ours() -> None:
    assert decoded(expression("masq", a1=0x10)).ways[0][1] == Verdict("masquerade", fully_random=True)
    assert decoded(expression("masq", a1=0x12, a2=1, a3=1)).ways[0][1] == Verdict("nat")


def test_an_expression_that_is_new_to_us_makes_the_verdict_unknown() -> None:
    assert decoded(expression("teleport")).ways == (((Match("other", ("teleport",)),), Verdict("unknown")),)


def test_counters_are_told_apart_from_what_is_asked() -> None:
    counter = expression("counter", a1=(7).to_bytes(8, "big"), a2=(3).to_bytes(8, "big"))
    others = [compare(b"\1"), expression("notrack")]
    data = b"".join(attribute(1, one) for one in (others[0], counter, others[1]))
    assert split_counters(data) == (tuple(others), 3)
    assert split_counters(attribute(1, others[0])) == ((others[0],), None)


def test_a_comment_may_stand_behind_other_userdata() -> None:
    assert comment_of(b"\x01\x04abcd\x00\x03hi\0") == "hi"
    assert comment_of(b"\x01\x04abcd") == ""


# --- kernels without nf_tables --------------------------------------------------------------------


class WithoutNfTables:
    """What is seen of nfnetlink where no nf_tables is registered."""

    port_id = 1

    def __init__(self, protocol: int) -> None:
        assert protocol == 12

    def ask(self, _kind: int, _body: bytes) -> netlink.Failure:
        return netlink.failure(errno.EINVAL)

    def close(self) -> None:
        pass


def test_a_kernel_without_nf_tables_has_no_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nfreader, "NetlinkSocket", WithoutNfTables)
    reader = NfReader()
    assert reader.generation() == 0
    assert reader.chains() == {}
    reader.close()


def test_a_kernel_without_netfilter_has_no_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_protocol: int) -> None:
        raise netlink.ProtocolMissing

    monkeypatch.setattr(nfreader, "NetlinkSocket", refuse)
    reader = NfReader()
    assert reader.generation() == 0
    assert reader.chains() == {}
    assert reader.port_id == 0
    reader.close()


def test_a_kernel_without_netfilter_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_protocol: int) -> None:
        raise netlink.ProtocolMissing

    monkeypatch.setattr(nfmonitor, "open_socket", refuse)
    monitor = nfmonitor.NfMonitor()
    assert monitor.wait(0) is None
    monitor.interrupt()
    assert monitor.wait(60) is None
    monitor.close()


def test_a_protocol_that_the_kernel_lacks_is_told() -> None:
    with pytest.raises(netlink.ProtocolMissing):
        netlink.open_socket(31)
    assert issubclass(netlink.ProtocolMissing, KernelError)
