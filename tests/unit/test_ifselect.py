"""Which interface and addresses carry the overlay."""

# ruff: noqa: N802, S104 - tests bear the numbers of the specification; 0.0.0.0 is a value here, not bound

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.addresses import Family, IPAddress, PerFamily
from flanneld_py.core.ifselect import in_use_first, pattern_of, select
from flanneld_py.errors import HostError, HostNotReady, UsageError
from flanneld_py.model import AddressFacts, External, HostFacts, LinkFacts, Way

V4: tuple[Family, ...] = (4,)
V6: tuple[Family, ...] = (6,)
DUAL: tuple[Family, ...] = (4, 6)


def address(text: str, **more: Any) -> AddressFacts:
    return AddressFacts(ip_interface(text), **more)


def link(name: str, *addresses: str | AddressFacts, index: int = 2, mtu: int = 1500) -> LinkFacts:
    facts = tuple(address(item) if isinstance(item, str) else item for item in addresses)
    return LinkFacts(name, index, mtu, "02:00:00:00:00:01", up=True, addresses=facts)


LO = link("lo", address("127.0.0.1/8", scope="host"), address("::1/128", scope="host"), index=1, mtu=65536)
DUMMY = link(
    "dummy0",
    *("1.10.100.1/24", "192.168.200.128/24", "172.16.30.18/24", "172.16.31.200/24", "172.16.32.100/24"),
    "2001:db8::1/64",
    index=3,
)
ETH0 = link("eth0", "10.0.2.15/24", "fd00:2::15/64", address("fe80::1/64", scope="link"))
BARE = link("eth1", index=9)
HOST = HostFacts((LO, ETH0, DUMMY, BARE), PerFamily("eth0", "eth0"))


def chosen(
    facts: HostFacts = HOST,
    families: tuple[Family, ...] = V4,
    iface: Sequence[str] = (),
    public_ip: str = "",
    public_ipv6: str = "",
) -> External:
    return select(facts, families=families, iface=iface, public_ip=public_ip, public_ipv6=public_ipv6)


def addresses(external: External) -> tuple[str, str | None, str | None]:
    return external.name, *texts(external.addresses)


def public(external: External) -> tuple[str | None, str | None]:
    return texts(external.public)


def texts(of: PerFamily[IPAddress]) -> tuple[str | None, str | None]:
    return None if of.v4 is None else str(of.v4), None if of.v6 is None else str(of.v6)


def refusal(kind: type[Exception], **arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        chosen(**arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- by name and by address -----------------------------------------------------------------------


def test_T37_by_name() -> None:
    found = chosen(iface=["dummy0"])
    address: PerFamily[IPAddress] = PerFamily(IPv4Address("1.10.100.1"))
    assert found == External("dummy0", 1500, address, address, mac="02:00:00:00:00:01")


def test_T38_by_address() -> None:
    assert addresses(chosen(iface=["172.16.30.18"])) == ("dummy0", "172.16.30.18", None)


def test_T39_by_address_in_dual_stack() -> None:
    found = chosen(families=DUAL, iface=["172.16.30.18"])
    assert addresses(found) == ("dummy0", "172.16.30.18", "2001:db8::1")
    assert public(found) == ("172.16.30.18", "2001:db8::1")


def test_dual_stack_by_ipv6_address() -> None:
    assert addresses(chosen(families=DUAL, iface=["2001:db8::1"])) == ("dummy0", "1.10.100.1", "2001:db8::1")


def test_the_ipv6_address_asked_for_is_taken() -> None:
    facts = HostFacts((link("eth0", "2001:db8::1/64", "2001:db8::2/64"),))
    assert addresses(chosen(facts, V6, ["2001:db8::2"])) == ("eth0", None, "2001:db8::2")


def test_ipv6_only() -> None:
    assert chosen(families=V6, iface=["dummy0"]) == External(
        "dummy0",
        1500,
        PerFamily(None, IPv6Address("2001:db8::1")),
        PerFamily(None, IPv6Address("2001:db8::1")),
        mac="02:00:00:00:00:01",
    )


def test_any_spelling_of_an_address() -> None:
    assert addresses(chosen(families=V6, iface=["2001:DB8:0:0::1"])) == ("dummy0", None, "2001:db8::1")


def test_in_order_until_one_fits() -> None:
    assert chosen(iface=["eth9", "10.9.9.9", "eth1", "dummy0", "eth0"]).name == "dummy0"


def test_a_loopback_interface_with_an_address_of_its_own_may_be_named() -> None:
    lo = link("lo", "127.0.0.1/8", "10.9.9.9/32", index=1)
    assert addresses(chosen(HostFacts((lo,)), iface=["lo"])) == ("lo", "10.9.9.9", None)


def test_nothing_fits() -> None:
    message = refusal(
        HostError, families=DUAL, iface=["eth9", "10.9.9.9", "eth1", "127.0.0.1", "fe80::1%eth0"]
    )
    assert message == (
        "--iface 'eth9': there is no such interface; "
        "--iface 10.9.9.9: no interface has this address; "
        "--iface eth1: interface eth1 has no usable IPv4 address; "
        "--iface 127.0.0.1 is a loopback address: expected one that peers can reach; "
        "--iface 'fe80::1%eth0': there is no such interface; "
        "set --iface to one of: eth0 (10.0.2.15, fd00:2::15, fe80::1), "
        "dummy0 (1.10.100.1, 192.168.200.128, 172.16.30.18, 172.16.31.200, 172.16.32.100, 2001:db8::1), "
        "eth1 (no address)"
    )


def test_an_address_of_a_family_not_in_use() -> None:
    assert refusal(HostError, families=V4, iface=["2001:db8::1"]).startswith(
        "--iface 2001:db8::1: expected an address of a family that the config uses, IPv4;"
    )


def test_a_link_without_mtu() -> None:
    facts = HostFacts((link("eth0", "10.0.0.1/24", mtu=0),))
    assert "interface eth0 has MTU 0" in refusal(HostError, facts=facts, iface=["eth0"])


def test_a_host_with_many_interfaces_lists_some_of_them() -> None:
    facts = HostFacts(tuple(link(f"eth{n}", f"10.0.{n}.1/24", index=n) for n in range(200)))
    message = refusal(HostError, facts=facts, iface=["x"])
    assert "eth19 (10.0.19.1), and 180 more" in message
    assert "eth20 " not in message


# --- by pattern -----------------------------------------------------------------------------------


def by_pattern(*patterns: str, facts: HostFacts = HOST, families: tuple[Family, ...] = V4) -> External:
    return select(facts, families=families, iface_regex=patterns)


def test_T35_by_a_pattern_for_addresses() -> None:
    assert addresses(by_pattern(r"192\.168\.200\.\d+")) == ("dummy0", "192.168.200.128", None)


def test_T36_by_a_pattern_for_names() -> None:
    assert addresses(by_pattern(r"dummy\d+")) == ("dummy0", "1.10.100.1", None)


def test_addresses_come_before_names_and_the_best_rank_first() -> None:
    assert addresses(by_pattern("^10")) == ("eth0", "10.0.2.15", None)
    named = link("x172", "10.1.1.1/24", index=2)
    other = link("eth9", address("172.16.0.1/16", secondary=True), "172.16.0.2/16", index=9)
    assert addresses(by_pattern("172", facts=HostFacts((named, other)))) == ("eth9", "172.16.0.2", None)


def test_patterns_go_by_the_index_of_interfaces() -> None:
    facts = HostFacts((link("b", "10.0.0.2/24", index=7), link("a", "10.0.0.1/24", index=3)))
    assert by_pattern("^10", facts=facts).name == "a"


def test_both_families_must_match_on_one_interface() -> None:
    assert addresses(by_pattern("^1[.]10|^2001", families=DUAL)) == ("dummy0", "1.10.100.1", "2001:db8::1")
    with pytest.raises(HostError, match=r"^--iface-regex '2001' matches no usable address and one of IPv6"):
        by_pattern("2001", families=DUAL)
    assert addresses(by_pattern("2001", families=V6)) == ("dummy0", None, "2001:db8::1")


def test_the_overlay_itself_matches_nothing() -> None:
    own = link("flannel.1", "10.5.1.0/32", index=1)
    assert by_pattern("^10", facts=HostFacts((own, ETH0))).name == "eth0"
    with pytest.raises(HostError, match=r"^--iface-regex 'flannel' matches no"):
        by_pattern("flannel", facts=HostFacts((own, ETH0)))


def test_patterns_come_after_names_and_before_the_way() -> None:
    found = select(HOST, families=V4, iface=["eth7"], iface_regex=["no", "dummy"], can_reach="8.8.8.8")
    assert (found.name, found.how) == ("dummy0", "--iface-regex 'dummy'")
    found = select(HOST, families=V4, iface=["eth0"], iface_regex=["dummy"])
    assert (found.name, found.how) == ("eth0", "--iface eth0")


@pytest.mark.parametrize("text", ["(", "*", "[z-a]", "[[:alpha:]]+", r"\Q10.\E"])
def test_patterns_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(ValueError, match="expected a regular expression"):
        pattern_of(text)


@pytest.mark.parametrize("text", ["", "a{2", r"^10\.\d+", "(?i)ETH", "[[]"])
def test_patterns_that_can(text: str) -> None:
    pattern_of(text)


# --- by the way to an address ---------------------------------------------------------------------


def reaching(way: Way | None, families: tuple[Family, ...] = V4, to: str = "192.0.2.9") -> External:
    ways = {ip_address(to): way} if way is not None else {}
    return select(replace(HOST, ways=ways), families=families, can_reach=to)


def test_the_way_fixes_interface_and_address() -> None:
    found = reaching(Way("dummy0", IPv4Address("172.16.31.200")))
    assert addresses(found) == ("dummy0", "172.16.31.200", None)
    assert found.how == "--iface-can-reach 192.0.2.9"


def test_the_way_of_one_family_serves_both() -> None:
    way = Way("dummy0", IPv4Address("172.16.31.200"))
    assert addresses(reaching(way, DUAL)) == ("dummy0", "172.16.31.200", "2001:db8::1")
    assert addresses(reaching(way, V6)) == ("dummy0", None, "2001:db8::1")
    way = Way("eth0", IPv6Address("fd00:2::15"))
    assert addresses(reaching(way, DUAL, "2001:db8:9::1")) == ("eth0", "10.0.2.15", "fd00:2::15")


def test_a_source_of_another_interface_is_none_of_this() -> None:
    assert addresses(reaching(Way("eth0", IPv4Address("172.16.31.200")))) == ("eth0", "10.0.2.15", None)
    assert addresses(reaching(Way("eth0", None))) == ("eth0", "10.0.2.15", None)


def test_no_way() -> None:
    with pytest.raises(HostNotReady, match=r"^--iface-can-reach 192\.0\.2\.9: there is no route to it; set"):
        reaching(None)
    with pytest.raises(HostError, match="is an address of this host itself") as caught:
        reaching(Way("lo", IPv4Address("10.0.2.15")))
    assert not isinstance(caught.value, HostNotReady)


def test_the_way_to_etcd_counts_when_nothing_is_named() -> None:
    etcd = ip_address("192.0.2.9")
    facts = replace(HOST, ways={etcd: Way("dummy0", IPv4Address("172.16.30.18"))})
    found = select(facts, families=V4, registry=etcd)
    assert addresses(found) == ("dummy0", "172.16.30.18", None)
    assert found.how == "the route to etcd (192.0.2.9)"
    assert select(facts, families=V4, registry=etcd, iface=["eth0"]).name == "eth0"
    assert select(facts, families=V4, registry=etcd, public_ip="10.0.2.15").name == "eth0"


# --- the default route ----------------------------------------------------------------------------


def test_the_default_route_by_default() -> None:
    assert addresses(chosen(families=DUAL)) == ("eth0", "10.0.2.15", "fd00:2::15")


def test_one_default_route_is_enough_for_both_families() -> None:
    assert addresses(chosen(HostFacts(HOST.links, PerFamily("eth0")), DUAL)) == (
        "eth0",
        "10.0.2.15",
        "fd00:2::15",
    )


def test_only_the_families_in_use_count() -> None:
    assert chosen(HostFacts(HOST.links, PerFamily("eth0", "dummy0"))).name == "eth0"
    assert chosen(HostFacts(HOST.links, PerFamily("eth0", "dummy0")), V6).name == "dummy0"


def test_default_routes_that_differ() -> None:
    message = refusal(HostError, facts=HostFacts(HOST.links, PerFamily("eth0", "dummy0")), families=DUAL)
    assert message.startswith(
        "the default routes differ: IPv4 by eth0 and IPv6 by dummy0; set --iface to one of: eth0 ("
    )


def test_a_default_route_by_several_interfaces() -> None:
    facts = replace(HOST, default_devices_besides=PerFamily(("dummy0", "eth1")))
    message = refusal(HostError, facts=facts, families=DUAL)
    assert message.startswith(
        "the IPv4 default route leads by several interfaces, eth0, dummy0, eth1; set --iface to one of: "
    )
    assert chosen(facts, V6).name == "eth0"
    assert chosen(facts, iface=["dummy0"]).name == "dummy0"


def test_no_bridge_is_proposed_but_one_that_leads_out() -> None:
    """The others are for containers."""
    br0 = replace(link("br0", "10.0.3.15/24"), kind="bridge")
    cni0 = replace(link("cni0", "10.5.7.1/24"), kind="bridge")
    facts = replace(HOST, links=(LO, br0, cni0, BARE), default_devices=PerFamily("br0"))
    with pytest.raises(HostError, match=r"; set --iface to one of: br0 \(10.0.3.15\), eth1 \(no address\)$"):
        chosen(facts, iface=["eth7"])
    with pytest.raises(HostError, match=r"; set --iface to one of: cni0 \(10.5.7.1\)$"):
        chosen(replace(facts, links=(LO, cni0)), iface=["eth7"])


@pytest.mark.parametrize(
    "devices", [PerFamily(), PerFamily("lo"), PerFamily("gone"), PerFamily(None, "eth0")]
)
def test_no_default_route(devices: PerFamily[str]) -> None:
    message = refusal(HostError, facts=HostFacts(HOST.links, devices))
    assert message.startswith(
        "no default route leads out of this host; set --iface to one of: eth0 (10.0.2.15"
    )


def test_a_default_route_by_an_interface_without_address() -> None:
    message = refusal(HostError, facts=HostFacts(HOST.links, PerFamily("eth1")))
    assert message.startswith(
        "the default route: interface eth1 has no usable IPv4 address; set --iface to one of"
    )


def test_a_renamed_loopback_is_no_way_out() -> None:
    facts = HostFacts((link("loop", "127.0.0.1/8", "10.0.0.1/32"),), PerFamily("loop"))
    assert refusal(HostError, facts=facts).endswith(
        "this host has no interface but loopback: set one up, then name it with --iface"
    )


# --- public addresses -----------------------------------------------------------------------------


def test_a_public_address_names_its_interface() -> None:
    found = chosen(public_ip="172.16.31.200")
    assert (addresses(found), public(found)) == (("dummy0", "172.16.31.200", None), ("172.16.31.200", None))


def test_public_addresses_of_both_families() -> None:
    found = chosen(families=DUAL, public_ip="172.16.31.200", public_ipv6="2001:db8::1")
    assert addresses(found) == ("dummy0", "172.16.31.200", "2001:db8::1")
    assert addresses(chosen(families=DUAL, public_ipv6="2001:db8::1")) == (
        "dummy0",
        "1.10.100.1",
        "2001:db8::1",
    )


def test_public_addresses_on_two_interfaces() -> None:
    message = refusal(HostError, families=DUAL, public_ip="10.0.2.15", public_ipv6="2001:db8::1")
    assert message.startswith(
        "--public-ip 10.0.2.15 is on eth0, but --public-ipv6 2001:db8::1 is on dummy0: expected both on"
    )
    message = refusal(HostError, families=DUAL, iface=["10.0.2.15"], public_ipv6="2001:db8::1")
    assert message.startswith("--iface 10.0.2.15 is on eth0, but --public-ipv6 2001:db8::1 is on dummy0")


def test_a_translated_address_needs_an_interface() -> None:
    message = refusal(HostError, public_ip="203.0.113.5")
    assert message.startswith(
        "--public-ip 203.0.113.5: no interface has this address; if it is translated (NAT), name the"
    )
    for iface in ("eth0", "10.0.2.15"):
        found = chosen(iface=[iface], public_ip="203.0.113.5")
        assert (addresses(found), public(found)) == (("eth0", "10.0.2.15", None), ("203.0.113.5", None))


def test_a_published_address_of_the_interface_itself_is_the_local_end() -> None:
    found = chosen(families=DUAL, iface=["dummy0"], public_ip="172.16.32.100", public_ipv6="2001:db8::9")
    assert addresses(found) == ("dummy0", "172.16.32.100", "2001:db8::1")
    assert public(found) == ("172.16.32.100", "2001:db8::9")


def test_the_address_asked_for_stays_the_local_end() -> None:
    found = chosen(iface=["172.16.30.18"], public_ip="172.16.32.100")
    assert (addresses(found), public(found)) == (("dummy0", "172.16.30.18", None), ("172.16.32.100", None))


def test_public_addresses_of_families_not_in_use_mean_nothing() -> None:
    assert chosen(public_ipv6="2001:db8::1").name == "eth0"
    assert public(chosen(public_ip="10.0.2.15", public_ipv6="2001:db8::1")) == ("10.0.2.15", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"public_ip": "eth0"}, "--public-ip 'eth0': expected an IPv4 address"),
        ({"public_ip": "2001:db8::1"}, "--public-ip '2001:db8::1': expected an IPv4 address"),
        ({"public_ipv6": "10.0.2.15"}, "--public-ipv6 '10.0.2.15': expected an IPv6 address"),
        ({"public_ipv6": "fe80::1%eth0"}, "--public-ipv6 'fe80::1%eth0': expected an IPv6 address"),
        (
            {"public_ip": "127.0.0.1"},
            "--public-ip 127.0.0.1 is a loopback address: expected one that peers can reach",
        ),
        ({"public_ip": "0.0.0.0"}, "--public-ip 0.0.0.0 is unspecified"),
        ({"public_ipv6": "ff02::1"}, "--public-ipv6 ff02::1 is a multicast address"),
    ],
)
def test_public_addresses_refused(arguments: dict[str, str], message: str) -> None:
    assert refusal(UsageError, **arguments).startswith(message)


# --- which address --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "best"),
    [
        (["10.0.0.1/24", "10.0.0.2/24"], "10.0.0.1"),
        ([address("10.0.0.1/24", secondary=True), "10.0.0.2/24"], "10.0.0.2"),
        ([address("10.0.0.1/24", permanent=False), address("10.0.0.2/24", secondary=True)], "10.0.0.2"),
        ([address("169.254.0.1/16"), address("10.0.0.2/24", permanent=False, secondary=True)], "10.0.0.2"),
        ([address("169.254.0.1/16")], "169.254.0.1"),
        ([address("10.0.0.1/24", deprecated=True), address("169.254.0.1/16")], "169.254.0.1"),
        ([address("10.0.0.1/24", scope="link"), "10.0.0.2/24"], "10.0.0.2"),
        (["127.0.0.2/8", "224.0.0.1/4", "10.0.0.2/24"], "10.0.0.2"),
    ],
)
def test_the_best_address(order: list[str | AddressFacts], best: str) -> None:
    facts = HostFacts((link("eth0", *order),))
    assert addresses(chosen(facts, iface=["eth0"])) == ("eth0", best, None)


def test_a_temporary_ipv6_address_comes_last_of_the_global_ones() -> None:
    facts = HostFacts(
        (
            link(
                "eth0",
                address("fe80::2/64", scope="link"),
                address("2001:db8::aaaa/64", permanent=False, secondary=True),
                address("2001:db8::2/64", permanent=False),
            ),
        )
    )
    assert addresses(chosen(facts, V6, ["eth0"])) == ("eth0", None, "2001:db8::2")


LINKS = st.lists(
    st.builds(
        lambda number, items: link(f"eth{number}", *items, index=number),
        st.integers(0, 3),
        st.lists(
            st.builds(
                address,
                st.sampled_from(
                    [
                        "10.0.0.1/24",
                        "10.0.0.2/24",
                        "169.254.1.1/16",
                        "127.0.0.1/8",
                        "fe80::1/64",
                        "fd00::1/64",
                        "::1/128",
                    ]
                ),
                scope=st.sampled_from(["global", "link", "host"]),
                deprecated=st.booleans(),
                permanent=st.booleans(),
                secondary=st.booleans(),
            ),
            max_size=4,
        ),
    ),
    max_size=4,
    unique_by=lambda item: item.name,
)
NAMES = st.sampled_from(["eth0", "eth1", "10.0.0.1", "fd00::1", "127.0.0.1", "x", ""])


@given(
    LINKS,
    st.sampled_from([V4, V6, DUAL]),
    st.lists(NAMES, max_size=2),
    st.sampled_from(["", "10.0.0.2", "203.0.113.1"]),
    st.sampled_from(["", "fd00::1", "2001:db8::99"]),
    st.sampled_from([None, "eth0", "eth1"]),
)
def test_whatever_is_chosen_can_work(
    links: list[LinkFacts],
    families: tuple[Family, ...],
    iface: list[str],
    public_ip: str,
    public_ipv6: str,
    default: str | None,
) -> None:
    facts = HostFacts(tuple(links), PerFamily(default, default))
    try:
        found = chosen(facts, families, iface, public_ip, public_ipv6)
    except HostError:
        return
    held = {item.address.ip for item in next(item for item in links if item.name == found.name).addresses}
    assert tuple(family for family, _ in found.addresses.items()) == families
    assert tuple(family for family, _ in found.public.items()) == families
    for family, own in found.addresses.items():
        assert own in held
        assert not own.is_loopback
        given_public = public_ip if family == 4 else public_ipv6
        assert found.public.get(family) == (ip_address(given_public) if given_public else own)


def test_of_equally_good_addresses_the_one_in_use_is_kept() -> None:
    """The kernel lists the newest IPv6 address first."""
    newest = link("eth0", "fd00:2::77/64", "fd00:2::15/64")
    facts = HostFacts((newest,), PerFamily(None, "eth0"))
    assert addresses(chosen(facts, V6)) == ("eth0", None, "fd00:2::77")
    kept = in_use_first(facts, [ip_interface("fd00:2::15/64").ip])
    assert addresses(chosen(kept, V6)) == ("eth0", None, "fd00:2::15")
    assert in_use_first(facts, []) == facts


def test_an_address_in_use_gives_way_to_a_better_one() -> None:
    old = address("fd00:2::15/64", deprecated=True)
    facts = HostFacts((link("eth0", "fd00:2::77/64", old),), PerFamily(None, "eth0"))
    assert addresses(chosen(in_use_first(facts, [old.address.ip]), V6)) == ("eth0", None, "fd00:2::77")


def test_a_link_local_address_does_not_take_the_place_of_one_in_use() -> None:
    """While an address is being replaced there is none of the family but this."""
    between = HostFacts((link("eth0", "fe80::15/64"),), PerFamily(None, "eth0"))
    assert addresses(chosen(between, V6)) == ("eth0", None, "fe80::15")
    assert addresses(chosen(in_use_first(between, [ip_address("fe80::15")]), V6)) == (
        "eth0",
        None,
        "fe80::15",
    )
    with pytest.raises(HostError, match="no usable IPv6 address"):
        chosen(in_use_first(between, [ip_address("fd00:2::15")]), V6)
