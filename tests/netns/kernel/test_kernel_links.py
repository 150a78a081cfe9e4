"""Links and their addresses against a real kernel, read with `ip -j -d`."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from flanneld_py.core.ownership import link_alias
from flanneld_py.drivers.kernel import KernelLinks, read_host
from flanneld_py.model import Scope, State, VxlanLink
from tests.netns import inside
from tests.netns.inside import Namespace
from tests.netns.kernel.applying import outcome

if TYPE_CHECKING:
    from pathlib import Path

    from tests.netns.inside import Agent

PREFIX = "/coreos.com/network"
ALIAS = link_alias(PREFIX)
NETWORKS = (ip_network("10.5.0.0/16"), ip_network("fd00:5::/32"))
DEV, DEV6 = "flannel.1", "flannel-v6.1"
SCOPE = Scope(PREFIX, NETWORKS, devices=frozenset({DEV, DEV6}))
LINK = VxlanLink(1, 8472, "u0", ip_address("192.0.2.1"), 1450, "02:00:00:00:00:01", ALIAS)
LINK6 = replace(LINK, local=ip_address("fd99::1"), mtu=1430, mac="02:00:00:00:00:06")


def shown(net: Namespace, name: str) -> VxlanLink:
    """A vxlan device as `ip -d link` shows it."""
    (row,) = net.show("link", "show", "dev", name)
    data = row["linkinfo"]["info_data"]
    assert row["linkinfo"]["info_kind"] == "vxlan"
    return VxlanLink(
        vni=data["id"],
        port=data["port"],
        dev=data["link"],
        local=ip_address(data.get("local") or data["local6"]),
        mtu=row["mtu"],
        mac=row["address"],
        alias=row.get("ifalias", ""),
        learning=data["learning"],
        gbp=data.get("gbp", False),
        up="UP" in row["flags"],
    )


# --- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (DEV, LINK),
        (DEV6, LINK6),
        ("flannel.42", replace(LINK, vni=42, port=4789, learning=True, gbp=True, up=False, mtu=1300)),
    ],
)
def test_a_link_is_made(net: Namespace, links: KernelLinks, name: str, wanted: VxlanLink) -> None:
    assert outcome(links, "set", "links", name, wanted) is None
    assert shown(net, name) == wanted
    (row,) = net.show("link", "show", "dev", name)
    assert row.get("txqlen", 0) == 0
    assert links.observe(SCOPE) == State(links={name: wanted})
    assert outcome(links, "set", "links", name, wanted) is None
    assert net.show("link", "show", "dev", name)[0]["ifindex"] == row["ifindex"]
    assert outcome(links, "del", "links", name) is None
    assert outcome(links, "del", "links", name) is None
    assert links.observe(SCOPE) == State()


def test_both_families_share_vni_and_port(net: Namespace, links: KernelLinks) -> None:
    for name, wanted in ((DEV, LINK), (DEV6, LINK6)):
        assert outcome(links, "set", "links", name, wanted) is None
        assert shown(net, name) == wanted


def change_and_back(
    net: Namespace, links: KernelLinks, device: str, link: VxlanLink, change: dict[str, Any]
) -> None:
    """It stays the same device."""
    outcome(links, "set", "links", device, link)
    (before,) = net.show("link", "show", "dev", device)
    for wanted in (replace(link, **change), link):
        assert outcome(links, "set", "links", device, wanted) is None
        assert shown(net, device) == wanted
    assert net.show("link", "show", "dev", device)[0]["ifindex"] == before["ifindex"]


@pytest.mark.parametrize(
    "change",
    [
        {"mac": "02:00:00:00:00:02"},
        {"mtu": 1400},
        {"up": False},
        {"local": ip_address("192.0.2.3")},
        {"learning": True},
        {"dev": "v0", "local": ip_address("192.0.3.1")},
        {"mac": "02:00:00:00:00:02", "mtu": 1300, "up": False, "learning": True},
    ],
    ids=" ".join,
)
def test_a_link_is_changed_in_place(net: Namespace, links: KernelLinks, change: dict[str, Any]) -> None:
    change_and_back(net, links, DEV, LINK, change)


@pytest.mark.parametrize(
    "change",
    [
        {"mtu": 1300},
        {"local": ip_address("fd99::3")},
        {"dev": "v0", "local": ip_address("fd98::1")},
        {"mac": "02:00:00:00:00:07", "learning": True},
    ],
    ids=" ".join,
)
def test_a_link_of_ipv6_is_changed_in_place(
    net: Namespace, links: KernelLinks, change: dict[str, Any]
) -> None:
    net.ip("addr add fd99::3/64 dev u0 nodad", "addr add fd98::1/64 dev v0 nodad")
    change_and_back(net, links, DEV6, LINK6, change)


@pytest.mark.parametrize(
    "change",
    [
        {"vni": 2},
        {"port": 4789},
        {"port": 4789, "gbp": True, "mac": "02:00:00:00:00:02", "mtu": 1400},
        {"port": 4789, "up": False},
        {"local": ip_address("fd99::1"), "mtu": 1430},
    ],
    ids=" ".join,
)
def test_a_link_that_cannot_be_changed_is_replaced(
    net: Namespace, links: KernelLinks, change: dict[str, Any]
) -> None:
    outcome(links, "set", "links", DEV, LINK)
    wanted = replace(LINK, **change)
    assert outcome(links, "set", "links", DEV, wanted) is None
    assert shown(net, DEV) == wanted
    assert len(net.show("link", "show", "type", "vxlan")) == 1
    assert links.observe(SCOPE).links == {DEV: wanted}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"vni": 2, "dev": "gone0"},
            "flannel.1 stays as it was: cannot create the device that is to take its",
        ),
        ({"gbp": True, "vni": 2}, "UDP port 8472 is used by another program"),
        ({"dev": "gone0"}, "cannot move flannel.1: its underlying device gone0 does not exist"),
        (
            {"mtu": 9000},
            "its MTU cannot be changed: Invalid argument (EINVAL); expected at most the MTU of u0",
        ),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, dict) else "",
)
def test_what_cannot_be_changed_is_said(
    net: Namespace, links: KernelLinks, change: dict[str, Any], said: str
) -> None:
    outcome(links, "set", "links", DEV, LINK)
    error = outcome(links, "set", "links", DEV, replace(LINK, **change))
    assert error is not None
    assert said in error
    assert shown(net, DEV) == LINK
    assert len(net.show("link", "show", "type", "vxlan")) == 1


def test_a_link_stays_when_what_is_to_replace_it_cannot_be_made(net: Namespace, links: KernelLinks) -> None:
    outcome(links, "set", "links", DEV, LINK)
    index = net.show("link", "show", "dev", DEV)[0]["ifindex"]
    net.ip("link add other type vxlan id 1 dstport 4789 dev u0 local 192.0.2.1")
    assert outcome(links, "set", "links", DEV, replace(LINK, port=4789)) == (
        "flannel.1 stays as it was: cannot create the device that is to take its place: A VXLAN device with "
        "the specified VNI already exists (EEXIST); it is other: remove that, or choose another VNI"
    )
    assert shown(net, DEV) == LINK
    assert net.show("link", "show", "dev", DEV)[0]["ifindex"] == index
    assert {link["ifname"] for link in net.show("link", "show", "type", "vxlan")} == {DEV, "other"}


def test_why_a_link_cannot_be_made(net: Namespace, links: KernelLinks) -> None:
    error = outcome(links, "set", "links", DEV, replace(LINK, dev="gone0"))
    assert error == "cannot create flannel.1: its underlying device gone0 does not exist"
    net.ip("link add other type vxlan id 1 dstport 8472 dev u0 local 192.0.2.1")
    error = outcome(links, "set", "links", DEV, LINK)
    assert error == (
        "cannot create flannel.1: A VXLAN device with the specified VNI already exists (EEXIST); "
        "it is other: remove that, or choose another VNI"
    )
    assert net.show("link", "show", "dev", "other")[0].get("ifalias") is None
    assert len(net.show("link", "show", "type", "vxlan")) == 1


def test_a_device_that_was_moved_to_another_namespace_is_told(net: Namespace, links: KernelLinks) -> None:
    """The kernel keeps its VNI taken here."""
    outcome(links, "set", "links", DEV, LINK)
    with Namespace() as other:
        net.run("ip", "link", "set", DEV, "netns", other.path.parts[2])
        assert links.observe(SCOPE) == State()
        error = outcome(links, "set", "links", DEV, LINK)
        assert error is not None
        assert "its device was moved to another network namespace: remove it there" in error
        other.ip(f"link del {DEV}")
        assert outcome(links, "set", "links", DEV, LINK) is None
        assert shown(net, DEV) == LINK


def test_a_device_of_ours_whose_mark_was_changed_is_marked_again(net: Namespace, links: KernelLinks) -> None:
    outcome(links, "set", "links", DEV, LINK)
    assert links.observe(SCOPE) == State(links={DEV: LINK})
    for alias in ("foo", ""):
        net.run("ip", "link", "set", DEV, "alias", alias)
        for _ in "once", "again":
            assert links.observe(SCOPE) == State(links={DEV: replace(LINK, alias=alias)})
        later = net.agent().make(KernelLinks, PREFIX)
        assert later.observe(SCOPE) == State()
        error = outcome(later, "set", "links", DEV, LINK)
        assert error is not None
        assert f"is not ours (alias {alias!r}, kind 'vxlan')" in error
        assert outcome(links, "set", "links", DEV, LINK) is None
        assert shown(net, DEV) == LINK
    net.run("ip", "link", "set", DEV, "alias", link_alias("/another/prefix"))
    assert links.observe(SCOPE) == State()


def test_a_failed_creation_marks_nobody(net: Namespace, links: KernelLinks) -> None:
    """The name is taken, if not by a device we see by that name: as when somebody was quicker."""
    net.ip("link add other type bridge", f"link property add dev other altname {DEV}")
    assert outcome(links, "set", "links", DEV, LINK) == "cannot create flannel.1: File exists (EEXIST)"
    assert net.show("link", "show", "dev", "other")[0].get("ifalias") is None


def test_a_taken_udp_port_is_named(net: Namespace, links: KernelLinks) -> None:
    squatter = (
        "import socket,sys; s = socket.socket(2, 2); s.bind(('', 8472)); print(flush=True); sys.stdin.read()"
    )
    with net.popen("python3", "-c", squatter) as other:
        assert other.stdout is not None
        other.stdout.readline()
        error = outcome(links, "set", "links", DEV, LINK)
        assert error is not None
        assert "UDP port 8472 is used by another program" in error
        other.kill()
    assert outcome(links, "set", "links", DEV, LINK) is None
    assert shown(net, DEV) == LINK


def test_without_the_capability(net: Namespace) -> None:
    powerless = net.agent("setpriv", "--bounding-set=-net_admin").make(KernelLinks, PREFIX)
    error = outcome(powerless, "set", "links", DEV, LINK)
    assert error == "cannot create flannel.1: not permitted, needs CAP_NET_ADMIN (EPERM)"
    assert powerless.observe(SCOPE) == State()


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (
            ("link add flannel.1 type vxlan id 1 dstport 8472 dev u0", "link set flannel.1 alias mine"),
            "vxlan",
        ),
        (("link add flannel.1 type vxlan id 1 dstport 8472 dev u0",), "vxlan"),
        (("link add flannel.1 type bridge",), "bridge"),
    ],
)
def test_a_foreign_device_is_left_alone(
    net: Namespace, links: KernelLinks, made: tuple[str, ...], kind: str
) -> None:
    net.ip(*made, "addr add 203.0.113.1/32 dev flannel.1")
    before = net.show("link", "show", "dev", DEV)
    assert links.observe(SCOPE) == State()
    alias = before[0].get("ifalias", "")
    for verb in ("set", "del"):
        assert outcome(links, verb, "links", DEV, LINK) == (
            f"device flannel.1 exists and is not ours (alias {alias!r}, kind {kind!r}); "
            f"remove or rename it, or choose another VNI"
        )
    assert net.show("link", "show", "dev", DEV) == before


def test_a_device_of_another_kind_with_our_mark_is_not_touched(net: Namespace, links: KernelLinks) -> None:
    net.ip(f"link add {DEV} type bridge", f"link set {DEV} alias {ALIAS}")
    assert links.observe(SCOPE) == State()
    error = outcome(links, "set", "links", DEV, LINK)
    assert error == "device flannel.1 is a bridge, not a vxlan device; remove or rename it"


# --- killed while creating ------------------------------------------------------------------------


def test_device_and_mark_go_to_the_kernel_in_one_send(net: Namespace, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    strace = ("strace", "-f", "-s", "999", "-e", "trace=sendto,sendmsg,sendmmsg,write", "-o", str(trace))
    links = net.agent(*strace).make(KernelLinks, PREFIX)
    assert outcome(links, "set", "links", DEV, LINK) is None
    sends = [line for line in trace.read_text().splitlines() if "RTM_NEWLINK" in line]
    assert len(sends) == 2, sends  # made and marked, then set up
    assert sends[0].count("RTM_NEWLINK") == 2
    assert re.search(r'IFLA_IFNAME.*"flannel\.1".*IFLA_IFALIAS', sends[0])


def test_killed_at_any_send_no_device_is_left_without_mark(net: Namespace) -> None:
    deaths = 0
    for number in range(1, 20):
        inject = f"inject=sendto,sendmsg:signal=SIGKILL:when={number}"
        agent = net.agent("strace", "-f", "-o", "/dev/null", "-e", inject)
        try:
            assert outcome(agent.make(KernelLinks, PREFIX), "set", "links", DEV, LINK) is None
        except EOFError:
            deaths += 1
        for row in net.show("link", "show", "type", "vxlan"):
            assert row["ifalias"] == ALIAS
        survivor = net.agent().make(KernelLinks, PREFIX)
        assert outcome(survivor, "set", "links", DEV, LINK) is None
        assert shown(net, DEV) == LINK
        assert outcome(survivor, "del", "links", DEV) is None
        if deaths < number:
            break
    assert deaths >= 3  # at the dump, before the device, before it is set up


# --- adopting -------------------------------------------------------------------------------------

GO_DEVICE = ("link add {} type vxlan id 1 dstport 8472 dev u0 local {} nolearning", "link set {} up")


@pytest.mark.parametrize(
    ("name", "local", "address"),
    [(DEV, "192.0.2.1", "10.5.34.0/32"), (DEV6, "fd99::1", "fd00:5:34::/128")],
)
def test_go_flannels_device_is_adopted(
    net: Namespace, links: KernelLinks, name: str, local: str, address: str
) -> None:
    net.ip(GO_DEVICE[0].format(name, local), GO_DEVICE[1].format(name), f"addr add {address} dev {name}")
    net.run("bridge", "fdb", "add", "02:00:00:00:00:09", "dev", name, "dst", local, "self", "permanent")
    (before,) = net.show("link", "show", "dev", name)
    found = shown(net, name)
    assert links.observe(SCOPE) == State(links={name: found}, addrs={(name, ip_interface(address)): True})
    wanted = replace(found, alias=ALIAS, mac="02:00:00:00:00:01")
    assert outcome(links, "set", "links", name, wanted) is None
    assert shown(net, name) == wanted
    assert net.show("link", "show", "dev", name)[0]["ifindex"] == before["ifindex"]
    assert "02:00:00:00:00:09" in net.run("bridge", "fdb", "show", "dev", name)
    assert links.observe(SCOPE).links == {name: wanted}


@pytest.mark.parametrize(
    ("name", "alias", "addresses"),
    [
        (DEV, "", ()),
        (DEV, "", ("203.0.113.1/32",)),
        (DEV, "", ("10.5.34.0/32", "203.0.113.1/32")),
        (DEV, "", ("10.5.34.0/32", "10.5.35.0/32")),
        (DEV, "mine", ("10.5.34.0/32",)),
        ("flannel.7", "", ("10.5.34.0/32",)),
        (DEV, link_alias("/another/prefix"), ("10.5.34.0/32",)),
        ("flannel", "", ("10.5.34.0/32",)),
        ("vxlan.1", "", ("10.5.34.0/32",)),
        ("flannel.x", "", ("10.5.34.0/32",)),
    ],
)
def test_another_programs_device_is_not_adopted(
    net: Namespace, links: KernelLinks, name: str, alias: str, addresses: tuple[str, ...]
) -> None:
    net.ip(GO_DEVICE[0].format(name, "192.0.2.1"), *(f"addr add {a} dev {name}" for a in addresses))
    net.run("ip", "link", "set", name, "alias", alias)
    assert links.observe(SCOPE) == State()
    error = outcome(links, "del", "links", name)
    assert error is not None
    assert "is not ours" in error


# --- addresses ------------------------------------------------------------------------------------


def test_addresses_come_and_go(net: Namespace, links: KernelLinks) -> None:
    outcome(links, "set", "links", DEV, LINK)
    outcome(links, "set", "links", DEV6, LINK6)
    wanted = {(DEV, ip_interface("10.5.34.0/32")): True, (DEV6, ip_interface("fd00:5:34::/128")): True}
    net.ip(f"addr add 203.0.113.1/32 dev {DEV}", f"addr add 10.5.77.1/32 scope link dev {DEV}")
    for _ in "once", "again":
        for key in wanted:
            assert outcome(links, "set", "addrs", key, True) is None
        assert links.observe(SCOPE).addrs == wanted
    (row,) = net.show("addr", "show", "dev", DEV6)
    (address,) = [a for a in row["addr_info"] if a["local"] == "fd00:5:34::"]
    assert (address["prefixlen"], address["scope"], address.get("tentative")) == (128, "global", None)
    (row,) = net.show("addr", "show", "dev", DEV)
    assert {f"{a['local']}/{a['prefixlen']}" for a in row["addr_info"]} == {
        "10.5.34.0/32",
        "10.5.77.1/32",
        "203.0.113.1/32",
    }
    for _ in "once", "again":
        for key in wanted:
            assert outcome(links, "del", "addrs", key) is None
    assert links.observe(SCOPE).addrs == {}
    assert "203.0.113.1" in net.run("ip", "addr", "show", "dev", DEV)


def test_addresses_on_a_device_that_is_not_there(links: KernelLinks) -> None:
    key = ("gone0", ip_interface("10.5.34.0/32"))
    assert outcome(links, "set", "addrs", key, True) == "device gone0 does not exist"
    assert outcome(links, "del", "addrs", key) is None


def test_neither_looking_nor_writing_loads_pyroute2(agent: Agent, links: KernelLinks) -> None:
    """It takes 100 ms and 25 MB, and is there only to check our messages."""
    links.observe(SCOPE)
    agent.call(read_host)
    outcome(links, "set", "links", DEV, LINK)
    assert agent.call(inside.loaded, "flanneld_py.drivers.linkmessages")
    assert not agent.call(inside.loaded, "pyroute2")
