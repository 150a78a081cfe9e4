"""The network config: which is in force, what is wrong with the one that is stored, and what waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from random import Random

import structlog
from msgspec import Struct

from flanneld_py.addresses import IPNetwork, PerFamily
from flanneld_py.backends import backend_of
from flanneld_py.backends.base import options_of
from flanneld_py.core.allocate import refit
from flanneld_py.core.config import parse_config
from flanneld_py.core.configchange import Settings, pending_reasons
from flanneld_py.core.configkeys import unknown_keys
from flanneld_py.core.leasedecision import Move, Wish
from flanneld_py.core.prefix import key_root
from flanneld_py.core.records import CONFIG_KEY
from flanneld_py.core.subnetchoice import is_compatible
from flanneld_py.daemon.inbox import Inbox, Network, Problem, boottime
from flanneld_py.errors import ConfigError, FlanneldError, HostError
from flanneld_py.model import Entry, NetworkConfig

EXAMPLE_CONFIG = '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'
APPLY = (
    "flannelctl config apply, or a restart, takes it over on this host: containers may get new addresses, "
    "and hosts with another Network are cut off until they do the same"
)
UNFIT = "put that right on this host, or store a config that it can carry out; either is noticed at once"
APPLIED_WITHIN = 3.0
"""Seconds to wait for the lease that a config demands: mostly it is there at once."""
REVIEWED = ("config-pending", "config-unfit")
"""Codes of the problems that may end by themselves."""
CUT_OFF = "hosts that have not applied it yet are cut off from this one: apply it on every host"


class _Stored(Struct, frozen=True):
    """The config as it stands in etcd, valid."""

    text: bytes
    network: Network


class ConfigWatch:
    """Offers `network` and `config_problem`."""

    def __init__(self, prefix: str, inbox: Inbox, config_lines: Callable[[str, str], str]) -> None:
        """`config_lines`: whole key and value → what stores it in a shell, for advice."""
        self._inbox = inbox
        self._config_lines = config_lines
        self._log = structlog.get_logger().bind(part="registry")
        self._key = f"{key_root(prefix)}{CONFIG_KEY}"
        self._lock = threading.Lock()
        self._text: bytes | None = None
        self._stored: _Stored | None = None
        self._in_force: _Stored | None = None
        self._seen = False

    def take(self, entry: Entry | None) -> None:
        """What is stored now; None: nothing."""
        with self._lock:
            text = entry.value if entry else None
            if self._seen and text == self._text:
                return
            self._seen, self._text, self._stored = True, text, None
            if text is None:
                self._report(self._missing())
                return
            try:
                config = parse_config(text)
                self._stored = _Stored(text, Network(config, backend_of(config)))
            except ConfigError as error:
                what = (
                    "the config in force stays" if self._in_force else "nothing is set up until it is mended"
                )
                self._report(
                    Problem(
                        "config-invalid",
                        f"{error}; {what}",
                        f"correct {self._key} in etcd (flannelctl config set checks it)",
                    )
                )
                return
            self._settle(self._stored)

    def review(self) -> None:
        """Records or host have changed: what kept a config waiting may have gone. Any thread may call."""
        with self._lock:
            problem = self._inbox.levels.config_problem
            if self._stored is not None and problem is not None and problem.code in REVIEWED:
                self._settle(self._stored)

    def apply(self) -> str:
        """Take over the stored config, whatever waits for a restart; what was done. Any thread may call.

        Raises:
            FlanneldError: there is nothing to take over, or no lease to be had that it allows; or it was
                taken over, and such a lease is still awaited.
        """
        with self._lock:
            stored = self._stored
            if stored is None:
                problem = self._inbox.levels.config_problem
                raise FlanneldError(
                    f"nothing to apply: {problem.reason if problem else 'no config was read yet'}"
                )
            if self._in_force is not None and self._in_force.network.config == stored.network.config:
                raise FlanneldError("nothing to apply: the stored config is in force")
            obstacle = self._obstacle(stored.network)
            if obstacle:
                raise FlanneldError(f"not applied, the config in force stays: {obstacle}")
            self._require_lease(stored.network.config)
            before = self._in_force.network.config.networks if self._in_force else ()
            self._put_in_force(stored)
        self._await_lease()
        notice = f"; {CUT_OFF}" if before not in ((), stored.network.config.networks) else ""
        return f"{self._key} is in force; flannelctl status shows how far it has come{notice}"

    def in_force(self) -> dict[str, str | None]:
        """Where the config is stored, and the one in force as it was written; None: none is."""
        with self._lock:
            return {"key": self._key, "in_force": self._in_force.text.decode() if self._in_force else None}

    def _require_lease(self, fresh: NetworkConfig) -> None:
        """Raise FlanneldError if what this host holds would have to go and nothing is free in its place."""
        levels = self._inbox.levels
        own, snapshot, host = levels.lease.own, levels.snapshot, levels.host
        if own is None or snapshot is None or host is None or is_compatible(own.record, fresh):
            return
        registry = levels.registry
        if registry.state != "in sync":
            raise FlanneldError(
                f"not applied, the config in force stays: the stored one demands another lease than "
                f"{own.record.key}, and etcd is {registry.state}: {registry.error}; bring it back first"
            )
        nothing_to_publish = Wish("", PerFamily())
        found = refit(own.record, fresh, snapshot, host, nothing_to_publish, Random(0))  # noqa: S311
        if not isinstance(found, Move):
            raise FlanneldError(f"not applied, the config in force stays: {found.reason}; {found.fix}")

    def _await_lease(self) -> None:
        """Raise FlanneldError if the lease that the config in force demands does not come."""
        until, seen, levels = boottime() + APPLIED_WITHIN, -1, self._inbox.levels
        while levels.awaits_lease and levels.lease.problem is None and boottime() < until:
            seen, levels = self._inbox.wait(seen, until)
        own, problem = levels.lease.own, levels.lease.problem
        if not levels.awaits_lease or own is None:
            return
        why = problem.reason if problem else f"etcd has not given another for {APPLIED_WITHIN:g} s"
        raise FlanneldError(
            f"{self._key} is taken over, but not carried out yet: it does not allow {own.record.key}, "
            f"and {why}; what was set up before stays in force until it is (flannelctl status)"
        )

    def _settle(self, stored: _Stored) -> None:
        old = self._in_force.network.config if self._in_force else None
        obstacle = self._obstacle(stored.network) if old not in (None, stored.network.config) else ""
        reasons = self._reasons(stored.network)
        if obstacle:
            self._report(Problem("config-unfit", f"{obstacle}; the config in force stays", UNFIT))
        elif reasons:
            self._report(Problem("config-pending", "; ".join(reasons), APPLY))
        elif old != stored.network.config:
            self._put_in_force(stored)
        elif self._inbox.levels.config_problem is not None:
            self._log.info("config_well", reason="the config in force is stored again")
            self._inbox.offer(config_problem=None)

    def _obstacle(self, fresh: Network) -> str:
        """Why this host cannot carry out a config; empty: it can, or its interface is not known yet."""
        host = self._inbox.levels.host
        try:
            if host is not None:
                fresh.backend.published(host, None)
        except HostError as error:
            return str(error)
        return ""

    def _reasons(self, fresh: Network) -> tuple[str, ...]:
        if self._in_force is None:
            return ()
        levels, old = self._inbox.levels, self._in_force.network
        record = levels.lease.own.record if levels.lease.own else None
        if record is not None and not is_compatible(record, old.config):
            record = None  # it waits for another one: whatever is stored now can only help
        # A reservation may lie outside the range that hosts help themselves from.
        bound = record.subnets if record and record.etcd_lease else PerFamily()
        return pending_reasons(
            Settings(old.config, options_of(old.backend)),
            Settings(fresh.config, options_of(fresh.backend)),
            bound if record else None,
            [r.key for r in levels.snapshot.records.values() if not r.node_id] if levels.snapshot else (),
        )

    def _put_in_force(self, stored: _Stored) -> None:
        network = stored.network
        former: tuple[IPNetwork, ...] = ()
        if self._in_force is not None:
            old = self._in_force.network
            former = tuple(dict.fromkeys((*old.config.networks, *old.former)))
        self._in_force = stored
        config, backend = network.config, network.backend
        self._log.info("config", networks=[str(net) for net in config.networks], backend=backend.type)
        for line in unknown_keys(config, backend.keys):
            self._log.warning("config_unknown_key", reason=line)
        for line in config.doubts:
            self._log.warning("config_doubtful", reason=line)
        self._inbox.offer(network=Network(config, backend, former), config_problem=None)

    def _missing(self) -> Problem:
        config = self._in_force.text.decode() if self._in_force else EXAMPLE_CONFIG
        if self._in_force:
            reason = f"the network config at {self._key} was deleted; the config in force stays"
        else:
            reason = (
                f"no network config at {self._key}; keys written through etcd's old v2 API (etcdctl set) are "
                "not seen"
            )
        return Problem("config-missing", reason, self._config_lines(self._key, config))

    def _report(self, problem: Problem) -> None:
        if problem != self._inbox.levels.config_problem:
            self._log.warning(problem.code.replace("-", "_"), reason=problem.reason, fix=problem.fix)
            self._inbox.offer(config_problem=problem)
