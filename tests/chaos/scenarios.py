"""Short runs that are aimed: for each mutant one that shows it, and one for each bug that chaos found."""

from __future__ import annotations

from dataclasses import dataclass

from tests.chaos.schedule import LONG_TTL, Schedule, Setting, Step

EVEN = 0
"""A pick with which a host that joins leaves again."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A schedule that somebody wrote."""

    schedule: Schedule
    mutant: str = ""
    """The planted mistake that it shows; empty: a bug that was mended."""
    violates: tuple[int, ...] = ()
    """Numbers of invariants that the mutant violates, whatever else it does."""
    later: bool = False
    """Only daemons that are started by faults are mutants: with them there would not even be a beginning."""


def scenario(
    *steps: tuple[float, str, str, float],
    mutant: str = "",
    violates: tuple[int, ...] = (),
    backend: str = "host-gw",
    families: str = "ipv4",
    seconds: float = 10,
    ttl: int = LONG_TTL,
    pool: int = 140,
    later: bool = False,
) -> Scenario:
    """`steps`: at, fault, targets with blanks between them, for how many seconds."""
    setting = Setting(seed=1, seconds=seconds, backend=backend, families=families, ttl=ttl, pool=pool)
    made = tuple(
        Step(number, at, fault, tuple(targets.split()), lasts, EVEN)
        for number, (at, fault, targets, lasts) in enumerate(steps, 1)
    )
    return Scenario(Schedule(setting, made), mutant, violates, later)


MUTANTS = {
    made.mutant: made
    for made in (
        scenario(
            (1, "host joins", "", 15),
            (1.1, "host joins", "", 15),
            mutant="claims-without-guard",
            violates=(1,),
            pool=6,
            seconds=17,
            later=True,
        ),
        scenario(
            (1, "daemon frozen", "alpha", 26),
            (14, "host joins", "", 20),
            mutant="steals-back",
            violates=(1,),
            ttl=8,
            pool=5,
            seconds=36,
        ),
        scenario((1, "key deleted", "alpha", 0), mutant="moves-house", violates=(2,)),
        scenario((1, "routes flushed", "alpha", 0), mutant="never-repairs", violates=(3, 11)),
        scenario((1, "daemon restarted", "beta", 0), mutant="meddles", violates=(4,), later=True),
        scenario((1, "etcd frozen", "", 20), mutant="shrinks-on-error", violates=(5, 6), seconds=22),
        scenario((1, "daemon restarted", "alpha", 0), mutant="writes-at-restart", violates=(7,)),
        scenario((1, "cable pulled", "alpha", 16), mutant="lies", violates=(8,), seconds=18),
        scenario(mutant="leaks", violates=(9,), seconds=12),
        scenario((1, "daemon restarted", "alpha", 0), mutant="misdelivers", violates=(10,), later=True),
        scenario((1, "address changed", "alpha", 0), mutant="keeps-old-address", violates=(5,), seconds=25),
        scenario(
            (1, "host cut off from etcd", "alpha", 28),
            (6, "address changed", "beta", 0),
            (12, "history compacted", "", 0),
            mutant="ignores-relist",
            violates=(3,),
            seconds=30,
        ),
        scenario((1, "daemon restarted", "alpha", 0), mutant="wrong-subnet-file", violates=(12,), later=True),
        scenario(mutant="dies", violates=(13,), seconds=14),
        scenario((1, "daemon restarted", "alpha", 0), mutant="ignores-sigterm", violates=(13,)),
        scenario((1, "key deleted", "alpha", 0), mutant="skips-deletes", violates=(14,)),
    )
}

FOUND = {
    "a peer moves out of the underlay's segment": scenario(
        (1, "address changed", "epsilon", 0),
        (8, "link down and up", "beta", 5),
        backend="vxlan-direct",
        families="dual-stack",
        seconds=20,
    ),
}
"""What broke once, by a name that says what happened."""
