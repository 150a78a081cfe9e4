"""Where to listen, as operators write it: `127.0.0.1:9100`, `:9100`, `[::1]:9100`, or an address alone."""

from __future__ import annotations

import re
from ipaddress import IPv6Address, ip_address

LOOPBACK = "127.0.0.1"
HIGHEST_PORT = 65_535
_FORM = re.compile(r"(?:\[(?P<bracketed>[^\]]*)\]|(?P<plain>[^:\[\]]*))(?::(?P<port>[0-9]+))?")


def parse_listen_address(text: str) -> tuple[str, int] | None:
    """IP address and port; the address is LOOPBACK when there is none. None: no port was given, or port 0.

    Raises:
        ValueError: it is none; the text says what was expected, without naming the setting.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        _check_ip(text)  # an IPv6 address without brackets has no port
        return None
    ip, port = found["bracketed"] or found["plain"], int(found["port"] or 0)
    if ip == "localhost":
        ip = LOOPBACK
    if ip:
        _check_ip(ip, bracketed=found["bracketed"] is not None)
    if port > HIGHEST_PORT:
        raise ValueError(f"port {port}: expected a port up to {HIGHEST_PORT}, or 0 for none")
    return (ip or LOOPBACK, port) if port else None


def overlap(one: tuple[str, int], other: tuple[str, int]) -> bool:
    """Whether the kernel refuses to listen on both of two different addresses."""
    if one == other or one[1] != other[1]:
        return False
    a, b = ip_address(one[0]), ip_address(other[0])
    # An IPv6 socket is for IPv4 as well: that on `::` takes all.
    takes_all = [any_ip for any_ip in (a, b) if any_ip.is_unspecified]
    return any(any_ip.version == 6 for any_ip in takes_all) or (bool(takes_all) and a.version == b.version)


def _check_ip(text: str, *, bracketed: bool = False) -> None:
    try:
        address = ip_address(text)
    except ValueError:
        raise ValueError("expected an IP address with a port, such as 127.0.0.1:9100 or :9100") from None
    if bracketed and not isinstance(address, IPv6Address):
        raise ValueError("expected an IPv6 address between the brackets, such as [::1]:9100")
