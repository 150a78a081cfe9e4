"""The plan: safe after every step, touching nothing that is right, against a kernel with its own rules."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address, ip_interface, ip_network
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.addresses import IPNetwork, PerFamily, Subnets
from flanneld_py.core.describe import NOUNS, describe
from flanneld_py.core.plan import apply_all, must_recreate, plan
from flanneld_py.datapath import Endpoint, PumpSettings, TunLink
from flanneld_py.model import NextHop, Op, Route, State, Table, VxlanLink
from flanneld_py.packetfilter import Chain, ChainKey
from tests.unit.fake_kernel import FakeKernel, fixed, kernels
from tests.unit.strategies import TABLES, neighbour, states, thorough, usual

ROUNDS = 3


def black_holes(kernel: FakeKernel) -> set[IPNetwork]:
    """Where routes into a tunnel lead for want of the neighbour or its FDB entry."""
    return {to for to, route in kernel.tables["routes"].items() if is_black_hole(kernel, route)}


def is_black_hole(kernel: FakeKernel, route: Route) -> bool:
    hop = route.nexthop
    if hop.dev not in kernel.tables["links"]:
        return False
    if hop.via is None:
        return hop.dev not in kernel.tables["pumps"]
    mac = kernel.tables["neighs"].get(neighbour(hop))
    return mac is None or (hop.dev, mac) not in kernel.tables["fdb"]


def changes_a_mac(want: State, have: State) -> bool:
    """Of a device in place: then the kernel drops its neighbours, and a second look is needed."""
    return any(
        isinstance(old := have.links.get(name), VxlanLink)
        and isinstance(link, VxlanLink)
        and old.mac != link.mac
        and not must_recreate(old, link)
        for name, link in want.links.items()
    )


def apply(kernel: FakeKernel, ops: list[Op]) -> None:
    for op in ops:
        error = kernel.apply(op)
        assert error is None, f"{describe(op)}: {error}"


def converge(want: State, kernel: FakeKernel) -> int:
    """Plan and apply until nothing is left; the answer is how often."""
    for rounds in range(ROUNDS):
        ops = plan(want, kernel.observe(want.sysctls))
        if not ops:
            assert kernel.observe(want.sysctls) == want
            return rounds
        apply(kernel, ops)
    raise AssertionError(f"not converged: {plan(want, kernel.observe(want.sysctls))}")


# --- properties -----------------------------------------------------------------------------------


@usual
@given(states())
def test_nothing_to_do_when_all_is_as_wanted(state: State) -> None:
    assert plan(state, state) == []
    assert plan(state, FakeKernel.holding(state).observe(state.sysctls)) == []


@thorough
@given(states(), kernels())
def test_one_plan_leads_from_anything_to_what_is_wanted(want: State, kernel: FakeKernel) -> None:
    have = kernel.observe(want.sysctls)
    assert apply_all(have, plan(want, have)) == want
    rounds = converge(want, kernel)
    assert rounds <= (2 if changes_a_mac(want, have) else 1)


@thorough
@given(states(), kernels())
def test_after_every_step_what_worked_and_shall_work_does(want: State, kernel: FakeKernel) -> None:
    have = kernel.observe(want.sysctls)
    assume(not changes_a_mac(want, have))
    ops, kept, broken = plan(want, have), unchanged(want, have), black_holes(kernel)
    for count, op in enumerate(ops, start=1):
        apply(kernel, [op])
        assert black_holes(kernel) <= broken, f"black hole after {describe(op)}"
        for table, rows in kept.items():
            now = kernel.tables[table]
            gone = [key for key, value in rows.items() if now.get(key) != value]
            assert not gone, f"{table} {gone} after {describe(op)}"
        # What is reckoned is what the kernel does; but a device brings sysctls along, of unknown value.
        reckoned = replace(apply_all(have, ops[:count]), sysctls={})
        assert reckoned == replace(kernel.observe(want.sysctls), sysctls={}), f"after {describe(op)}"


@thorough
@given(states(), kernels())
def test_what_is_right_is_not_touched_and_nothing_twice(want: State, kernel: FakeKernel) -> None:
    have = kernel.observe(want.sysctls)
    ops, kept, lost = plan(want, have), unchanged(want, have), vanishing(want, have)
    assert len({(op.verb, op.table, op.key) for op in ops}) == len(ops)
    for verb, table, key, value in ops:
        assert key not in kept[table], f"{verb} {table} {key}"
        if verb == "set":
            assert value == want.table(table)[key]
        elif table != "links":
            assert lost.isdisjoint(devices_of(table, key, have.table(table)[key])), "goes with its device"


@thorough
@given(states(), kernels(), st.data())
def test_stopped_after_any_step_the_next_plan_ends_it(
    want: State, kernel: FakeKernel, data: st.DataObject
) -> None:
    ops = plan(want, kernel.observe(want.sysctls))
    for stop in data.draw(st.sets(st.integers(0, len(ops)), max_size=3)) | {len(ops) // 2}:
        interrupted = kernel.copy()
        apply(interrupted, ops[:stop])
        converge(want, interrupted)


@usual
@given(kernels())
def test_cleanup_is_a_plan_for_nothing(kernel: FakeKernel) -> None:
    assert converge(State(), kernel) <= 1


def unchanged(want: State, have: State) -> dict[Table, dict[Any, Any]]:
    """The rows that are as wanted, and hang on nothing that must go."""
    lost = vanishing(want, have)
    return {
        table: {
            key: value
            for key, value in want.table(table).items()
            if have.table(table).get(key) == value and lost.isdisjoint(devices_of(table, key, value))
        }
        for table in TABLES
    }


def vanishing(want: State, have: State) -> set[str]:
    """The devices that the kernel cannot keep, by its own rules."""
    return {
        name
        for name, old in have.links.items()
        if (new := want.links.get(name)) is None or fixed(old) != fixed(new)
    }


def devices_of(table: str, key: object, value: object) -> tuple[str, ...]:
    """The devices that a row hangs on or is."""
    match table, key, value:
        case "links" | "offloads" | "pumps", str(name), _:
            return (name,)
        case "sysctls", str(path), _:
            return (path.split("/")[-2],)
        case "files" | "blackholes" | "rules", _, _:
            return ()
        case "nexthops", NextHop() as hop, _:
            return (hop.dev,)
        case "routes", _, Route() as route:
            return (route.nexthop.dev,)
        case _, (str(dev), _), _:
            return (dev,)
    raise AssertionError(f"{table} {key}")


# --- by example -----------------------------------------------------------------------------------

LINK = VxlanLink(
    vni=1,
    port=8472,
    dev="eth0",
    local=ip_address("192.0.2.1"),
    mtu=1450,
    mac="02:00:00:00:00:01",
    alias="flanneld-py:/coreos.com/network",
)
HOP = NextHop("flannel.1", ip_address("10.5.3.0"), onlink=True)


def overlay(peer_mac: str = "02:00:00:00:00:03", public: str = "192.0.2.3", link: VxlanLink = LINK) -> State:
    """One peer behind flannel.1."""
    return State(
        links={"flannel.1": link},
        sysctls={"net/ipv6/conf/flannel.1/accept_ra": "0"},
        offloads={"flannel.1": False},
        addrs={("flannel.1", ip_interface("10.5.1.0/32")): True},
        fdb={("flannel.1", peer_mac): ip_address(public)},
        neighs={neighbour(HOP): peer_mac},
        nexthops={HOP: True},
        routes={ip_network("10.5.3.0/24"): Route(HOP)},
        blackholes={ip_network("10.5.1.0/24"): True},
        rules={ChainKey("nft", "ip", "flannel-ipv4", "forward"): Chain()},
        files={"/run/flannel/subnet.env": "FLANNEL_MTU=1450\n"},
    )


def in_user_space() -> State:
    """What backend udp wants with one peer."""
    network = ip_network("10.5.0.0/16")
    own: Subnets = PerFamily(ip_network("10.5.1.0/24"))
    return State(
        links={"flannel0": TunLink(1472, "flanneld-py:/p")},
        sysctls={"net/ipv6/conf/flannel0/accept_ra": "0"},
        addrs={("flannel0", ip_interface("10.5.1.0/32")): True},
        pumps={"flannel0": PumpSettings(IPv4Address("192.0.2.1"), 8285, own, (network,), 1472)},
        tunnel={
            ("flannel0", ip_network("10.5.3.0/24")): Endpoint(IPv4Address("192.0.2.3"), 8285, ipv6=False)
        },
        routes={network: Route(NextHop("flannel0", None, onlink=False))},
    )


def steps(want: State, have: State) -> list[str]:
    return [f"{op.verb} {op.table}" for op in plan(want, have)]


def test_from_nothing_in_the_order_of_dependence() -> None:
    kernels_own = [table for table in TABLES if table not in ("pumps", "tunnel")]
    assert steps(overlay(), State()) == [f"set {table}" for table in kernels_own]


def test_a_tun_goes_with_its_pump_and_its_peers() -> None:
    tun = in_user_space()
    made = ["links", "sysctls", "addrs", "pumps", "tunnel", "routes"]
    assert steps(tun, State()) == [f"set {table}" for table in made]
    assert steps(State(), tun) == ["del links"]


def test_from_vxlan_to_udp_nothing_goes_before_its_replacement_stands() -> None:
    found = steps(in_user_space(), replace(overlay(), blackholes={}, rules={}, files={}))
    assert found == [
        *("set links", "set sysctls", "set addrs", "set pumps", "set tunnel", "set routes"),
        "del links",
    ]


def test_to_nothing_the_file_first_and_the_device_takes_its_rows_along() -> None:
    assert steps(State(), overlay()) == ["del files", "del rules", "del blackholes", "del links"]


def test_a_peers_new_mac_stands_in_the_fdb_before_the_neighbour_points_to_it() -> None:
    assert plan(overlay("02:00:00:00:00:33"), overlay()) == [
        Op("set", "fdb", ("flannel.1", "02:00:00:00:00:33"), ip_address("192.0.2.3")),
        Op("set", "neighs", ("flannel.1", HOP.via), "02:00:00:00:00:33"),
        Op("del", "fdb", ("flannel.1", "02:00:00:00:00:03")),
    ]


def test_a_peers_new_address_is_one_step() -> None:
    assert plan(overlay(public="192.0.2.77"), overlay()) == [
        Op("set", "fdb", ("flannel.1", "02:00:00:00:00:03"), ip_address("192.0.2.77"))
    ]


def test_a_peer_that_left_loses_its_route_first() -> None:
    alone = replace(overlay(), fdb={}, neighs={}, nexthops={}, routes={})
    assert steps(alone, overlay()) == ["del routes", "del nexthops", "del neighs", "del fdb"]


def test_own_subnet_changed_the_new_address_comes_before_the_old_one_goes() -> None:
    # With its last address the device would lose its neighbours.
    moved = replace(overlay(), addrs={("flannel.1", ip_interface("10.5.9.0/32")): True})
    assert steps(moved, overlay()) == ["set addrs", "del addrs"]


AGAIN = ("links", "sysctls", "offloads", "addrs", "fdb", "neighs", "nexthops", "routes")
"""What is to be made when a device goes."""


@pytest.mark.parametrize("change", [{"vni": 2}, {"port": 4789}, {"local": ip_address("2001:db8::1")}])
def test_what_the_kernel_cannot_change_is_replaced_when_the_new_one_stands(change: dict[str, object]) -> None:
    want = overlay(link=replace(LINK, **change))
    assert steps(want, overlay()) == [f"set {table}" for table in AGAIN]


def test_what_cannot_stand_beside_the_new_one_goes_first() -> None:
    want = overlay(link=replace(LINK, gbp=True))
    assert steps(want, overlay()) == ["del links", *(f"set {table}" for table in AGAIN)]


@pytest.mark.parametrize(
    "change",
    [
        {"mtu": 1400},
        {"mac": "02:00:00:00:00:09"},
        {"dev": "eth1"},
        {"local": ip_address("192.0.2.9")},
        {"learning": True},
        {"alias": ""},
    ],
)
def test_what_the_kernel_can_change_is_changed_in_place(change: dict[str, object]) -> None:
    want = overlay(link=replace(LINK, **change))
    assert plan(want, overlay()) == [Op("set", "links", "flannel.1", want.links["flannel.1"])]


def test_a_renamed_device_of_ours_makes_room_first() -> None:
    # Two devices of one VNI and port cannot be: what the new one needs is not to be had before.
    renamed = State(links={"lost0": LINK})
    assert steps(overlay(), renamed)[:2] == ["del links", "set links"]


def test_another_vni_stands_before_the_old_device_goes() -> None:
    old = State(links={"flannel.2": replace(LINK, vni=2)})
    assert steps(overlay(), old)[0] == "set links"
    assert steps(overlay(), old)[-1] == "del links"


def test_a_change_of_our_own_mac_needs_a_second_look() -> None:
    want = overlay(link=replace(LINK, mac="02:00:00:00:00:09"))
    kernel = FakeKernel.holding(overlay())
    assert converge(want, kernel) == 2


def test_equal_values_of_other_types_are_equal() -> None:
    assert plan(overlay(), replace(overlay(), routes={ip_network("10.5.3.0/24"): Route(HOP, 96)})) == []
    foreign = replace(overlay(), routes={ip_network("10.5.3.0/24"): Route(HOP, 3)})
    assert steps(overlay(), foreign) == ["set routes"]


# --- describe -------------------------------------------------------------------------------------


def test_ops_in_the_words_of_iproute2() -> None:
    said = [describe(op) for op in plan(overlay(), State())]
    assert said == [
        "set link flannel.1 type vxlan id 1 dstport 8472 dev eth0 local 192.0.2.1 "
        "mtu 1450 address 02:00:00:00:00:01 up",
        "set sysctl net/ipv6/conf/flannel.1/accept_ra=0",
        "set checksum offload dev flannel.1 off",
        "set address 10.5.1.0/32 dev flannel.1",
        "set fdb entry 02:00:00:00:00:03 dev flannel.1 dst 192.0.2.3",
        "set neighbour 10.5.3.0 dev flannel.1 lladdr 02:00:00:00:00:03",
        "set nexthop via 10.5.3.0 dev flannel.1 onlink",
        "set route 10.5.3.0/24 via 10.5.3.0 dev flannel.1 onlink",
        "set blackhole route 10.5.1.0/24",
        "set file /run/flannel/subnet.env",
        "set rules of ip flannel-ipv4 forward (0)",
    ]
    assert describe(Op("del", "links", "flannel.1")) == "del link flannel.1"
    assert describe(Op("del", "routes", ip_network("10.5.3.0/24"))) == "del route 10.5.3.0/24"
    assert describe(Op("del", "fdb", ("flannel.1", "02:00:00:00:00:03"))) == (
        "del fdb entry 02:00:00:00:00:03 dev flannel.1"
    )


@usual
@given(states(), kernels())
def test_different_ops_of_a_plan_are_described_differently(want: State, kernel: FakeKernel) -> None:
    ops = plan(want, kernel.observe(want.sysctls))
    said = [describe(op) for op in ops]
    assert len(set(said)) == len(ops)
    assert all("\n" not in line and "None" not in line for line in said)
    assert set(NOUNS) == set(TABLES)
