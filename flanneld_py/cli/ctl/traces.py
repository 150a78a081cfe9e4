"""What a daemon leaves in files: by these a cleanup knows what is ours, and these it removes last."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from msgspec import Struct

from flanneld_py.addresses import IPNetwork
from flanneld_py.cli.ctl.control import read_status_file
from flanneld_py.cli.ctl.settings import Settings
from flanneld_py.cli.ctl.text import printable
from flanneld_py.core.hostfiles import SubnetEnv, parse_subnet_env
from flanneld_py.core.records import format_key
from flanneld_py.core.statefile import SavedState, parse_state
from flanneld_py.daemon.oldfiles import ASIDE, read_regular
from flanneld_py.drivers.files import TEMPORARY
from flanneld_py.errors import UsageError


class Traces(Struct, frozen=True):
    """The last run of the daemon of one prefix."""

    saved: SavedState | None
    status: dict[str, Any] | None
    subnet_env: SubnetEnv | None
    """None when there is none, or another program's."""

    @property
    def daemon_ran(self) -> bool:
        """If not, only what bears our mark is ours: a Go flannel may be at work here."""
        return self.saved is not None or self.status is not None

    @property
    def node_id(self) -> str:
        return self.saved.node_id if self.saved else str((self.status or {}).get("node_id") or "")

    @property
    def lease_key(self) -> str:
        """Of the lease that the daemon last held; empty if it is not known."""
        return format_key(self.saved.subnets) if self.saved and self.saved.subnets.values() else ""

    @property
    def networks(self) -> Iterator[IPNetwork]:
        if self.saved:
            yield from self.saved.networks
        if self.subnet_env:
            yield from self.subnet_env.networks.values()
        told = (self.status or {}).get("networks")
        for text in told if isinstance(told, list) else ():
            with suppress(ValueError):
                yield ip_network(str(text))


def find_traces(settings: Settings) -> Traces:
    """Read the files.

    Raises:
        UsageError: they are those of a daemon with another prefix.
    """
    saved = parse_state(_text(settings.state_file))
    status = read_status_file(settings.status_file)
    if status is not None and not isinstance(status.get("prefix"), str):
        status = None
    for path, prefix in (
        (settings.state_file, saved.prefix if saved else None),
        (settings.status_file, status["prefix"] if status else None),
    ):
        if prefix is not None and prefix != settings.prefix:
            raise UsageError(
                f"{path} is of the daemon with --etcd-prefix {printable(prefix)}, not {settings.prefix}; "
                "give the prefix, --subnet-file and --state-dir that the daemon was started with"
            )
    env = parse_subnet_env(_text(settings.subnet_file))
    leased = saved.subnets.values() if saved else ()
    its_own = status is not None or (bool(leased) and env.subnets.values() == leased)
    return Traces(saved, status, env if its_own and settings.subnet_file.exists() else None)


def _text(path: Path) -> str:
    try:
        return read_regular(path) or ""
    except OSError:
        return ""


class OwnFiles:
    """The daemon's own files and directories, to be looked at before the lock is taken, which makes some."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = settings.state_dir / "lock"
        self._made_by_lock = [path for path in (self._lock, settings.state_dir) if not path.exists()]

    def files(self, *, status_is_ours: bool) -> list[Path]:
        """Those that are there, in the order in which to delete them."""
        settings = self._settings
        status = [settings.status_file] if status_is_ours else []
        state_dir = settings.state_dir
        of_state = (state_dir / name for name in ("node-id", "registry", "tunnel"))
        aside = [state_dir / (name + ASIDE) for name in ("registry", settings.state_file.name)]
        rewritten = [*status, *aside, *of_state, settings.state_file]
        temporary = [
            path
            for target in (settings.subnet_file, *rewritten)
            for path in sorted(target.parent.glob(".*"))
            if (match := TEMPORARY.fullmatch(path.name)) and match["name"] == target.name
        ]
        lock = [] if self._lock in self._made_by_lock else [self._lock]
        found = [path for path in (*temporary, *rewritten, *lock) if path.is_file()]
        if _is_socket(settings.control_socket):
            found.insert(0, settings.control_socket)
        return found

    def directories(self, gone: list[Path]) -> list[Path]:
        """Those that are empty once the files `gone` are, and held one of them."""
        places = dict.fromkeys((self._settings.subnet_file.parent, self._settings.state_dir))
        left_out = {*gone, *self._made_by_lock}
        return [
            place
            for place in places
            if any(path.parent == place for path in gone) and left_out.issuperset(place.iterdir())
        ]

    def remove_what_the_lock_made(self) -> None:
        for path in self._made_by_lock:
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False
