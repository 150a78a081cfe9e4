"""Lease records: the keys `subnets/<K>` of the registry and their JSON values, shared with Go flannel.

What is wrong with one record costs that record only, and never the last good value of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from msgspec.structs import replace

from flanneld_py.addresses import IPAddress, PerFamily, Subnets
from flanneld_py.core import gojson
from flanneld_py.core.nodeid import is_node_id
from flanneld_py.core.usualrecords import decode_usual
from flanneld_py.errors import RecordError
from flanneld_py.model import Changes, Entry, Listing, Record, Snapshot

CONFIG_KEY = "config"
SUBNETS_PREFIX = "subnets/"
MAX_VALUE = 65_536
"""Bytes of a record's value; some 200 are usual."""
LONGEST_SHOWN = 300
"""Characters of a key or a reason in logs and status: both are made of what a stranger wrote."""


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


# --- keys -----------------------------------------------------------------------------------------

_NO_V4 = "0.0.0.0-0"
"""The IPv4 half of the key of a lease that has none."""
_KEY = re.compile(
    r"(?P<v4>[0-9.]{7,15}-(?:[0-9]|[12][0-9]|3[01]))"
    r"(?:&(?P<v6>[0-9a-f:]{2,39}-(?:[1-9]|[1-9][0-9]|1[01][0-9]|12[0-7])))?"
)


def format_key(subnets: Subnets) -> str:
    """The last part of a lease's key: `10.5.34.0-24`, `10.5.34.0-24&fd00:34::-64`, `0.0.0.0-0&fd00::-64`."""
    v4 = _NO_V4 if subnets.v4 is None else str(subnets.v4).replace("/", "-")
    return v4 if subnets.v6 is None else f"{v4}&{str(subnets.v6).replace('/', '-')}"


def parse_key(name: str) -> Subnets:
    """The subnets that the last part of a key names.

    Only the spelling of `format_key` is taken, so that equal subnets have equal keys. Go flannel takes a
    few more, among them host bits, which it would put into routes.

    Raises:
        RecordError: it names no subnet, or not in that spelling.
    """
    match = _KEY.fullmatch(name)
    if match is None:
        raise RecordError(
            f"{gojson.show(name)} is no subnet key: expected one such as 10.5.34.0-24; delete the key"
        )
    v4, v6 = match.groups()
    try:
        subnets: Subnets = PerFamily(
            None if v4 == _NO_V4 else IPv4Network(v4.replace("-", "/")),
            None if v6 is None else IPv6Network(v6.replace("-", "/")),
        )
    except ValueError as error:
        raise RecordError(f"{name} is no subnet key: {error}; delete the key") from None
    if not subnets.values():
        raise RecordError(f"{name} names no subnet; delete the key")
    if v6 is not None and format_key(subnets) != name:
        raise RecordError(f"{name} is not in canonical form: expected {format_key(subnets)}; delete the key")
    return subnets


# --- values ---------------------------------------------------------------------------------------

_BACKEND_TYPE = re.compile(r"[A-Za-z0-9-]{0,64}")
_CANONICAL_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_OTHER_MACS = re.compile(
    r"[0-9a-f]{2}(?:(?::[0-9a-f]{2}){5}|(?:-[0-9a-f]{2}){5})|[0-9a-f]{4}(?:\.[0-9a-f]{4}){2}", re.IGNORECASE
)


def decode(entry: Entry) -> Record:
    """The record in one entry `subnets/<K>`, read as leniently as Go flannel reads it, and checked.

    Raises:
        RecordError: why it cannot be used: key, JSON, addresses, or what its backend needs of each family.
    """
    return decode_usual(entry) or _decode_any(entry)


def _decode_any(entry: Entry) -> Record:
    key = entry.key.removeprefix(SUBNETS_PREFIX)
    subnets = parse_key(key)
    fields = _read_fields(entry.value)
    backend_type: str = fields.get("backendtype", "")
    data = PerFamily(fields.get("backenddata"), fields.get("backendv6data"))
    return Record(
        key=key,
        subnets=subnets,
        public_ips=_public_ips(subnets, fields),
        backend_type=backend_type,
        backend_data=data,
        vtep_macs=_vtep_macs(subnets, data) if backend_type == "vxlan" else PerFamily(),
        node_id=fields.get("nodeid", ""),
        create_revision=entry.create_revision,
        mod_revision=entry.mod_revision,
        etcd_lease=entry.etcd_lease,
    )


def encode(record: Record) -> str:
    """The value as Go flannel writes it, with the node id as the last key if there is one."""
    value: dict[str, Any] = {
        "PublicIP": str(record.public_ips.v4 or "0.0.0.0"),  # noqa: S104 - "none", not an address to bind
        "PublicIPv6": None if record.public_ips.v6 is None else str(record.public_ips.v6),
    }
    optional = {
        "BackendType": record.backend_type or None,
        "BackendData": record.backend_data.v4,
        "BackendV6Data": record.backend_data.v6,
        "NodeID": record.node_id or None,
    }
    value |= {name: part for name, part in optional.items() if part is not None}
    return json.dumps(value, separators=(",", ":"))


def _read_fields(value: bytes) -> dict[str, Any]:
    """The fields by lower-case name, each occurrence checked and the last one kept."""
    if len(value) > MAX_VALUE:
        raise RecordError(f"the value has {len(value)} bytes: expected at most {MAX_VALUE}")
    try:
        document = gojson.load(value)
    except ValueError as error:
        raise RecordError(f"the value is {error}") from None
    if not isinstance(document, dict):
        raise RecordError(f"the value is {gojson.show(document)}: expected a JSON object")
    fields: dict[str, Any] = {}
    for key, given in gojson.members(document):
        name = key.casefold()
        read = _FIELDS.get(name)
        if read is not None:
            fields[name] = read(given, fields.get(name))
    return fields


def _wrong(name: str, value: Any, expected: str) -> RecordError:
    return RecordError(f"{name} {gojson.show(value)}: expected {expected}")


def _public_ip(value: Any, _earlier: Any) -> IPv4Address:
    if isinstance(value, str):
        try:
            return IPv4Address(value)
        except ValueError:
            pass
    raise _wrong("PublicIP", value, "an IPv4 address")


def _public_ipv6(value: Any, _earlier: Any) -> IPv6Address | None:
    if value is None:
        return None
    if isinstance(value, str) and "%" not in value:
        try:
            return IPv6Address(value)
        except ValueError:
            pass
    raise _wrong("PublicIPv6", value, "an IPv6 address or null")


def _backend_type(value: Any, earlier: Any) -> str:
    if value is None:
        return earlier or ""
    if not isinstance(value, str) or not _BACKEND_TYPE.fullmatch(value):
        raise _wrong("BackendType", value, 'the name of a backend, such as "vxlan"')
    return value.lower()


def _node_id(value: Any, earlier: Any) -> str:
    if value is None or value == "":
        return earlier or ""
    if not isinstance(value, str) or not is_node_id(value):
        raise _wrong("NodeID", value, "at most 64 of letters, digits, '_', '.' and '-'")
    return value


def _any(value: Any, _earlier: Any) -> Any:
    return value


_FIELDS: dict[str, Callable[[Any, Any], Any]] = {
    "publicip": _public_ip,
    "publicipv6": _public_ipv6,
    "backendtype": _backend_type,
    "backenddata": _any,
    "backendv6data": _any,
    "nodeid": _node_id,
}
"""By name as compared; each takes the value and what the same key gave before, which a null may keep."""


def why_unreachable(address: IPAddress) -> str | None:
    """Why no peer can send to this address, or None if it may well."""
    if address.is_unspecified:
        return "unspecified"
    if address.is_loopback:
        return "a loopback address"
    if address.is_multicast:
        return "a multicast address"
    if isinstance(address, IPv6Address):
        return None if address.ipv4_mapped is None else "an IPv4 address written as IPv6"
    return "the broadcast address" if int(address) == 0xFFFF_FFFF else None


def _public_ips(subnets: Subnets, fields: Mapping[str, Any]) -> PerFamily[IPAddress]:
    """Of the families in use, each checked."""
    addresses: dict[int, IPAddress] = {}
    for family, subnet in subnets.items():
        name, field = ("PublicIP", "publicip") if family == 4 else ("PublicIPv6", "publicipv6")
        address: IPAddress | None = fields.get(field)
        if address is None:
            raise RecordError(f"{name} is missing: expected the address of the host that holds {subnet}")
        reason = why_unreachable(address)
        if reason is not None:
            raise RecordError(
                f"{name} {address} is {reason}: expected the address of the host that holds {subnet}"
            )
        addresses[family] = address
    return PerFamily(addresses.get(4), addresses.get(6))


def _vtep_macs(subnets: Subnets, data: PerFamily[Any]) -> PerFamily[str]:
    return PerFamily(
        None if subnets.v4 is None else _vtep_mac("BackendData", data.v4),
        None if subnets.v6 is None else _vtep_mac("BackendV6Data", data.v6),
    )


def _vtep_mac(name: str, data: Any) -> str:
    if not isinstance(data, dict):
        raise _wrong(name, data, 'an object such as {"VNI":1,"VtepMAC":"82:4b:b1:2c:8f:a1"} for vxlan')
    text = None
    for key, value in gojson.members(data):
        if key == "VtepMAC" or key.casefold() == "vtepmac":
            text = value
    if not isinstance(text, str):
        raise _wrong(f"{name}.VtepMAC", text, "a MAC address such as 82:4b:b1:2c:8f:a1")
    mac = text if _CANONICAL_MAC.fullmatch(text) else _canonical_mac(f"{name}.VtepMAC", text)
    if mac == "00:00:00:00:00:00" or int(mac[1], 16) & 1:
        raise _wrong(f"{name}.VtepMAC", mac, "a unicast address, neither zero nor multicast")
    return mac


def _canonical_mac(name: str, text: str) -> str:
    """Lower case with colons, from the forms that Go's net.ParseMAC takes for 6 octets."""
    if not _OTHER_MACS.fullmatch(text):
        raise _wrong(name, text, "a MAC address such as 82:4b:b1:2c:8f:a1")
    return bytes.fromhex(re.sub("[:.-]", "", text)).hex(":")


# --- snapshots ------------------------------------------------------------------------------------


def config_entry(listing: Listing) -> Entry | None:
    """The entry with the network config, if there is one."""
    return next((entry for entry in listing.entries if entry.key == CONFIG_KEY), None)


def snapshot(
    listing: Listing,
    previous: Snapshot | None = None,
    *,
    replaced: bool = False,
    last_run: Mapping[str, Record] | None = None,
) -> Snapshot:
    """All records of a listing, and why the others are bad, both by the last part of their key.

    A key whose value cannot be read now keeps its record of `previous`, and is in `bad` as well; not if the
    key was deleted and created anew since. Unchanged records are the same objects as in `previous`; none is
    when etcd has another history since: `replaced` says so, or the listing shows it. `last_run`: records as
    they were before there was a `previous`: for values that cannot be read now, and for their age.
    """
    same_history = (
        previous is not None
        and not replaced
        and previous.cluster_id == listing.cluster_id
        and previous.revision <= listing.revision
    )
    known = previous.records if previous is not None else {}
    records: dict[str, Record] = {}
    bad: dict[str, str] = {}
    for entry in listing.entries:
        if entry.key.startswith(SUBNETS_PREFIX):
            key = entry.key.removeprefix(SUBNETS_PREFIX)
            old = known.get(key)
            if old is not None and same_history and _is_of(old, entry):
                records[key] = old
                continue
            if old is not None and same_history and old.create_revision != entry.create_revision:
                old = None
            _put(records, bad, key, entry, old)
            if same_history:
                _keep_age(records, old)
            if last_run is not None and (last := _last(last_run, key, entry)) is not None:
                records.setdefault(key, last)
                _keep_age(records, last)
    epoch = previous.epoch + (not same_history) if previous is not None else 0
    unreadable = max(
        (e.mod_revision for e in listing.entries if e.key.removeprefix(SUBNETS_PREFIX) in bad), default=0
    )
    if previous is not None and same_history:
        gone = previous.bad.keys() - bad.keys()
        unreadable = listing.revision if gone else max(unreadable, previous.unreadable)
    return Snapshot(listing.revision, listing.cluster_id, records, bad, epoch, unreadable)


def _last(last_run: Mapping[str, Record], key: str, entry: Entry) -> Record | None:
    """The record under this key, if it was written again since it was created, and not deleted in between."""
    with suppress(KeyError, RecordError):
        if entry.mod_revision == entry.create_revision:
            return None
        record = last_run[key]
        return record if record.create_revision == entry.create_revision else None
    return None


def fold(snapshot: Snapshot, changes: Changes) -> Snapshot:
    """The snapshot after some events; records that they do not mention stay the same objects.

    A put that cannot be read leaves the key's record as it was, and the key is in `bad` until a good put or a
    delete.
    """
    if not changes.changes:
        return replace(snapshot, revision=changes.revision)
    records, bad, unreadable = dict(snapshot.records), dict(snapshot.bad), snapshot.unreadable
    for change in changes.changes:
        if not change.key.startswith(SUBNETS_PREFIX):
            continue
        key = change.key.removeprefix(SUBNETS_PREFIX)
        was_bad = bad.pop(key, None) is not None
        old = records.pop(key, None)
        if change.entry is not None:
            _put(records, bad, key, change.entry, old)
            _keep_age(records, old)
        if key in bad or (was_bad and change.entry is None):
            unreadable = changes.revision
    touched = frozenset(change.key.removeprefix(SUBNETS_PREFIX) for change in changes.changes)
    since = snapshot.records, touched
    return Snapshot(changes.revision, snapshot.cluster_id, records, bad, snapshot.epoch, unreadable, since)


def _is_of(record: Record, entry: Entry) -> bool:
    return (
        record.mod_revision == entry.mod_revision
        and record.create_revision == entry.create_revision
        and record.etcd_lease == entry.etcd_lease
    )


def _put(records: dict[str, Record], bad: dict[str, str], key: str, entry: Entry, old: Record | None) -> None:
    try:
        records[key] = decode(entry)
    except RecordError as error:
        bad[key] = str(error)
        if old is not None:
            records[key] = old


def _keep_age(records: dict[str, Record], old: Record | None) -> None:
    """A record that says what `old`, of the same key and history, said is as old, though written anew."""
    fresh = None if old is None else records.get(old.key)
    if old is None or fresh is None or fresh is old or _content(fresh) != _content(old):
        return
    records[old.key] = replace(fresh, since_revision=said_since(old))


def said_since(record: Record) -> int:
    """The revision since which it says what it says."""
    return record.since_revision or record.mod_revision


def age(record: Record) -> tuple[int, str]:
    """To sort by: the older comes first."""
    return record.create_revision, record.key


def _content(record: Record) -> tuple[object, ...]:
    """All but when and under which etcd lease it was written."""
    return (
        record.create_revision,
        record.public_ips,
        record.backend_type,
        record.backend_data,
        record.node_id,
    )
