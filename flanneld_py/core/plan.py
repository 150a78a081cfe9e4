"""The difference of two States, in an order in which every prefix is safe.

Safe means: no route whose neighbour or FDB entry is missing, nothing removed before its replacement
stands. That fixes the order. *Set* goes links, sysctls, offloads, addresses, pumps, tunnel, FDB, neighbours,
nexthops, routes, blackholes, files, rules: a neighbour that changes its MAC must find the new MAC's FDB entry
in place.
*Delete* is the reverse, but files first; links last. A link that the kernel cannot change in place is
replaced by its driver, and takes what hangs on it along only when the new one stands. One that a wanted link
cannot stand beside goes first: the kernel refuses two vxlan devices of one VNI and port. Rules come after
files: they are written by programs, for which subnet.env must not wait.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from msgspec.structs import replace

from flanneld_py.core.layered import flat
from flanneld_py.datapath import TunLink
from flanneld_py.model import (
    Link,
    NextHop,
    Op,
    Room,
    Route,
    State,
    Table,
    sets,
)

SET_ORDER: tuple[Table, ...] = (
    "links",
    "sysctls",
    "offloads",
    "addrs",
    "pumps",
    "tunnel",
    "fdb",
    "neighs",
    "nexthops",
    "routes",
    "blackholes",
    "files",
    "rules",
)
SET_TOGETHER: frozenset[Table] = frozenset({"fdb", "neighs", "nexthops"})
"""Whichever of their rows fails, those of the others may be set all the same: routes wait for all three."""
DELETE_ORDER: tuple[Table, ...] = ("files", *(table for table in reversed(SET_ORDER) if table != "files"))
"""subnet.env promises a network, so it goes before anything of that."""

MISSING = object()


def plan(want: State, have: State) -> list[Op]:
    """The ops that turn `have` into `want`; empty when they are equal."""
    in_the_way = {name: room for name in have.links if (room := _room(name, have, want)) is not None}
    gone = [name for name in have.links if name not in want.links and name not in in_the_way]
    ops = [Op("del", "links", name, room) for name, room in in_the_way.items()]
    replaced = [name for name, link in want.links.items() if _is_replaced(name, link, have)]
    rest = without_devices(have, {*in_the_way, *gone, *replaced})
    # Of the state that is wanted much may be the same object as what is there: nothing is to do about that.
    tables = {table for table in SET_ORDER if want.table(table) is not rest.table(table)}
    for table in SET_ORDER:
        if table in tables:
            ops += _sets(table, want.table(table), rest.table(table))
    for table in DELETE_ORDER:
        if table in tables:
            ops += _deletes(table, want.table(table), rest.table(table))
    ops += [Op("del", "links", name) for name in gone]
    return ops


def must_recreate(have: Link, want: Link) -> bool:
    """Whether the kernel cannot change `have` into `want` in place (drivers/net/vxlan, vxlan_changelink)."""
    if isinstance(have, TunLink) or isinstance(want, TunLink):
        return type(have) is not type(want)
    return (
        have.vni != want.vni
        or have.port != want.port
        or have.gbp != want.gbp
        or have.local.version != want.local.version
    )


def exclude_each_other(one: Link, other: Link) -> bool:
    """Whether the kernel refuses them beside each other (drivers/net/vxlan, vxlan_vni_in_use).

    A port and family have one socket with one set of flags, and behind it a VNI names one device.
    """
    if isinstance(one, TunLink) or isinstance(other, TunLink):
        return False
    same_socket = one.port == other.port and one.local.version == other.local.version
    return same_socket and (one.vni == other.vni or one.gbp != other.gbp)


def lost_devices(ops: Collection[Op], have: State) -> set[str]:
    """Those that these ops delete or replace: the plan counts what hangs on them as gone."""
    links = (op for op in ops if op.table == "links")
    return {op.key for op in links if op.verb == "del" or _is_replaced(op.key, op.value, have)}


def replaces(name: str, want: Link, old: str, have: State) -> bool:
    """Whether the link `name` cannot be made while `old` of `have` stands."""
    return name == old or exclude_each_other(have.links[old], want)


def rows_on(have: State, devices: Collection[str]) -> list[Op]:
    """The ops that make these devices and what hung on them anew, as they were."""
    rest = without_devices(have, set(devices))
    return [op for table in SET_ORDER for op in _sets(table, have.table(table), rest.table(table))]


def without_devices(state: State, names: set[str]) -> State:
    """What the kernel keeps of `state` when it deletes these devices: nothing that hangs on them."""
    if not names:
        return state
    return replace(
        state,
        links={name: link for name, link in state.links.items() if name not in names},
        sysctls={p: v for p, v in state.sysctls.items() if names.isdisjoint(p.split("/"))},
        offloads={dev: v for dev, v in state.offloads.items() if dev not in names},
        addrs={key: v for key, v in state.addrs.items() if key[0] not in names},
        pumps={dev: pump for dev, pump in state.pumps.items() if dev not in names},
        tunnel={key: end for key, end in state.tunnel.items() if key[0] not in names},
        fdb={key: v for key, v in state.fdb.items() if key[0] not in names},
        neighs={key: v for key, v in state.neighs.items() if key[0] not in names},
        nexthops={hop: v for hop, v in state.nexthops.items() if hop.dev not in names},
        routes={dst: r for dst, r in state.routes.items() if r.nexthop.dev not in names},
    )


def apply_all(state: State, ops: Collection[Op]) -> State:
    """`state` after all of `ops` succeeded, as the kernel would leave it; each table is copied once."""
    tables: dict[Table, dict[Any, Any]] = {}
    for op in ops:
        if op.table == "links" and lost_devices([op], state := replace(state, **tables)):
            state, tables = without_devices(state, {op.key}), {}
            if op.verb == "del":
                continue
        table = tables.get(op.table)
        if table is None:
            table = tables[op.table] = {**flat(state.table(op.table))}
        if op.verb == "set":
            table[op.key] = op.value
        else:
            table.pop(op.key, None)
    return replace(state, **tables)


def share(have: State, want: State) -> State:
    """`have` with the tables of `want` where they are equal: what stands as it should is in memory once."""
    equal = {table for table in SET_ORDER if have.table(table) == want.table(table)}
    if len(equal) == len(SET_ORDER):
        return want
    return replace(have, **{table: want.table(table) for table in equal})


def referents(op: Op, want: State) -> Iterator[tuple[Table, Any]]:
    """The rows that must stand before `op` may be tried: a route without its neighbour is a black hole.

    No peer's rows are among those of a file, so one that fails does not hold it back.
    """
    if op.table == "addrs" and op.verb == "del":
        # With its last IPv4 address a device loses its neighbours (net/ipv4/fib_frontend.c, fib_disable_ip).
        yield from (("addrs", key) for key in want.addrs if key[0] == op.key[0])
    if op.verb == "del":
        return
    if op.table in ("addrs", "fdb", "neighs"):
        yield "links", op.key[0]
    elif op.table == "tunnel":
        yield "pumps", op.key[0]
    elif op.table == "nexthops":
        yield "links", op.key.dev
    elif op.table == "routes":
        yield from _route_referents(op.value, want)
    elif op.table in ("offloads", "pumps"):
        yield "links", op.key
    elif op.table == "sysctls":
        yield from (("links", name) for name in op.key.split("/") if name in want.links)
    elif op.table == "files":
        # subnet.env tells the container runtime that there is a network.
        yield from (("links", name) for name in want.links)
        yield from (("addrs", key) for key in want.addrs)
        yield from (("pumps", name) for name in want.pumps)


def still_needed(want: State, have: State, failed: Collection[tuple[Table, Any]]) -> set[tuple[Table, Any]]:
    """What must not be deleted now: the rows under those whose replacement has failed."""
    needed: set[tuple[Table, Any]] = set()
    for table, key in failed:
        neighbour = key if table == "neighs" else None
        if table in ("links", "addrs"):
            link = want.links.get(key if table == "links" else key[0])
            needed |= {("links", name) for name, old in have.links.items() if link and _alike(old, link)}
        if table == "routes" and key in have.routes:
            hop = have.routes[key].nexthop
            needed |= {("links", hop.dev), ("nexthops", hop)}
            if hop.via is not None:
                neighbour = (hop.dev, hop.via)
                needed.add(("neighs", neighbour))
        mac = have.neighs.get(neighbour) if neighbour else None
        if neighbour and mac:
            needed.add(("fdb", (neighbour[0], mac)))
    return needed


def _route_referents(route: Route, want: State) -> Iterator[tuple[Table, Any]]:
    hop: NextHop = route.nexthop
    yield "links", hop.dev
    if hop.via is None:
        return
    yield "nexthops", hop
    neighbour = (hop.dev, hop.via)
    yield "neighs", neighbour
    mac = want.neighs.get(neighbour)
    if mac is not None:
        yield "fdb", (hop.dev, mac)


def _room(name: str, have: State, want: State) -> Room | None:
    """The wanted link that cannot be made while the one of this name stands."""
    link = have.links[name]
    if name in want.links:
        new = want.links[name]
        return Room(name, new) if must_recreate(link, new) and exclude_each_other(link, new) else None
    rooms = (Room(*wanted) for wanted in want.links.items())
    return next((room for room in rooms if exclude_each_other(link, room.link)), None)


def _is_replaced(name: str, want: Link, have: State) -> bool:
    return name in have.links and must_recreate(have.links[name], want)


def _alike(old: Link, new: Link) -> bool:
    """Whether they serve the same family; a TUN serves both."""
    if isinstance(old, TunLink) or isinstance(new, TunLink):
        return True
    return old.local.version == new.local.version


def _sets(table: Table, want: Mapping[Any, Any], have: Mapping[Any, Any]) -> list[Op]:
    if not have:
        return sets(table, want)
    return [
        Op("set", table, key, value)
        for key, value in want.items()
        if (there := have.get(key, MISSING)) is not value and there != value
    ]


def _deletes(table: Table, want: Mapping[Any, Any], have: Mapping[Any, Any]) -> Iterator[Op]:
    for key in have:
        if key not in want:
            yield Op("del", table, key)
