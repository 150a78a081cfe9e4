"""What etcd's whole history says: who owned which subnet when, and what was written for nothing."""

from __future__ import annotations

import json
from ipaddress import ip_network
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.chaos.history import Event
    from tests.chaos.recording import Recording


YIELDS_WITHIN = 5.0
OURS = "chaos"
"""Node id of records that a fault wrote."""


def networks_of(key: str) -> list[str]:
    """`subnets/10.5.101.0-24&fd00:5:0:1::-64` → both prefixes."""
    parts = key.removeprefix("subnets/").split("&")
    return ["/".join(part.rsplit("-", 1)) for part in parts if not part.startswith("0.0.0.0-0")]


def _overlap(one: str, other: str) -> bool:
    pairs = [(ip_network(a), ip_network(b)) for a in networks_of(one) for b in networks_of(other)]
    return any(a.version == b.version and a.overlaps(b) for a, b in pairs)


def _owned(run: Recording) -> Iterator[tuple[Event, dict[str, str]]]:
    """Each change of a subnet's key, with who owned what before it: key → node id."""
    owners: dict[str, str] = {}
    for event in run.events:
        if not event.key.startswith("subnets/"):
            continue
        yield event, dict(owners)
        if event.owner:
            owners[event.key] = event.owner
        elif event.value is None:
            owners.pop(event.key, None)


def check_ownership(run: Recording) -> Iterator[str]:
    """No two owners overlap but for a moment, and no key changes its owner without being deleted between."""
    if run.history_gaps:
        yield f"the history is not known at revisions {', '.join(map(str, run.history_gaps))}"
    for event, owners in _owned(run):
        if not event.owner:
            continue
        if event.owner == OURS:
            continue  # whoever it is taken from had no say in it
        before = owners.get(event.key)
        if before not in {None, event.owner}:
            yield f"revision {event.revision}: {event.key} went from {before} to {event.owner} at once"
        for key, owner in owners.items():
            if owner == event.owner or not _overlap(key, event.key):
                continue
            if key != event.key and _stand_together(run, event, key) > YIELDS_WITHIN:
                yield f"revision {event.revision}: {event.key} of {event.owner} overlaps {key} of {owner}"


def _stand_together(run: Recording, younger: Event, older: str) -> float:
    """Seconds for which a record and an older one both stand.

    Keys of two families, or of two lengths, can overlap and differ, so that the guard of a claim lets both of
    two hosts through that choose at one moment. The younger one sees that before it holds anything, and goes.
    """
    left = (
        event.at
        for event in run.events
        if event.revision > younger.revision and event.key in {younger.key, older} and event.value is None
    )
    return next(left, run.stopped) - younger.at


def check_stability(run: Recording) -> Iterator[str]:
    """Hosts that were there all the time keep their first subnet, and name addresses that can be used."""
    names = {node_id: name for name, node_id in run.hosts.items()}
    first: dict[str, str] = {}
    for event in run.events:
        if event.key.startswith("subnets/") and event.owner in names:
            kept = first.setdefault(event.owner, event.key)
            if str(event.record.get("PublicIPv6")).startswith("fe80"):
                yield f"{names[event.owner]} published {event.record['PublicIPv6']} at {run.time(event.at)}"
            if kept != event.key and event.at > run.began:
                yield f"{names[event.owner]} had {kept} and took {event.key} at {run.time(event.at)}"


def check_idempotence(run: Recording) -> Iterator[str]:
    """No record is written again as it is, and nothing at all is when all is well."""
    last: dict[str, Event] = {}
    for event in run.events:
        before = last.get(event.key)
        if before and event.owner and (event.value, event.lease) == (before.value, before.lease):
            yield f"revision {event.revision}: {event.key} was written again as it is at {run.time(event.at)}"
        last[event.key] = event
        if run.settled < event.at < run.stopped and event.key.startswith("subnets/"):
            verb = "written" if event.value is not None else "deleted"
            yield f"{event.key} was {verb} at {run.time(event.at)}, when all was well"
    for gone in run.routes_gone:
        if run.settled < gone.at < run.stopped:
            yield f"{gone.host} deleted its route to {gone.destination} when all was well"


def check_watch(run: Recording) -> Iterator[str]:
    """What the registry client delivered: in order, once, without a gap, or a whole listing."""
    truth: dict[str, list[tuple[int, str | None]]] = {}
    for event in run.events:
        truth.setdefault(event.key, []).append((event.revision, event.value))
    revisions = {event.revision for event in run.events}
    at = 0
    for line in run.mirror.splitlines():
        item = json.loads(line)
        if item["kind"] == "listing":
            at = item["revision"]
            listed = dict(item["keys"])
            expected = {key: value for key in truth if (value := _value(truth[key], at)) is not None}
            if listed != expected:
                wrong = sorted({key for key in {*listed, *expected} if listed.get(key) != expected.get(key)})
                yield f"the listing at revision {at} is wrong about {', '.join(wrong)}"
            continue
        yield from _check_changes(item, at, truth)
        at = max(at, item["revision"])
    newest = max(revisions, default=0)
    if at < newest:
        yield f"the watch came to revision {at} only; the registry's is {newest}"


def _value(writes: list[tuple[int, str | None]], at: int) -> str | None:
    """Of a key at a revision."""
    return next((value for revision, value in reversed(writes) if revision <= at), None)


def _check_changes(
    item: dict[str, object], at: int, truth: dict[str, list[tuple[int, str | None]]]
) -> Iterator[str]:
    """One delivery after revision `at`: all that happened to the prefix up to its own revision, in order."""
    upto, keys = item["revision"], item["keys"]
    assert isinstance(upto, int)
    assert isinstance(keys, list)
    due = sorted(
        (revision, key, value)
        for key, writes in truth.items()
        for revision, value in writes
        if at < revision <= upto
    )
    delivered = [(key, value) for key, value in keys]
    expected = [(key, value) for _, key, value in due]
    if sorted(delivered, key=repr) != sorted(expected, key=repr):
        yield f"after revision {at} the watch delivered {delivered!r} up to {upto}, and not {expected!r}"
        return
    # Of several keys written at one revision the order is nobody's business.
    if delivered != expected and len({revision for revision, *_ in due}) == len(due):
        yield f"after revision {at} the watch delivered out of order: {delivered!r}"
