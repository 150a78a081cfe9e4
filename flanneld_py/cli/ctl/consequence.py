"""What the hosts make of a new network config: what is told before and after it is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flanneld_py.addresses import PerFamily, Subnets
from flanneld_py.backends import backend_of
from flanneld_py.backends.base import options_of
from flanneld_py.cli.ctl.control import ask
from flanneld_py.cli.ctl.settings import Settings
from flanneld_py.cli.ctl.text import count
from flanneld_py.core.config import parse_config
from flanneld_py.core.configchange import Settings as Changed
from flanneld_py.core.configchange import pending_reasons
from flanneld_py.core.freesubnets import count_subnets
from flanneld_py.core.records import config_entry, snapshot
from flanneld_py.core.subnetchoice import is_compatible
from flanneld_py.errors import ConfigError, FlanneldError
from flanneld_py.model import Listing, NetworkConfig, Record

APPLY = "flannelctl config apply, or a restart, takes it over there"
COMPARED = "no daemon of this prefix answers here, so this compares it with the config that was stored"


def too_narrow(before: Listing, fresh: NetworkConfig) -> Iterator[str]:
    """Where there are fewer subnets than hosts: some of them would find none."""
    hosts = [record for record in snapshot(before).records.values() if record.etcd_lease]
    for scope in fresh.ranges.values():
        total = count_subnets(scope)
        if total < len(hosts):
            yield (
                f"{scope.network} gives {count(total, 'subnet')} of /{scope.subnet_len} "
                f"({scope.subnet_min} to {scope.subnet_max}), but {count(len(hosts), 'host')} hold leases"
            )


def config_in_force(settings: Settings) -> bytes | None:
    """What this host's daemon has in force, whatever is stored; None: it has none, or cannot be asked."""
    try:
        answer = ask(settings.control_socket, "config")
    except FlanneldError:
        return None
    known = isinstance(answer, dict) and answer.get("key") == settings.config_name
    text = answer.get("in_force") if known else None
    return text.encode() if isinstance(text, str) else None


def consequence(before: Listing, fresh: NetworkConfig, in_force: bytes | None = None) -> str:
    """What the hosts make of the new config.

    Args:
        before: the registry before it was written.
        fresh: the new config.
        in_force: as `config_in_force`; None: what was stored before is taken for it.
    """
    entry = config_entry(before)
    old = in_force or (entry.value if entry else None)
    records = [*snapshot(before).records.values()]
    settings = _read(old)
    if settings is None or not records:
        return "daemons take it over at once"
    new = _changed(fresh)
    if in_force and new == settings:
        return "it is in force here already"
    told = _consequence(settings, new, records)
    return told if in_force else f"{told} ({COMPARED})"


def _consequence(old: Changed, new: Changed, records: Sequence[Record]) -> str:
    foreign = [record.key for record in records if not record.node_id]
    reasons = pending_reasons(old, new, PerFamily(), foreign)
    if reasons:
        return f"pending on every host that runs, as {'; '.join(reasons)}: {APPLY}"
    told = "daemons take it over at once"
    outside = [
        record.key for record in records if pending_reasons(old, new, _bound(record, old.config), foreign)
    ]
    if outside:
        told += f", but for {_named(outside)}, outside the new range, where it is pending: {APPLY}"
    if foreign and old != new:
        told += f"; hosts of Go flannel ({_named(foreign)}) read it at their next start"
    return told


def _bound(record: Record, old: NetworkConfig) -> Subnets:
    """What a range must contain to be followed by a record's host, as its daemon sees it."""
    return (
        record.subnets if record.node_id and record.etcd_lease and is_compatible(record, old) else PerFamily()
    )


def _read(text: bytes | None) -> Changed | None:
    """None: no host can have it in force."""
    try:
        return _changed(parse_config(text)) if text is not None else None
    except ConfigError:
        return None


def _changed(config: NetworkConfig) -> Changed:
    return Changed(config, options_of(backend_of(config)))


def _named(keys: Sequence[str]) -> str:
    return min(keys) + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
