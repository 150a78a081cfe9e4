"""Chaos is replayable: a schedule is a pure function of its seed, as is what it excuses of what was done."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.__main__ import arguments, chosen
from tests.chaos.fault import FOREVER, LONG_AFTER, SOON_AFTER
from tests.chaos.faults import CATALOGUE
from tests.chaos.schedule import BACKENDS, FAMILIES, Schedule, fill, make_schedule
from tests.chaos.windows import Done, repaired, touching, windows

SEEDS = st.integers(0, 1 << 32)


def schedule(seed: int, seconds: float = 60, **more: str) -> Schedule:
    return make_schedule(seed, seconds, CATALOGUE, **more)  # type: ignore[arg-type]


@given(SEEDS, st.floats(10, 300))
def test_a_seed_gives_the_same_schedule_every_time(seed: int, seconds: float) -> None:
    first = schedule(seed, seconds)
    random.seed(seed + 1)
    assert schedule(seed, seconds) == first


@given(SEEDS)
def test_seeds_differ(seed: int) -> None:
    assert schedule(seed) != schedule(seed + 1)


@given(SEEDS, st.sampled_from(BACKENDS))
def test_what_is_given_changes_nothing_else_of_the_setting(seed: int, backend: str) -> None:
    assert replace(schedule(seed).setting, backend=backend) == schedule(seed, backend=backend).setting


@given(SEEDS)
def test_every_fault_is_healed_before_the_end_and_fits_the_backend(seed: int) -> None:
    made = schedule(seed)
    for step in made.steps:
        assert 0 <= step.at <= step.heals_at <= 60
        assert made.setting.backend in (CATALOGUE[step.fault].backends or BACKENDS)


@given(SEEDS)
def test_no_heal_undoes_another_fault(seed: int) -> None:
    held = [
        (step, {name for template in CATALOGUE[step.fault].holds for name in fill(template, step.targets)})
        for step in schedule(seed, 180).steps
    ]
    for (one, of_one), (other, of_other) in combinations(held, 2):
        assert one.heals_at < other.at or not of_one & of_other


def test_some_seed_has_each_fault_and_each_setting() -> None:
    made = [schedule(seed, 120) for seed in range(60)]
    assert {step.fault for each in made for step in each.steps} == set(CATALOGUE)
    assert {each.setting.backend for each in made} == set(BACKENDS)
    assert {each.setting.families for each in made} == set(FAMILIES)


# --- what a fault excuses -------------------------------------------------------------------------


def done(number: int, start: float, healed: float, **more: object) -> Done:
    empty: frozenset[str] = frozenset()
    fields: dict[str, object] = {
        "fault": f"fault {number}",
        "targets": ("alpha",),
        "grace": 5.0,
        "breaks": empty,
        "latent": False,
        "needs": empty,
        "disables": empty,
        "disables_for": FOREVER,
        "stirs": empty,
        "told_after": 0.0,
    }
    return Done(number=number, start=start, healed=healed, **(fields | more))  # type: ignore[arg-type]


BREAKS = frozenset({"alpha"})
NEEDS = frozenset({"daemon:alpha"})
FLUSHED = done(1, 10, 10, breaks=BREAKS, needs=NEEDS)


def test_a_fault_excuses_what_is_lost_until_its_grace_is_over() -> None:
    (window,) = windows([FLUSHED], ["alpha"], 1e6)
    assert window.excuses("alpha", "beta", 14)
    assert window.excuses("beta", "alpha", 14)
    assert not window.excuses("beta", "gamma", 14)
    assert not window.excuses("alpha", "beta", 15.1)
    assert not window.excuses("alpha", "beta", 9)


def test_a_repair_waits_for_what_it_needs_however_often_that_fails() -> None:
    frozen = [done(n, 8 + 10 * n, 14 + 10 * n, disables=NEEDS) for n in (0, 1, 2)]
    assert repaired(FLUSHED, [FLUSHED, *frozen]) == 34 + 5 + 5
    elsewhere = done(2, 8, 40, disables=frozenset({"daemon:beta"}))
    assert repaired(FLUSHED, [FLUSHED, elsewhere]) == 15
    everywhere = done(2, 8, 40, disables=frozenset({"daemon:*"}))
    assert repaired(FLUSHED, [FLUSHED, everywhere]) == 50
    over = done(2, 1, 2, disables=NEEDS)
    assert repaired(FLUSHED, [FLUSHED, over]) == 15


def test_a_latent_fault_excuses_nothing_while_its_repair_is_possible() -> None:
    deleted = replace(FLUSHED, latent=True)
    assert windows([deleted], ["alpha"], 1e6) == []
    frozen = done(2, 8, 30, disables=NEEDS)
    (window,) = windows([deleted, frozen], ["alpha"], 1e6)
    assert window.excuses("alpha", "beta", 29)


def test_a_pair_is_excused_only_among_itself() -> None:
    apart = done(1, 10, 20, targets=("alpha", "beta"), breaks=frozenset({"pair"}))
    (window,) = windows([apart], ["alpha", "beta"], 1e6)
    assert window.excuses("beta", "alpha", 15)
    assert not window.excuses("beta", "gamma", 15)


def test_a_lease_may_end_while_nobody_can_renew_it() -> None:
    parts = [
        done(1, 10, 16, disables=NEEDS),
        done(2, 15, 30, disables=frozenset({"registry:*"}), targets=()),
    ]
    found = windows(parts, ["alpha"], 15)
    end = 30 + SOON_AFTER + LONG_AFTER
    assert [(window.start, window.end, window.hosts) for window in found] == [(20, end, BREAKS)]
    short = [replace(part, disables_for=2) for part in parts]
    assert windows(short, ["alpha"], 30) == []
    assert windows(parts, ["alpha"], 86400) == []


def test_a_fault_that_is_not_healed_excuses_for_ever() -> None:
    (window,) = windows([done(1, 10, FOREVER, breaks=BREAKS)], ["alpha"], 1e6)
    assert window.excuses("alpha", "beta", 1e8)


def test_a_status_may_tell_of_a_fault_that_concerns_its_host() -> None:
    assert touching("alpha", 12, [FLUSHED])
    assert not touching("beta", 12, [FLUSHED])
    assert not touching("alpha", 60, [FLUSHED])
    everybody = done(2, 10, 12, targets=("1",), disables=frozenset({"registry:*"}))
    assert touching("beta", 12, [everybody])


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--seeds=0", "SEEDS is '0'"),
        ("--seeds=-1", "SEEDS is '-1'"),
        ("--seconds=0", "SECONDS is '0'"),
        ("--seconds=-3", "SECONDS is '-3'"),
        ("--seconds=nan", "SECONDS is 'nan'"),
        ("--seconds=", "SECONDS is ''"),
        ("--seed=abc", "SEED is 'abc'"),
        ("--only=foo", "no fault 'foo'"),
    ],
)
def test_a_wrong_argument_is_one_line(argument: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments([argument])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert "expected" in err
    assert err.count("\n") == 1


def test_what_was_chosen_is_in_the_line_that_repeats_it() -> None:
    one, other = list(CATALOGUE)[:2]
    given = arguments([f"--only={one}, {other}", "--backend=udp"])
    assert given.only == [one, other]
    assert chosen(given) == f" --backend='udp' --only='{one},{other}'"
