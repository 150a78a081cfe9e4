"""flanneld-py with one mistake planted, to see that the checks would find it.

    python -m tests.chaos.mutants NAME daemon-flags…
    python -m tests.chaos.mutants NAME mirror PREFIX ENDPOINT…

Each mutant replaces a function of the product at start; `scenarios.py` has a short run that shows it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from flanneld_py.cli.daemon import main as run_daemon
from flanneld_py.core import desired
from flanneld_py.core.leasedecision import Claim, Conflict, Wait
from flanneld_py.core.linger import Departures
from flanneld_py.daemon import aim, hostwatch, leasekeeper, publisher, reconciler, registrywatch, target
from flanneld_py.drivers import etcd, etcdtxn, etcdwatch
from tests.chaos import mirror

if TYPE_CHECKING:
    from collections.abc import Callable

LATE = 1.0
"""Seconds between reading and writing, so that a race that is possible does happen."""


def plant(owner: Any, name: str, mutated: Callable[..., Any]) -> None:
    """Replace a function or method by one that gets the right one first, and then its arguments."""
    right = getattr(owner, name)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return mutated(right, *args, **kwargs)

    setattr(owner, name, stand_in)


def claims_without_guard() -> None:
    """A claim is a plain put: of two hosts that saw the same subnet free both take it."""

    def create(_right: Any, registry: Any, key: str, value: str, lease: int, **_: Any) -> Any:
        time.sleep(LATE)
        return registry._write(key, [], value, lease)

    plant(etcd.EtcdRegistry, "create", create)


def steals_back() -> None:
    """A host whose lease ended and whose subnet has a new owner writes over it."""

    def decide(right: Any, config: Any, snapshot: Any, host: Any, wish: Any, rng: Any) -> Any:
        decision = right(config, snapshot, host, wish, rng)
        if not isinstance(decision, (Conflict, Wait)) or wish.held is None:
            return decision
        stolen.add(f"subnets/{wish.held.key}")
        return Claim(wish.held)

    def create(right: Any, registry: Any, key: str, value: str, lease: int, **more: Any) -> Any:
        if key in stolen:
            return registry._write(key, [], value, lease)
        return right(registry, key, value, lease, **more)

    stolen: set[str] = set()
    plant(leasekeeper, "decide_lease", decide)
    plant(etcd.EtcdRegistry, "create", create)


def moves_house() -> None:
    """A host whose key was deleted takes another subnet than it had."""

    def decide(right: Any, config: Any, snapshot: Any, host: Any, wish: Any, rng: Any) -> Any:
        return right(config, snapshot, host, replace(wish, previous=()), rng)

    plant(leasekeeper, "decide_lease", decide)


def shrinks_on_error() -> None:
    """When etcd does not answer there are no peers."""

    def lost(right: Any, watch: Any, error: Any) -> None:
        right(watch, error)
        own = watch._inbox.levels.lease.own
        kept = {own.record.key: own.record} if own else {}
        watch._snapshot = replace(watch._snapshot, records=kept, since=None)
        watch._inbox.offer(snapshot=watch._snapshot)

    plant(registrywatch.RegistryWatch, "_lost", lost)
    plant(reconciler, "departures", lambda *_: Departures())


def ignores_relist() -> None:
    """After a compaction it goes on from the new revision without what was changed in between."""

    def take(right: Any, watch: Any, listing: Any) -> None:
        known = watch._snapshot
        if not known.revision:
            right(watch, listing)
            return
        watch._history.begin(listing)
        watch._snapshot = replace(known, revision=listing.revision, cluster_id=listing.cluster_id)
        watch._found()

    plant(registrywatch.RegistryWatch, "_take_listing", take)


def never_repairs() -> None:
    """It neither hears what others do to the kernel nor reads it back."""
    plant(hostwatch.HostWatch, "run", lambda *_: None)
    plant(reconciler, "_read_back_after", lambda *_: 3600.0)


def meddles() -> None:
    """It deletes a route with our protocol that is not inside our Networks."""

    def desired(right: Any, *args: Any, **kwargs: Any) -> Any:
        subprocess.run(["ip", "route", "delete", "10.77.2.0/24"], check=False, capture_output=True)
        return right(*args, **kwargs)

    plant(target, "desired", desired)


def misdelivers() -> None:
    """What is for one peer goes to another."""

    def desired(right: Any, build: Any, own: Any, peers: Any, *args: Any, **kwargs: Any) -> Any:
        found = sorted(peers, key=lambda peer: str(peer.key))
        places = [peer.public_ips for peer in found]
        turned = [replace(peer, public_ips=places[n - 1]) for n, peer in enumerate(found)]
        return right(build, own, turned, *args, **kwargs)

    plant(target, "desired", desired)


def keeps_old_address() -> None:
    """A peer whose address changed is sent to where it was."""
    first: dict[str, Any] = {}

    def rows_of(right: Any, build: Any, own: Any, peers: Any, host: Any) -> Any:
        kept = [replace(peer, public_ips=first.setdefault(peer.key, peer.public_ips)) for peer in peers]
        return right(build, own, kept, host)

    for module in (desired, aim):  # of all peers, and of those that have changed
        plant(module, "rows_of", rows_of)


def writes_at_restart() -> None:
    """A start writes the record again as it is."""
    written: set[int] = set()

    def keep_alive(right: Any, registry: Any, lease: int) -> Any:
        left = right(registry, lease)
        for entry in registry.list().entries if lease not in written else ():
            if entry.etcd_lease == lease:
                guard = etcdtxn.unchanged(registry._name(entry.key), entry.mod_revision)
                registry._write(entry.key, [guard], entry.value.decode(), lease)
        written.add(lease)
        return left

    plant(etcd.EtcdRegistry, "keep_alive", keep_alive)


def lies() -> None:
    """Its status says that all is well, always."""

    def compose(right: Any, *args: Any, **kwargs: Any) -> Any:
        said = right(*args, **kwargs)
        checks = {name: {"ok": True, "reason": ""} for name in said["checks"]}
        return said | {"state": "in sync", "ready": True, "problems": [], "checks": checks}

    plant(publisher, "compose", compose)


def leaks() -> None:
    """It opens a descriptor again and again, and never closes one."""
    kept = []

    def open_more() -> None:
        while True:
            kept.append(os.open(os.devnull, os.O_RDONLY))
            time.sleep(0.1)

    threading.Thread(target=open_more, daemon=True).start()


def wrong_subnet_file() -> None:
    """subnet.env names another subnet."""

    def subnet_env(right: Any, *args: Any, **kwargs: Any) -> str:
        text: str = right(*args, **kwargs)
        return re.sub(r"(?m)^FLANNEL_SUBNET=10\.5\.\d+", "FLANNEL_SUBNET=10.5.77", text)

    plant(target, "subnet_env", subnet_env)


def dies() -> None:
    """It ends with an error some time after its start."""

    def end() -> None:
        time.sleep(15)
        os._exit(70)

    threading.Thread(target=end, daemon=True).start()


def ignores_sigterm() -> None:
    """It has to be killed."""

    def wait(right: Any, signals: Any) -> Any:
        while (number := right(signals)) == signal.SIGTERM:
            pass
        return number

    plant(signal, "sigwait", wait)


def skips_deletes() -> None:
    """The watch does not deliver what was deleted."""

    def following(right: Any, stream: Any) -> Any:
        item = right(stream)
        return replace(item, changes=tuple(change for change in item.changes if change.entry is not None))

    plant(etcdwatch.WatchStream, "__next__", following)


PLANTED: dict[str, Callable[[], None]] = {
    planted.__name__.replace("_", "-"): planted
    for planted in (
        claims_without_guard,
        steals_back,
        moves_house,
        never_repairs,
        meddles,
        shrinks_on_error,
        writes_at_restart,
        lies,
        leaks,
        misdelivers,
        keeps_old_address,
        ignores_relist,
        wrong_subnet_file,
        dies,
        ignores_sigterm,
        skips_deletes,
    )
}


def main(name: str, *arguments: str) -> None:
    PLANTED[name]()
    if arguments[:1] == ("mirror",):
        mirror.main(*arguments[1:])
    else:
        run_daemon(list(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
