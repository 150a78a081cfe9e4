"""Links and addresses: the driver of our devices, and the facts about all links of this host."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from flanneld_py.addresses import FAMILIES, IPAddress, IPInterface, PerFamily
from flanneld_py.core.ownership import TUN_NAME
from flanneld_py.core.plan import exclude_each_other, must_recreate
from flanneld_py.datapath import TunLink
from flanneld_py.drivers import rtmessages as rt
from flanneld_py.drivers.hostroutes import look_up, read_main
from flanneld_py.drivers.linkmessages import Request, encode
from flanneld_py.drivers.links import (
    KINDS,
    Device,
    OwnDevices,
    read_addresses,
    read_devices,
    read_overlay_devices,
)
from flanneld_py.drivers.linkvalues import changes, link_of, local_key, vxlan_of
from flanneld_py.drivers.netlink import Failure, NetlinkSocket, understanding
from flanneld_py.drivers.tunmaker import TunMaker, refused_tun
from flanneld_py.errors import Unsupported
from flanneld_py.model import HostFacts, Link, LinkFacts, Op, Outcome, Room, Scope, State, Table, VxlanLink

IFA_F_NODAD = 0x02
PROC_IPV6 = Path("/proc/sys/net/ipv6")
IPV6_MIN_MTU = 1280
"""A device with less has no IPv6 (RFC 8200, section 5; addrconf_notify of net/ipv6)."""
TEMPORARY_NAME = "flannel-"
"""Of a device that is to take another's place: what is said of `flannel*` elsewhere holds for it, too."""
GO_FLANNEL_NAME = re.compile(r"flannel(-v6)?\.\d+")
FIRST_INDEX = 1 << 24
"""Above the interface indexes that the kernel gives out by itself, counting up from 1."""


def read_host(asked: Collection[IPAddress] = ()) -> HostFacts:
    """Links with their addresses, and the routes that matter to the choice of one, as they are now.

    Args:
        asked: addresses to which the way is to be found.

    Raises:
        KernelError: the kernel did not answer.
    """
    netlink = NetlinkSocket()
    try:
        addresses = read_addresses(netlink)
        devices = read_devices(netlink)
        names = {device.index: device.name for device in devices}
        links = [
            LinkFacts(
                name=device.name,
                index=device.index,
                mtu=device.mtu,
                mac=device.mac,
                up=device.up,
                carrier=device.carrier,
                kind=device.kind,
                alias=device.alias,
                addresses=tuple(addresses.get(device.index, ())),
            )
            for device in devices
        ]
        routes = [read_main(netlink, family, names) for family in FAMILIES]
        ways = {address: way for address in asked if (way := look_up(netlink, address)) is not None}
    finally:
        netlink.close()
    devices_onlink = dict.fromkeys(chain(*(main.onlink for main in routes)))
    return HostFacts(
        links=tuple(links),
        default_devices=PerFamily(*(next(iter(main.default), None) for main in routes)),
        default_devices_besides=PerFamily(*(main.default[1:] or None for main in routes)),
        ipv6=PROC_IPV6.exists(),
        gateways=frozenset().union(*(main.gateways for main in routes)),
        onlink={dev: tuple(chain(*(main.onlink[dev] for main in routes))) for dev in devices_onlink},
        ways=ways,
    )


class KernelLinks:
    """Driver of the tables links (vxlan and TUN devices) and addrs.

    Args:
        prefix: the etcd prefix, which marks our links.
        tuns: what makes TUN devices; None: none is going to be wanted.
    """

    tables: tuple[Table, ...] = ("links", "addrs")

    def __init__(self, prefix: str, tuns: TunMaker | None = None) -> None:
        self._own = OwnDevices(prefix)
        self._tuns = tuns
        self._netlink = NetlinkSocket()
        self._adopted: set[int] = set()

    @property
    def port_ids(self) -> frozenset[int]:
        """The netlink port ids we write from, by which a monitor knows our own changes."""
        return frozenset({self._netlink.port_id})

    def marked(self) -> frozenset[str]:
        """The names of the devices that bear our mark now."""
        devices = read_overlay_devices(self._netlink)
        return frozenset(device.name for device in devices if device.alias == self._own.alias)

    def close(self) -> None:
        self._netlink.close()

    # --- read -------------------------------------------------------------------------------------

    @understanding("links and addresses")
    def observe(self, scope: Scope) -> State:
        devices = read_overlay_devices(self._netlink)
        addresses = read_addresses(self._netlink)
        inside = rt.Inside(scope.networks)
        self._own.look(devices)
        self._adopted = set()
        links: dict[str, Link] = {}
        addrs: dict[tuple[str, IPInterface], bool] = {}
        for device in devices:
            on_it = [a.address for a in addresses.get(device.index, ()) if a.scope == "global"]
            within = [address for address in on_it if inside.address(address.ip.packed)]
            wanted = device.name in scope.devices and self._adoptable(device)
            if wanted and len(on_it) == 1 and within:
                self._adopted.add(device.index)
            if self._is_ours(device):
                links[device.name] = link_of(device)
                addrs.update({(device.name, address): True for address in within})
        return State(links=links, addrs=addrs)

    def _is_ours(self, device: Device) -> bool:
        return self._own.is_ours(device) or (device.index in self._adopted and self._adoptable(device))

    def _adoptable(self, device: Device) -> bool:
        """Whether it may be what Go flannel left; its one address must lie in our Networks besides."""
        return device.kind == "vxlan" and not device.alias and bool(GO_FLANNEL_NAME.fullmatch(device.name))

    # --- write ------------------------------------------------------------------------------------

    def apply(self, ops: Sequence[Op]) -> Sequence[Outcome]:
        carry_out = {"links": self._apply_link, "addrs": self._apply_address}
        return [Outcome(op, carry_out[op.table](op)) for op in ops]

    def _apply_link(self, op: Op) -> str | None:
        """Carry out one op; what went wrong, if so."""
        devices = read_devices(self._netlink)
        device = next((found for found in devices if found.name == op.key), None)
        if device is None:
            return self._create(op.key, op.value) if op.verb == "set" else None
        if not self._is_ours(device):
            return _not_ours(device)
        if op.verb == "set":
            return self._change(device, op.value)
        obstacle = self._obstacle(op.value, devices) if op.value is not None else None
        if obstacle is not None:
            return f"stays, as {op.value.name} cannot take its place: {obstacle}"
        if device.kind == "tun" and self._tuns is not None:
            self._tuns.release(device.name)
        (refused,) = self._send(Request("link", "del", {"index": device.index}))
        if refused is None or refused.code == errno.ENODEV:
            return None
        return f"cannot delete {device.name}: {refused.reason}"

    def _obstacle(self, room: Room, devices: Collection[Device]) -> str | None:
        """Somebody else's device that would keep a link from being made, too."""
        for device in devices:
            if self._is_ours(device):
                continue
            if device.name == room.name:
                return _not_ours(device)
            if device.kind == "vxlan" and _keeps_away(device, room.link):
                return f"{device.name} has this VNI, or its UDP port with other marks: remove that"
        return None

    def _replace(self, old: Device, want: Link) -> str | None:
        """Put another device in the place of one that cannot be changed into it, if it can be made at all.

        It is made and brought up under a name of its own first, as a VNI or a port may be taken. What hangs
        on the old one goes with it.
        """
        name = f"{TEMPORARY_NAME}{os.urandom(2).hex()}"
        error = self._create(name, want, "the device that is to take its place")
        if error is not None:
            return f"{old.name} stays as it was: {error}"
        index = socket.if_nametoindex(name)
        steps = [
            Request("link", "del", {"index": old.index}),
            # Before Linux 6.2 a device that is up cannot be renamed.
            Request("link", "set", {"index": index, "state": "down"}),
            Request("link", "set", {"index": index, "ifname": old.name}),
        ]
        if want.up:
            steps.append(Request("link", "set", {"index": index, "state": "up"}))
        refused = next(filter(None, self._send(*steps)), None)
        return f"cannot put another device in the place of {old.name}: {refused.reason}" if refused else None

    def _create(self, name: str, want: Link, called: str = "") -> str | None:
        called = called or name
        if isinstance(want, TunLink):
            return self._create_tun(name, want, called)
        try:
            underlying = socket.if_nametoindex(want.dev)
        except OSError:
            return f"cannot create {called}: its underlying device {want.dev} does not exist"
        # The alias goes with the creation in one send, which the kernel carries out whole before it heeds a
        # signal: a killed daemon leaves no device without its mark. It goes by an index of our own choice:
        # by name it would mark somebody else's device, if that is why the creation fails.
        index = FIRST_INDEX + int.from_bytes(os.urandom(3), "big")
        arguments = {
            "ifname": name,
            "kind": "vxlan",
            "index": index,
            "mtu": want.mtu,
            "address": want.mac,
            "txqlen": 0,
            "vxlan_id": want.vni,
            "vxlan_link": underlying,
            local_key(want): str(want.local),
            "vxlan_port": want.port,
            "vxlan_learning": want.learning,
        }
        if want.gbp:
            arguments["vxlan_gbp"] = True
        refused, unmarked = self._send(
            Request("link", "add", arguments),
            Request("link", "set", {"index": index, "ifalias": want.alias}),
        )
        if refused is not None:
            if refused.code == errno.EOPNOTSUPP:
                raise Unsupported(
                    f"cannot create {called}: {refused.reason}: this kernel has no vxlan; install its module "
                    f"vxlan (CONFIG_VXLAN), or set the config's Backend.Type to host-gw"
                )
            return f"cannot create {called}: {_explain(refused, want)}{self._holder(refused, want)}"
        if unmarked is not None:
            self._send(Request("link", "del", {"index": index}))
            return f"cannot mark {called} as ours: {unmarked.reason}"
        error = self._carry_out(called, want, {"state": {"state": "up"}} if want.up else {}, index)
        if error is not None:
            self._send(Request("link", "del", {"index": index}))
        return error

    def _create_tun(self, name: str, want: TunLink, called: str) -> str | None:
        """Until it bears our mark it goes with this process, so that none is left that nobody owns.

        Raises:
            Unsupported: this kernel, or this container, has no TUN devices.
        """
        if self._tuns is None:
            return f"cannot create {called}: nothing here makes TUN devices"
        try:
            self._tuns.make(name)
            index = socket.if_nametoindex(name)
            request = {"index": index, "ifalias": want.alias, "mtu": want.mtu, "txqlen": want.queue}
            refused = next(
                filter(
                    None,
                    self._send(
                        Request("link", "set", request),
                        Request("link", "set", {"index": index, "state": "up" if want.up else "down"}),
                    ),
                ),
                None,
            )
            if refused is None:
                self._tuns.keep(name)
                return None
        except OSError as error:
            self._tuns.release(name)
            return refused_tun(called, error)
        self._tuns.release(name)
        return f"cannot create {called}: {refused.reason}"

    def _holder(self, refused: Failure, want: VxlanLink) -> str:
        """Who holds the VNI for which a creation was refused, and what to do about it."""
        if refused.code != errno.EEXIST or "VNI" not in refused.reason:
            return ""  # it was about the name
        for device in read_devices(self._netlink, rt.LINKS_OF_KIND["vxlan"]):
            have = vxlan_of(device)
            if (have.vni, have.port) == (want.vni, want.port):
                return f"; it is {device.name}: remove that, or choose another VNI"
        # The kernel keeps a VNI with the namespace in which its device was made.
        return "; its device was moved to another network namespace: remove it there, or choose another VNI"

    def _change(self, device: Device, want: Link) -> str | None:
        if device.kind not in KINDS:
            kind = "TUN" if isinstance(want, TunLink) else "vxlan"
            return f"device {device.name} is a {device.kind}, not a {kind} device; remove or rename it"
        have = link_of(device)
        if must_recreate(have, want):
            return self._replace(device, want)
        try:
            differing = changes(have, want)
        except OSError:
            below = f" {want.dev}" if isinstance(want, VxlanLink) else ""
            return f"cannot move {device.name}: its underlying device{below} does not exist"
        return self._carry_out(device.name, want, differing, device.index)

    def _carry_out(self, name: str, want: Link, steps: dict[str, dict[str, Any]], index: int) -> str | None:
        """Make changes to a device; which failed and why, if any did."""
        failures = self._send(*(Request("link", "set", {"index": index, **step}) for step in steps.values()))
        refused = [
            f"its {what} cannot be changed: {_explain(failure, want, what)}"
            for what, failure in zip(steps, failures, strict=True)
            if failure is not None
        ]
        return f"{name}: {'; '.join(refused)}" if refused else None

    def _apply_address(self, op: Op) -> str | None:
        dev, address = op.key
        try:
            index = socket.if_nametoindex(dev)
        except OSError:
            return f"device {dev} does not exist" if op.verb == "set" else None
        arguments = {"index": index, "address": str(address.ip), "prefixlen": address.network.prefixlen}
        already = {errno.EADDRNOTAVAIL, errno.ENODEV}
        if op.verb == "set":
            already = {errno.EEXIST}
            if address.version == 6:
                # Nobody else has it, and until detection ends it could not be used.
                arguments["flags"] = IFA_F_NODAD
        (refused,) = self._send(Request("addr", "add" if op.verb == "set" else "del", arguments))
        if refused is None or refused.code in already:
            return None
        if address.version == 6 and op.verb == "set":
            small = [d for d in read_devices(self._netlink) if d.name == dev and d.mtu < IPV6_MIN_MTU]
            if small:
                return (
                    f"{dev} has MTU {small[0].mtu}, and IPv6 needs {IPV6_MIN_MTU}: raise the MTU of its "
                    f"underlying device, or Backend.MTU, to {IPV6_MIN_MTU + 70}"
                )
        return f"cannot {op.verb} address {address} on {dev}: {refused.reason}"

    def _send(self, *requests: Request) -> list[Failure | None]:
        """Send requests in one datagram; what became of each."""
        if not requests:
            return []
        return self._netlink.transact([encode(request) for request in requests])


def _not_ours(device: Device) -> str:
    tun = TUN_NAME.fullmatch(device.name)
    other = "; if it is flannel's, stop that first" if tun else ", or choose another VNI"
    return (
        f"device {device.name} exists and is not ours (alias {device.alias!r}, kind "
        f"{device.kind or 'none'!r}); remove or rename it{other}"
    )


def _keeps_away(device: Device, want: Link) -> bool:
    """Whether the kernel refuses `want` beside it; the socket of a port is there when a device is up."""
    have = vxlan_of(device)
    return (
        isinstance(want, VxlanLink) and exclude_each_other(have, want) and (have.gbp == want.gbp or have.up)
    )


def _explain(refused: Failure, want: Link, what: str = "") -> str:
    if refused.code == errno.EOPNOTSUPP:
        return f"{refused.reason}; this kernel cannot change it so"
    if isinstance(want, TunLink):
        return refused.reason
    if refused.code == errno.EINVAL and what == "MTU":
        if want.local.version == 6 and want.mtu == IPV6_MIN_MTU:
            needed = f"raise the MTU of {want.dev} to {IPV6_MIN_MTU + 70}"
            return f"{refused.reason}; IPv6 needs {IPV6_MIN_MTU} there: {needed}"
        overhead = 50 if want.local.version == 4 else 70
        return f"{refused.reason}; expected at most the MTU of {want.dev} less {overhead}, not {want.mtu}"
    if refused.code == errno.EADDRINUSE:
        return f"{refused.reason}; UDP port {want.port} is used by another program"
    return refused.reason
