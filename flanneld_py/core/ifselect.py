"""Which interface carries the overlay, and which addresses of it are used and published."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import cache, partial
from ipaddress import ip_address
from itertools import chain

from msgspec.structs import replace

from flanneld_py.addresses import Family, IPAddress, PerFamily
from flanneld_py.core.ownership import link_alias
from flanneld_py.core.records import why_unreachable
from flanneld_py.errors import HostError, HostNotReady, UsageError
from flanneld_py.model import AddressFacts, External, HostFacts, LinkFacts

_OVERLAY = re.compile(r"flannel(-v6)?\.(\d+|ipip)|flannel\d+|flannel-wg(-v6)?")
"""What flannel and this daemon call the devices they make."""
MOST_NAMED = 20
"""Of the interfaces that a host has, in a message."""
_PUBLIC_FLAGS: dict[Family, str] = {4: "--public-ip", 6: "--public-ipv6"}


def select(
    facts: HostFacts,
    *,
    families: Sequence[Family],
    iface: Sequence[str] = (),
    iface_regex: Sequence[str] = (),
    can_reach: str = "",
    public_ip: str = "",
    public_ipv6: str = "",
    registry: IPAddress | None = None,
    last: IPAddress | None = None,
) -> External:
    """Choose as flannel does.

    The first of `iface`, then of `iface_regex`, then `can_reach` that fits; without any, the interface of the
    public address; else of the way to etcd, if that shall count; else of the default route.

    Args:
        facts: the host's interfaces, with the ways to `can_reach` and `registry`.
        families: those that the config uses.
        iface: values of --iface, IP addresses or interface names, in order of preference.
        iface_regex: values of --iface-regex, searched in addresses, then in names.
        can_reach: --iface-can-reach, or empty.
        public_ip: --public-ip, or empty; an address no interface has (NAT) goes together with `iface` only.
        public_ipv6: the same for IPv6.
        registry: the address of etcd, if the interface that reaches it is to be preferred.
        last: the address by which this host was in the overlay last, if that is all there is to go by.

    Raises:
        UsageError: a public address is no address of its family, or none that peers could reach.
        HostError: nothing fits; the message lists the interfaces there are, and the flag to set.
        HostNotReady: the same, but only an address or a route is missing, which may come.
    """
    published = _published(public_ip, public_ipv6)
    wanted = {family: published[family] for family in families if family in published}
    tries = [
        *(partial(_by_iface, facts, families, text, wanted) for text in iface),
        *(partial(_by_pattern, facts, families, text, wanted) for text in iface_regex),
        *(partial(_by_reach, facts, families, text, wanted) for text in (can_reach,) if text),
    ]
    if not tries:
        if wanted:
            return _by_public(facts, families, wanted)
        if last is not None and _holder(facts, last) is not None:
            return _by_address(facts, families, f"the last run ({last})", last, {})
        if registry is not None:
            return _by_way(facts, families, f"the route to etcd ({registry})", registry, {})
        return _by_default_route(facts, families)
    failures: list[HostError] = []
    for attempt in tries:
        try:
            return attempt()
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
            address = address_of(text)
            if address is None or address.version != family:
                raise UsageError(f"{_PUBLIC_FLAGS[family]} {text!r}: expected an IPv{family} address")
            reason = why_unreachable(address)
            if reason is not None:
                raise UsageError(
                    f"{_PUBLIC_FLAGS[family]} {text} is {reason}: expected one that peers can reach"
                )
            published[family] = address
    return published


@cache
def pattern_of(text: str) -> re.Pattern[str]:
    """The regular expression of an --iface-regex.

    Raises:
        ValueError: Python cannot read it as flannel's library would.
    """
    if "[[:" in text:  # to Python a set of these characters, silently
        raise ValueError("expected a regular expression without classes such as [[:digit:]]; write [0-9]")
    with warnings.catch_warnings():
        # What a later Python may read differently is no news to whoever reads the log.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return re.compile(text)
        except re.error as error:
            raise ValueError(f"expected a regular expression: {error}") from None


# --- ways to find the interface -------------------------------------------------------------------


def _by_iface(
    facts: HostFacts, families: Sequence[Family], text: str, wanted: Mapping[Family, IPAddress]
) -> External:
    address = address_of(text)
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


def _by_pattern(
    facts: HostFacts, families: Sequence[Family], text: str, wanted: Mapping[Family, IPAddress]
) -> External:
    """The first interface of which an address of each family matches, else whose name does."""
    flag = f"--iface-regex {text!r}"
    found = pattern_of(text).search
    # The overlay's own devices have addresses of the Network, which is no reason to take one.
    links = sorted((link for link in facts.links if not is_overlay(link)), key=lambda link: link.index)
    for link in links:
        matching = {
            family: ip
            for family in families
            if (ip := next((ip for ip in _ranked(link, family) if found(str(ip))), None)) is not None
        }
        if len(matching) == len(families):
            return _external(link, families, flag, matching, wanted)
    for link in links:
        if found(link.name):
            return _external(link, families, flag, {}, wanted)
    both = " and one of IPv6" if len(families) > 1 else ""
    raise HostError(f"{flag} matches no usable address{both} and no name of an interface")


def _by_reach(
    facts: HostFacts, families: Sequence[Family], text: str, wanted: Mapping[Family, IPAddress]
) -> External:
    return _by_way(facts, families, f"--iface-can-reach {text}", ip_address(text), wanted)


def _by_way(
    facts: HostFacts,
    families: Sequence[Family],
    flag: str,
    destination: IPAddress,
    wanted: Mapping[Family, IPAddress],
) -> External:
    """The interface by which an address is reached, with the address that the kernel would use there."""
    way = facts.ways.get(destination)
    link = next((link for link in facts.links if way is not None and link.name == way.dev), None)
    if way is None or link is None:
        raise HostNotReady(f"{flag}: there is no route to it")
    if is_loopback(link):
        raise HostError(f"{flag} is an address of this host itself: expected one that others have")
    source = way.source
    fixed: dict[Family, IPAddress] = {}
    if source is not None and why_unreachable(source) is None and _holder(facts, source) is link:
        fixed = {family: source for family in families if family == source.version}
    return _external(link, families, flag, fixed, wanted)


def _by_default_route(facts: HostFacts, families: Sequence[Family]) -> External:
    devices = {
        device: family
        for family in reversed(families)
        if (device := facts.default_devices.get(family)) is not None
    }
    for family in families:
        besides = facts.default_devices_besides.get(family)
        if besides:
            ways = ", ".join((str(facts.default_devices.get(family)), *besides))
            raise HostError(
                f"the IPv{family} default route leads by several interfaces, {ways}{_advice(facts)}"
            )
    links = [link for link in facts.links if link.name in devices and not is_loopback(link)]
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
        how=way,
    )


def _best(link: LinkFacts, family: Family) -> IPAddress | None:
    return next(iter(_ranked(link, family)), None)


def _ranked(link: LinkFacts, family: Family) -> list[IPAddress]:
    """The unicast addresses that are not deprecated, the best rank first."""
    eligible = [
        facts
        for facts in link.addresses
        if facts.address.version == family
        and not facts.deprecated
        and why_unreachable(facts.address.ip) is None
    ]
    return [facts.address.ip for facts in sorted(eligible, key=_rank)]


def in_use_first(facts: HostFacts, in_use: Collection[IPAddress]) -> HostFacts:
    """The same host, but of equally good addresses `select` prefers those in use.

    The kernel lists the newest IPv6 address first: one that is added must not become the published one. Nor
    must a link-local one, which peers can hardly use, while the one in use is away for a moment.
    """
    settled = {ip.version for ip in in_use if not ip.is_link_local}
    links = (
        replace(
            link,
            addresses=tuple(
                sorted(
                    (
                        held
                        for held in link.addresses
                        if not held.address.ip.is_link_local or held.address.version not in settled
                    ),
                    key=lambda held: held.address.ip not in in_use,
                )
            ),
        )
        for link in facts.links
    )
    return replace(facts, links=tuple(links))


def _rank(facts: AddressFacts) -> tuple[bool, bool, bool]:
    only_here = facts.address.ip.is_link_local or facts.scope in ("link", "host")
    return only_here, not facts.permanent, facts.secondary


def _holder(facts: HostFacts, address: IPAddress) -> LinkFacts | None:
    for link in facts.links:
        if any(held.address.ip == address for held in link.addresses):
            return link
    return None


def is_loopback(link: LinkFacts) -> bool:
    return link.name == "lo" or any(held.address.ip.is_loopback for held in link.addresses)


def is_overlay(link: LinkFacts) -> bool:
    """Whether it is a device of flannel's, or of a daemon like this one."""
    return link.alias.startswith(link_alias("")) or _OVERLAY.fullmatch(link.name) is not None


def is_of_overlay(link: LinkFacts) -> bool:
    """Whether its addresses are an overlay's, and not the host's own: any vxlan, and flannel's TUNs."""
    return link.kind == "vxlan" or (link.kind == "tun" and is_overlay(link))


def address_of(text: str) -> IPAddress | None:
    try:
        return None if "%" in text else ip_address(text)
    except ValueError:
        return None


def _advice(facts: HostFacts) -> str:
    """What the host has, and the flag to set."""
    # The overlay itself is never what carries it.
    links = [link for link in facts.links if not is_loopback(link) and not is_of_overlay(link)]
    # Nor is a bridge, but for one that leads out of the host: the others are for containers.
    routed = {*facts.default_devices.values(), *chain(*facts.default_devices_besides.values())}
    leading_out = [link for link in links if link.kind != "bridge" or link.name in routed]
    candidates = [
        f"{link.name} ({', '.join(str(held.address.ip) for held in link.addresses) or 'no address'})"
        for link in leading_out or links
    ]
    if not candidates:
        return "; this host has no interface but loopback: set one up, then name it with --iface"
    more = [f"and {len(candidates) - MOST_NAMED} more"] if len(candidates) > MOST_NAMED else []
    return f"; set --iface to one of: {', '.join(candidates[:MOST_NAMED] + more)}"
