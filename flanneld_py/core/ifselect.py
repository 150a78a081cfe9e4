"""Which interface carries the overlay, and which addresses of it are used and published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import ip_address

from flanneld_py.core.records import why_unreachable
from flanneld_py.errors import HostError, HostNotReady, UsageError
from flanneld_py.model import (
    AddressFacts,
    External,
    Family,
    HostFacts,
    IPAddress,
    LinkFacts,
    PerFamily,
)

_PUBLIC_FLAGS: dict[Family, str] = {4: "--public-ip", 6: "--public-ipv6"}


def select(
    facts: HostFacts,
    *,
    families: Sequence[Family],
    iface: Sequence[str] = (),
    public_ip: str = "",
    public_ipv6: str = "",
) -> External:
    """Choose as flannel does.

    The first `iface` that fits; without any, the interface of the public address; else of the default route.

    Args:
        facts: the host's interfaces.
        families: those that the config uses.
        iface: values of --iface, IP addresses or interface names, in order of preference.
        public_ip: --public-ip, or empty; an address no interface has (NAT) goes together with `iface` only.
        public_ipv6: the same for IPv6.

    Raises:
        UsageError: a public address is no address of its family, or none that peers could reach.
        HostError: nothing fits; the message lists the interfaces there are, and the flag to set.
        HostNotReady: the same, but only an address or the default route is missing, which may come.
    """
    published = _published(public_ip, public_ipv6)
    wanted = {family: published[family] for family in families if family in published}
    if not iface:
        if wanted:
            return _by_public(facts, families, wanted)
        return _by_default_route(facts, families)
    failures: list[HostError] = []
    for text in iface:
        try:
            return _by_iface(facts, families, text, wanted)
        except HostError as failure:
            failures.append(failure)
    may_come = any(isinstance(failure, HostNotReady) for failure in failures)
    kind = HostNotReady if may_come else HostError
    raise kind("; ".join(str(failure) for failure in failures) + _advice(facts))


def _published(public_ip: str, public_ipv6: str) -> dict[Family, IPAddress]:
    published: dict[Family, IPAddress] = {}
    given: tuple[tuple[Family, str], ...] = ((4, public_ip), (6, public_ipv6))
    for family, text in given:
        if text:
            address = _address(text)
            if address is None or address.version != family:
                raise UsageError(f"{_PUBLIC_FLAGS[family]} {text!r}: expected an IPv{family} address")
            reason = why_unreachable(address)
            if reason is not None:
                raise UsageError(
                    f"{_PUBLIC_FLAGS[family]} {text} is {reason}: expected one that peers can reach"
                )
            published[family] = address
    return published


# --- ways to find the interface -------------------------------------------------------------------


def _by_iface(
    facts: HostFacts, families: Sequence[Family], text: str, wanted: Mapping[Family, IPAddress]
) -> External:
    address = _address(text)
    if address is not None:
        return _by_address(facts, families, f"--iface {text}", address, wanted)
    for link in facts.links:
        if link.name == text:
            return _external(link, families, f"--iface {text}", {}, wanted)
    raise HostError(f"--iface {text!r}: there is no such interface")


def _by_address(
    facts: HostFacts,
    families: Sequence[Family],
    flag: str,
    address: IPAddress,
    wanted: Mapping[Family, IPAddress],
) -> External:
    if address.version not in families:
        used = " and ".join(f"IPv{family}" for family in families)
        raise HostError(f"{flag}: expected an address of a family that the config uses, {used}")
    reason = why_unreachable(address)
    if reason is not None:
        raise HostError(f"{flag} is {reason}: expected one that peers can reach")
    link = _holder(facts, address)
    if link is None:
        raise HostError(f"{flag}: no interface has this address")
    for family, public in wanted.items():
        other = _holder(facts, public) if family != address.version else link
        if other is not None and other.name != link.name:
            raise HostError(
                f"{flag} is on {link.name}, but {_PUBLIC_FLAGS[family]} {public} is on {other.name}: "
                "expected both on one interface"
            )
    return _external(link, families, flag, {4 if address.version == 4 else 6: address}, wanted)


def _by_public(facts: HostFacts, families: Sequence[Family], wanted: Mapping[Family, IPAddress]) -> External:
    for family, address in wanted.items():
        if _holder(facts, address) is None:
            raise HostError(
                f"{_PUBLIC_FLAGS[family]} {address}: no interface has this address; if it is translated "
                f"(NAT), name the interface too{_advice(facts)}"
            )
    family, address = next(iter(wanted.items()))
    try:
        return _by_address(facts, families, f"{_PUBLIC_FLAGS[family]} {address}", address, wanted)
    except HostError as failure:
        raise HostError(f"{failure}{_advice(facts)}") from None


def _by_default_route(facts: HostFacts, families: Sequence[Family]) -> External:
    devices = {
        device: family
        for family in reversed(families)
        if (device := facts.default_devices.get(family)) is not None
    }
    links = [link for link in facts.links if link.name in devices and not _is_loopback(link)]
    if not links:
        raise HostNotReady(f"no default route leads out of this host{_advice(facts)}")
    if len(links) > 1:
        ways = " and ".join(f"IPv{devices[link.name]} by {link.name}" for link in links)
        raise HostError(f"the default routes differ: {ways}{_advice(facts)}")
    try:
        return _external(links[0], families, "the default route", {}, {})
    except HostError as failure:
        raise type(failure)(f"{failure}{_advice(facts)}") from None


# --- addresses ------------------------------------------------------------------------------------


def _external(
    link: LinkFacts,
    families: Sequence[Family],
    way: str,
    fixed: Mapping[Family, IPAddress],
    wanted: Mapping[Family, IPAddress],
) -> External:
    """The link with its address per family: the one that was asked for, else the published, else the best."""
    if link.mtu <= 0:
        raise HostError(f"{way}: interface {link.name} has MTU {link.mtu}; set a usable one")
    held = {facts.address.ip for facts in link.addresses}
    own: dict[Family, IPAddress] = dict(fixed)
    for family in families:
        public = wanted.get(family)
        chosen = own.get(family) or (public if public in held else None) or _best(link, family)
        if chosen is None:
            raise HostNotReady(f"{way}: interface {link.name} has no usable IPv{family} address")
        own[family] = chosen
    return External(
        name=link.name,
        mtu=link.mtu,
        addresses=PerFamily(own.get(4), own.get(6)),
        public=PerFamily(wanted.get(4, own.get(4)), wanted.get(6, own.get(6))),
        mac=link.mac,
    )


def _best(link: LinkFacts, family: Family) -> IPAddress | None:
    """Of unicast addresses that are not deprecated, the first of the best rank."""
    eligible = [
        facts
        for facts in link.addresses
        if facts.address.version == family
        and not facts.deprecated
        and why_unreachable(facts.address.ip) is None
    ]
    return min(eligible, key=_rank).address.ip if eligible else None


def _rank(facts: AddressFacts) -> tuple[bool, bool, bool]:
    only_here = facts.address.ip.is_link_local or facts.scope in ("link", "host")
    return only_here, not facts.permanent, facts.secondary


def _holder(facts: HostFacts, address: IPAddress) -> LinkFacts | None:
    for link in facts.links:
        if any(held.address.ip == address for held in link.addresses):
            return link
    return None


def _is_loopback(link: LinkFacts) -> bool:
    return link.name == "lo" or any(held.address.ip.is_loopback for held in link.addresses)


def _address(text: str) -> IPAddress | None:
    try:
        return None if "%" in text else ip_address(text)
    except ValueError:
        return None


def _advice(facts: HostFacts, most: int = 20) -> str:
    """What the host has, and the flag to set."""
    candidates = [
        f"{link.name} ({', '.join(str(held.address.ip) for held in link.addresses) or 'no address'})"
        for link in facts.links
        # The overlay itself is never what carries it.
        if not _is_loopback(link) and link.kind != "vxlan"
    ]
    if not candidates:
        return "; this host has no interface but loopback: set one up, then name it with --iface"
    more = [f"and {len(candidates) - most} more"] if len(candidates) > most else []
    return f"; set --iface to one of: {', '.join(candidates[:most] + more)}"
