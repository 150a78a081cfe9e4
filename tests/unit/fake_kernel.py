"""The kernel's own rules for the rows of a State, in dicts, as measured on Linux 6.18.

Written from what `ip` and `bridge` show, not from flanneld_py.core.plan: what vanishes with what is the very
thing the plan must get right.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.datapath import TunLink
from flanneld_py.model import (
    Link,
    Op,
    State,
    Table,
    VxlanLink,
)
from tests.unit.strategies import TABLES, mac, states, underlay

EXTERNAL = ("eth0", "eth1")
"""Devices that are there, up, and not ours."""


class FakeKernel:
    """Objects of one network namespace, and files. `apply` answers as the kernel would: None or an error."""

    def __init__(self) -> None:
        self.tables: dict[Table, dict[Any, Any]] = {table: {} for table in TABLES}

    @classmethod
    def holding(cls, state: State) -> FakeKernel:
        """A kernel into which `state` was put row by row; it must be a state that a kernel can be in."""
        kernel = cls()
        for table in TABLES:
            for key, value in state.table(table).items():
                error = kernel.apply(Op("set", table, key, value))
                assert error is None, f"{table} {key}: {error}"
        return kernel

    def copy(self) -> FakeKernel:
        twin = FakeKernel()
        twin.tables = {table: dict(rows) for table, rows in self.tables.items()}
        return twin

    def observe(self, sysctls: Collection[str]) -> State:
        """All rows; a device has its sysctls without anybody's wish, so only those asked for count."""
        tables = {table: dict(rows) for table, rows in self.tables.items()}
        tables["sysctls"] = {path: v for path, v in tables["sysctls"].items() if path in sysctls}
        return State(**tables)

    def apply(self, op: Op) -> str | None:
        act: Callable[[Op], str | None] = getattr(self, f"_{op.verb}_{op.table}")
        return act(op)

    # --- links

    def _set_links(self, op: Op) -> str | None:
        links, name, new = self.tables["links"], op.key, op.value
        if isinstance(new, VxlanLink) and new.dev not in EXTERNAL:
            return f"Cannot find device {new.dev}"
        old = links.get(name)
        if old is None or fixed(old) != fixed(new):
            # The new device is made beside the old one first, whose place it then takes.
            if any(collide(new, other) for other in links.values()):
                return "A VXLAN device with the specified VNI already exists, or: Address already in use"
            self._del_links(op)
            self.tables["sysctls"][f"net/ipv6/conf/{name}/accept_ra"] = "1"
            old = None
        links[name] = new
        if isinstance(old, VxlanLink) and old.mac != new.mac:
            self._drop("neighs", lambda key, _: key[0] == name)
        if not new.up:
            self._drop_what_needs_an_up_device(name)
        return None

    def _del_links(self, op: Op) -> str | None:
        name = op.key
        if self.tables["links"].pop(name, None) is None:
            return None
        self._drop("sysctls", lambda key, _: f"/{name}/" in key)
        for table in ("addrs", "fdb"):
            self._drop(table, lambda key, _: key[0] == name)
        self._drop("offloads", lambda key, _: key == name)
        self._del_pumps(op)
        self._drop_what_needs_an_up_device(name)
        return None

    def _drop_what_needs_an_up_device(self, name: str) -> None:
        self._drop("neighs", lambda key, _: key[0] == name)
        self._drop("nexthops", lambda key, _: key.dev == name)
        self._drop("routes", lambda _, route: route.nexthop.dev == name)

    # --- what hangs on links

    def _set_offloads(self, op: Op) -> str | None:
        return self._put_on_device(op, op.key)

    def _set_sysctls(self, op: Op) -> str | None:
        *_, device, _ = op.key.split("/")
        return self._put(op) if device in self.tables["links"] else "No such file or directory"

    def _del_sysctls(self, op: Op) -> str | None:
        return f"{op.key}: nothing below /proc/sys can be deleted"

    def _set_addrs(self, op: Op) -> str | None:
        return self._put_on_device(op, op.key[0])

    def _del_addrs(self, op: Op) -> str | None:
        device, address = op.key
        self.tables["addrs"].pop(op.key, None)
        if address.version == 4 and not any(
            other == device and left.version == 4 for other, left in self.tables["addrs"]
        ):
            # A device without IPv4 address loses its ARP entries, permanent ones too.
            self._drop("neighs", lambda key, _: key[0] == device and key[1].version == 4)
        return None

    def _set_pumps(self, op: Op) -> str | None:
        return self._put_on_device(op, op.key)

    def _set_tunnel(self, op: Op) -> str | None:
        return self._put(op) if op.key[0] in self.tables["pumps"] else "there is no data plane"

    def _del_pumps(self, op: Op) -> str | None:
        self.tables["pumps"].pop(op.key, None)
        self._drop("tunnel", lambda key, _: key[0] == op.key)
        return None

    def _set_fdb(self, op: Op) -> str | None:
        return self._put_on_device(op, op.key[0])

    def _set_neighs(self, op: Op) -> str | None:
        return self._put_on_device(op, op.key[0])

    def _set_nexthops(self, op: Op) -> str | None:
        if op.key.via.version != 4:
            return "nexthop objects are for IPv4 here"
        return self._put_on_device(op, op.key.dev, up=True)

    def _del_nexthops(self, op: Op) -> str | None:
        if self.tables["nexthops"].pop(op.key, None) is not None:
            self._drop("routes", lambda to, route: to.version == 4 and route.nexthop == op.key)
        return None

    def _set_routes(self, op: Op) -> str | None:
        hop = op.value.nexthop
        if op.key.version == 4 and hop.via is not None and hop not in self.tables["nexthops"]:
            return "Nexthop id does not exist"
        return self._put_on_device(op, hop.dev, up=True)

    def _set_blackholes(self, op: Op) -> str | None:
        return self._put(op)

    def _set_rules(self, op: Op) -> str | None:
        return self._put(op)

    def _set_files(self, op: Op) -> str | None:
        return self._put(op)

    def _del_plainly(self, op: Op) -> str | None:
        self.tables[op.table].pop(op.key, None)
        return None

    _del_tunnel = _del_fdb = _del_neighs = _del_routes = _del_blackholes = _del_plainly
    _del_offloads = _del_rules = _del_files = _del_plainly

    def _put(self, op: Op) -> str | None:
        self.tables[op.table][op.key] = op.value
        return None

    def _put_on_device(self, op: Op, device: str, *, up: bool = False) -> str | None:
        link = self.tables["links"].get(device)
        if link is None and device not in EXTERNAL:
            return f"Cannot find device {device}"
        if up and link is not None and not link.up:
            return "Network is down"
        return self._put(op)

    def _drop(self, table: Table, which: Callable[[Any, Any], bool]) -> None:
        rows = self.tables[table]
        for key in [key for key, value in rows.items() if which(key, value)]:
            del rows[key]


def fixed(link: Link) -> tuple[object, ...]:
    """What the kernel cannot change of a device."""
    if isinstance(link, TunLink):
        return ("tun",)
    return link.vni, link.port, link.gbp, link.local.version


def collide(one: Link, other: Link) -> bool:
    """One socket per port, family and set of flags; behind one socket a VNI names one device."""
    if isinstance(one, TunLink) or isinstance(other, TunLink):
        return False
    if (one.port, one.local.version) != (other.port, other.local.version):
        return False
    return one.vni == other.vni or one.gbp != other.gbp


# --- as an earlier run left it --------------------------------------------------------------------


@st.composite
def kernels(draw: st.DrawFn) -> FakeKernel:
    """A kernel as an earlier run left it, and others damaged it."""
    kernel = FakeKernel.holding(draw(states()))
    for table, which in draw(st.lists(st.tuples(st.sampled_from(TABLES), st.integers(0, 30)), max_size=6)):
        rows = kernel.tables[table]
        if not rows or table == "sysctls":
            continue
        key = sorted(rows, key=repr)[which % len(rows)]
        _vandalise(kernel, Op("del", table, key), which)
    return kernel


def _vandalise(kernel: FakeKernel, op: Op, how: int) -> None:
    """Delete a row, or do worse."""
    link = kernel.tables["links"].get(op.key) if op.table == "links" else None
    if link is not None and how % 3 == 0:
        kernel.apply(Op("set", "links", op.key, replace(link, up=False)))
    elif link is not None and how % 3 == 1:
        _rename(kernel, op.key, link)
    elif op.table == "neighs" and how % 2:
        kernel.apply(Op("set", "neighs", op.key, mac(99)))
    elif op.table == "fdb" and how % 2:
        kernel.apply(Op("set", "fdb", op.key, underlay(4, 99)))
    else:
        kernel.apply(op)


def _rename(kernel: FakeKernel, name: str, link: Link) -> None:
    """`ip link set flannel.1 name lost0`: the device stays ours by its alias."""
    kernel.apply(Op("del", "links", name))
    kernel.apply(Op("set", "links", "lost0", link))
