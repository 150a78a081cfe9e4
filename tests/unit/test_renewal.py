"""When a lease is renewed, its owner counts as gone, and it is written again for Go flannel."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.core.leasepolicy import LeasePolicy
from flanneld_py.core.renewal import Puts, has_go_hosts, is_contested, next_put, renew_interval, silent_in
from tests.unit.leasing import record
from tests.unit.strategies import mac, snapshot_of, underlay

DAY = 86_400
SPREAD = st.floats(0, 1, exclude_max=True)
DEFAULT = LeasePolicy()


@pytest.mark.parametrize(("ttl", "seconds"), [(5, 5 / 3), (900, 300), (901, 300), (DAY, 300)])
def test_renewed_every_third_of_the_ttl_and_at_most_every_five_minutes(ttl: int, seconds: float) -> None:
    assert renew_interval(ttl) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("left", "granted", "silent"),
    [
        (DAY, DAY, 900),
        (DAY - 300, DAY, 600),
        (DAY - 900, DAY, 0),
        (1, DAY, 0),
        (-1, 0, 0),
        # The other host's own TTL counts, not ours: a short lease is silent only when it has ended.
        (4, 5, 4),
        (0, 5, 0),
        (600, 600, 600),
    ],
)
def test_an_owner_is_gone_after_three_missed_renewals(left: int, granted: int, silent: float) -> None:
    assert silent_in(left, granted) == pytest.approx(silent)


@given(st.integers(5, 10 * DAY), st.floats(0, 1))
def test_an_owner_that_renews_in_time_is_never_silent(granted: int, late: float) -> None:
    assert silent_in(granted - 2 * renew_interval(granted) * late, granted) > 0


# --- writing again --------------------------------------------------------------------------------


@given(st.floats(0, 1e9), SPREAD)
def test_written_again_before_the_margin_within_ten_percent(since: float, spread: float) -> None:
    at = next_put(Puts(since), DEFAULT, DAY, spread) - since
    assert 0.9 * (DAY - 3600) - 1 <= at <= 1.1 * (DAY - 3600) + 1


@pytest.mark.parametrize(
    ("ttl", "policy", "period"),
    [
        (10, LeasePolicy(ttl=10, renew_margin=4), 6),
        (1800, LeasePolicy(ttl=1800), 900),  # the margin is longer than the lease lives
        (0, DEFAULT, DAY - 3600),  # a reservation
        (3600, DEFAULT, 1800),  # granted by somebody else
    ],
)
def test_the_period(ttl: int, policy: LeasePolicy, period: float) -> None:
    assert next_put(Puts(0), policy, ttl, 0.5) == pytest.approx(period)


@given(SPREAD)
def test_after_something_unreadable_within_5_to_30_seconds(spread: float) -> None:
    at = next_put(Puts(since=100, unreadable_since=1000), DEFAULT, DAY, spread)
    assert 1005 <= at <= 1030
    assert at == next_put(Puts(100, 1000, healed=399), DEFAULT, DAY, spread)


@given(SPREAD)
def test_but_at_most_once_in_ten_minutes(spread: float) -> None:
    assert next_put(Puts(100, 1000, healed=900), DEFAULT, DAY, spread) == 1500


def test_the_regular_time_is_not_put_off_by_that() -> None:
    policy = LeasePolicy(ttl=60, renew_margin=30)
    assert next_put(Puts(100, 120, healed=100), policy, 60, 0.5) == pytest.approx(130)


def test_hosts_spread_over_the_time() -> None:
    times = {next_put(Puts(0, 0), DEFAULT, DAY, n / 100) for n in range(100)}
    assert len(times) == 100


# --- for whom -------------------------------------------------------------------------------------


def test_who_is_a_go_host() -> None:
    ours, gos = record(3, 1), record(4, 2, node_id="")
    reserved = replace(gos, etcd_lease=0, backend_type="", backend_data=PerFamily())
    assert not has_go_hosts(snapshot_of([ours, record(5, 3)]), "vxlan")
    assert has_go_hosts(snapshot_of([ours, gos]), "vxlan")
    assert not has_go_hosts(snapshot_of([ours, reserved]), "vxlan"), "it waits for a host"


def test_who_is_older_stays_older() -> None:
    mine = replace(record(3, 1), vtep_macs=PerFamily(mac(7)))
    other = replace(record(4, 2), vtep_macs=PerFamily(mac(8)))
    assert not is_contested(mine, snapshot_of([mine, other]))
    for thief in (
        replace(other, vtep_macs=PerFamily(mac(7))),
        replace(other, public_ips=PerFamily(underlay(4, 1))),
    ):
        assert is_contested(mine, snapshot_of([mine, thief]))


def test_ten_thousand_hosts_do_not_all_write_within_half_a_minute() -> None:
    """Each of these puts is an event for all the others: more than a few a second are too many."""
    times = sorted(next_put(Puts(0, 0), DEFAULT, DAY, n / 10_000, 10_000) for n in range(10_000))
    assert max(later - sooner for sooner, later in pairwise(times)) < 1
    assert sum(1000 <= at < 1060 for at in times) <= 5 * 60
