"""What happens to whom and when: a pure function of the seed, so that a run can be had again."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from tests.chaos.fault import Fault

HOSTS = ("alpha", "beta", "gamma", "delta", "epsilon")
MEMBERS = ("0", "1", "2")
BACKENDS = ("vxlan", "host-gw", "udp", "vxlan-direct")
"""The last one is vxlan with DirectRouting, over two segments of the underlay."""
FAMILIES = ("ipv4", "dual-stack")
SHORT_TTL, LONG_TTL = 15, 86400
GAP = (0.3, 4.0)
"""Seconds from one fault to the next, at least and at most."""
PAUSE_EVERY = 6
"""After so many faults there is time for all to heal, so that single ones are seen as well."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run is made of, besides its faults."""

    seed: int
    seconds: float
    backend: str
    families: str
    ttl: int
    """Seconds of a lease."""
    pool: int = 140
    """Subnets that there are."""


@dataclass(frozen=True, slots=True)
class Step:
    """One fault: from `at`, in seconds after the beginning, for `seconds`."""

    number: int
    at: float
    fault: str
    targets: tuple[str, ...]
    """Names of hosts or members."""
    seconds: float
    pick: int
    """For the choices that a fault makes itself."""

    @property
    def heals_at(self) -> float:
        return self.at + self.seconds

    def __str__(self) -> str:
        return f"{self.at:6.1f}-{self.heals_at:6.1f} #{self.number} {self.fault} {' '.join(self.targets)}"


@dataclass(frozen=True, slots=True)
class Schedule:
    """A run before it has begun."""

    setting: Setting
    steps: tuple[Step, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_schedule(
    seed: int,
    seconds: float,
    catalogue: Mapping[str, Fault],
    *,
    backend: str = "",
    families: str = "",
    ttl: int = 0,
    only: Collection[str] = (),
) -> Schedule:
    """The schedule of a seed.

    Args:
        seed: decides everything that is not given.
        seconds: within which faults begin and heal.
        catalogue: name → fault; in order, as that is part of what is decided.
        backend: one of BACKENDS.
        families: one of FAMILIES.
        ttl: of leases, in seconds.
        only: names of faults to be used; all when empty.

    Raises:
        ValueError: none of these befalls the backend.
    """
    dice = random.Random(seed)
    # All are drawn whatever is given, so that giving what a seed decides changes nothing.
    drawn = (dice.choice(BACKENDS), dice.choice(FAMILIES), dice.choice((SHORT_TTL, LONG_TTL)))
    setting = Setting(seed, seconds, backend or drawn[0], families or drawn[1], ttl or drawn[2])
    usable = [
        fault
        for name, fault in catalogue.items()
        if (not only or name in only) and setting.backend in (fault.backends or BACKENDS)
    ]
    if not usable:
        raise ValueError(f"{', '.join(only)}: not with backend {setting.backend}")
    return Schedule(setting, tuple(_steps(dice, seconds, usable)))


def _steps(dice: random.Random, seconds: float, usable: Sequence[Fault]) -> list[Step]:
    steps: list[Step] = []
    now = dice.uniform(*GAP)
    while now < seconds:
        if len(steps) % PAUSE_EVERY == PAUSE_EVERY - 1:
            now = max([now, *(step.heals_at for step in steps)])
        fault = dice.choices(usable, [fault.weight for fault in usable])[0]
        step = Step(
            number=len(steps) + 1,
            at=round(now, 2),
            fault=fault.name,
            targets=_targets(dice, fault.on),
            seconds=round(dice.uniform(*fault.seconds), 2),
            pick=dice.randrange(1 << 30),
        )
        taken = {
            resource for other in steps if other.heals_at >= step.at for resource in _resources(usable, other)
        }
        if step.heals_at <= seconds and not taken & _resources(usable, step):
            steps.append(step)
        now += dice.uniform(*GAP)
    return steps


def _targets(dice: random.Random, on: str) -> tuple[str, ...]:
    """`host`, `pair` of hosts, `member`, `majority` of members, or empty: nobody in particular."""
    number = {"host": 1, "pair": 2, "member": 1, "majority": 2, "": 0}[on]
    return tuple(dice.sample(HOSTS if on in {"host", "pair"} else MEMBERS, number))


def _resources(usable: Sequence[Fault], step: Step) -> set[str]:
    """What nobody else may harm at the same time, as one heal would undo the other fault."""
    fault = next(fault for fault in usable if fault.name == step.fault)
    return {name for template in fault.holds for name in fill(template, step.targets)}


def fill(template: str, targets: Sequence[str]) -> list[str]:
    """`uplink:{}` for each target; a template without braces stands for itself."""
    return [template.format(target) for target in targets] if "{}" in template else [template]
