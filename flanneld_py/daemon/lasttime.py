"""What the files of earlier runs tell. What cannot be used is put aside with a warning, and stops nobody."""

from __future__ import annotations

from pathlib import Path

import structlog
from msgspec import Struct

from flanneld_py.addresses import IPNetwork
from flanneld_py.core.hostfiles import parse_subnet_env
from flanneld_py.core.registrycache import Cached, DamagedError, Origin, parse
from flanneld_py.core.statefile import SavedState, parse_state, why_unusable
from flanneld_py.daemon.leaseground import LastRun
from flanneld_py.daemon.oldfiles import read_regular
from flanneld_py.daemon.options import Options
from flanneld_py.daemon.statedir import put_aside, read_own
from flanneld_py.drivers.files import remove_leftovers

LONGEST_CACHE = 1 << 26
"""Bytes of the registry's file; ten thousand records take 2.5 MB."""


class LastTime(Struct, frozen=True):
    """Of the state file and the old subnet.env."""

    run: LastRun
    networks: tuple[IPNetwork, ...]
    saved: SavedState
    mac_seed: str = ""
    subnets: tuple[IPNetwork, ...] = ()
    """In the old subnet.env."""


def last_time(options: Options) -> LastTime:
    """Read them; what is missing or unusable counts as empty."""
    saved = _saved(options)
    old = parse_subnet_env(old_text(options.subnet_file))
    return LastTime(
        run=LastRun.of(saved, old.subnets),
        networks=tuple(dict.fromkeys((*saved.networks, *old.networks.values()))),
        saved=saved,
        subnets=old.subnets.values(),
        mac_seed=saved.mac_seed,
    )


def last_registry(options: Options, node_id: str) -> Cached | None:
    """What the last run knew of the registry; whether this is still the same machine is not known yet."""
    remove_leftovers(options.registry_file)
    text = read_own(options.registry_file, LONGEST_CACHE)
    if text is None:
        return None
    try:
        cached = parse(text)
        reason = _foreign(cached.origin, options.etcd.prefix, node_id)
    except DamagedError as error:
        reason = str(error)
    if reason:
        put_aside(options.registry_file, reason)
        return None
    return cached


def _foreign(origin: Origin, prefix: str, node_id: str) -> str:
    """Why it is another daemon's; empty: it is not."""
    if origin.prefix != prefix:
        return f"is of prefix {origin.prefix[:100]}, not {prefix}"
    if origin.node_id != node_id:
        return f"is of node id {origin.node_id[:100]}, not {node_id}"
    return ""


def _saved(options: Options) -> SavedState:
    prefix = options.etcd.prefix
    remove_leftovers(options.state_file)
    text = read_own(options.state_file)
    if text is None:
        return SavedState(prefix, "")
    saved = parse_state(text)
    if saved is not None and saved.prefix == prefix:
        return saved
    reason = why_unusable(text) if saved is None else f"is of prefix {saved.prefix[:100]}, not {prefix}"
    put_aside(options.state_file, reason)
    return SavedState(prefix, "")


def old_text(path: Path) -> str:
    """Of a file that other programs write, too; empty when there is none, or it cannot be read."""
    try:
        return read_regular(path) or ""
    except OSError as error:
        structlog.get_logger().warning("file_ignored", part="main", path=str(path), error=error.strerror)
        return ""
