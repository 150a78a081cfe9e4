"""What the fuzz targets take, in the hands of hypothesis: a little of it with every run of the tests.

`make fuzz` throws more, guided by the code that is reached; atheris is not needed here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from ipaddress import IPv4Network
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.addresses import PerFamily
from tests.fuzz import cni
from tests.fuzz.target import one_line
from tests.fuzz.targets import NAMES, load
from tests.unit import cni_calls
from tests.unit.strategies import usual

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanneld_py.addresses import Subnets
    from tests.fuzz.target import Target

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", NAMES)
def test_inputs_to_begin_with(name: str) -> None:
    for seed in load(name).seeds():
        load(name).check(seed)


# --- seeds with something changed -----------------------------------------------------------------


@cache
def _seeds(name: str) -> tuple[bytes, ...]:
    return tuple(load(name).seeds())


@st.composite
def changed_seeds(draw: st.DrawFn, name: str) -> bytes:
    """One of the seeds after some parts of it were replaced by others, by words, or by anything."""
    data = draw(st.sampled_from(_seeds(name)))
    words = [word.encode() for word in load(name).words]
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from((0, 1, 1, 2, 4, 16, 1 << 16))))
        part = draw(st.one_of(st.binary(max_size=8), st.sampled_from(words), st.just(data[start:end] * 2)))
        data = data[:start] + part + data[end:]
    return data


@usual
@given(st.data(), st.sampled_from(NAMES))
def test_inputs_with_something_changed(data: st.DataObject, name: str) -> None:
    load(name).check(data.draw(changed_seeds(name)))


# --- JSON of the right keys and odd values --------------------------------------------------------


def _json(words: tuple[str, ...]) -> st.SearchStrategy[Any]:
    odd = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=4),
        st.sampled_from(words),
        st.sampled_from(
            ("10.5.7.0/24", "fd00:5::/48", "192.0.2.7", "02:00:00:00:00:07", "\ud800", "x" * 5000)
        ),
    )
    return st.recursive(
        odd,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(words), inner, max_size=6)
        ),
        max_leaves=12,
    )


def _objects(words: tuple[str, ...]) -> st.SearchStrategy[bytes]:
    found = st.dictionaries(st.sampled_from(words), _json(words), max_size=8)
    return found.map(lambda value: json.dumps(value).encode())


@usual
@given(_objects(load("config").words))
def test_configs_of_odd_values(text: bytes) -> None:
    load("config").check(text)


@usual
@given(_objects(load("state").words))
def test_state_files_of_odd_values(text: bytes) -> None:
    load("state").check(text)


@usual
@given(
    st.integers(0, 3),
    st.lists(
        st.tuples(
            st.sampled_from([f"10.5.{n}.0-{size}" for n in (1, 7, 20, 30, 33) for size in (16, 17, 24, 25)]),
            _objects(load("records").words),
        ),
        max_size=4,
    ),
)
def test_records_of_odd_values(backend: int, entries: list[tuple[str, bytes]]) -> None:
    parts = (part for key, value in entries for part in (key.encode(), value))
    load("records").check(bytes([backend]) + b"\0".join(parts))


@usual
@given(st.integers(0, 4), _objects(cni.TARGET.words), _objects(cni.TARGET.words), _objects(cni.TARGET.words))
def test_cni_input_of_odd_values(verb: int, conf: bytes, notes: bytes, said: bytes) -> None:
    named = json.dumps(json.loads(conf) | {"name": "cni-flannel"}).encode()
    for given_conf in (conf, named):
        parts = (given_conf, cni_calls.DUAL.encode(), notes, said, said, b"")
        load("cni").check(bytes([verb]) + b"\0".join(parts))


# --- would they notice? ---------------------------------------------------------------------------


def _changed(target: Target, rounds: int) -> Iterator[bytes]:
    """The seeds, and then each with some bytes changed, the same ones each time."""
    seeds, rng = list(target.seeds()), Random(1)
    yield from seeds
    for _ in range(rounds):
        for seed in seeds:
            data = bytearray(seed)
            for _ in range(min(3, len(data))):
                data[rng.randrange(len(data))] = rng.choice((0, 0x22, 0x30, 0x35, 0x7F, 0xFF))
            yield bytes(data)


def _broken(target: Target) -> bool:
    """Whether one of so many inputs would stop a fuzzer."""
    for data in _changed(target, 30):
        try:
            target.check(data)
        except Exception:  # noqa: BLE001 - as atheris does
            return True
    return False


def _taken(*_: object) -> None:
    """In the place of what looks for a reason against."""


def _any_key(_: str) -> Subnets:
    return PerFamily(IPv4Network("10.5.34.0/24"))


PLANTED: dict[str, tuple[str, str, Any]] = {
    "leases outside the Network": (
        "config",
        "flanneld_py.core.config._bound",
        lambda name, fields, *_: fields.get(name),
    ),
    "any key": ("keys", "tests.fuzz.keys.parse_key", _any_key),
    "records outside the Network": ("records", "flanneld_py.core.admit.leasable", lambda *_: True),
    "an address that nobody has": ("records", "flanneld_py.core.records.why_unreachable", _taken),
    "any types in the state file": ("state", "flanneld_py.core.statefile._has_our_types", lambda _: True),
    "any types in what was kept of the registry": (
        "cache",
        "flanneld_py.core.registrycache._number",
        lambda value, **_: value,
    ),
    "rows of others": ("netlink", "flanneld_py.drivers.rtmessages.Inside.network", lambda *_: True),
    "messages cut short": ("netlink", "flanneld_py.drivers.monitor.UNREADABLE", ()),
    "rules cut short": ("nftables", "flanneld_py.drivers.nfmonitor.UNREADABLE", ()),
    "names of any bytes": ("xtables", "flanneld_py.drivers.xtdecode._text", lambda raw: raw.decode()),
    "a conf of other types": ("cni", "tests.fuzz.cni.plugin._object", lambda conf, key: conf.get(key) or {}),
    "bits of the host in a lease": (
        "subnetenv",
        "tests.fuzz.subnetenv.plugin.Net.__str__",
        lambda net: net.gateway(),
    ),
}
"""Mistake → target, what is replaced, by what."""


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_found(mistake: str) -> None:
    name, place, instead = PLANTED[mistake]
    with patch(place, instead):
        assert _broken(load(name))


def test_every_target_has_a_planted_mistake() -> None:
    assert {name for name, _, _ in PLANTED.values()} == set(NAMES)


@pytest.mark.parametrize("text", ["", "two\nlines", "\x1b[2J", "x" * 2000])
def test_what_is_no_line_for_a_person(text: str) -> None:
    with pytest.raises(AssertionError):
        one_line(text)


# --- the command line -----------------------------------------------------------------------------


def _refused(*argv: str) -> str:
    """The one line."""
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    return done.stderr


@pytest.mark.parametrize("name", ["foo", "../../x", "", "keys cni"])
def test_a_target_that_there_is_not(name: str) -> None:
    folder = ROOT / "build" / "fuzz" / name
    before = folder.exists()
    assert _refused(".ci/fuzz", name, "1", "0").startswith(
        f"no target {name}: expected one of packet, {', '.join(NAMES)}, or turn, all"
    )
    assert folder.exists() == before


def test_a_limit_that_is_none() -> None:
    assert _refused(".ci/fuzz", "keys", "", "0").startswith("SECONDS is ''")
    assert _refused(".ci/fuzz", "keys", "1").startswith("usage: ")


@pytest.mark.parametrize("given", [[], ["foo", "build"], ["keys"]])
def test_usage(given: list[str]) -> None:
    assert _refused(sys.executable, "-m", "tests.fuzz", *given).startswith("usage: python -m tests.fuzz NAME")
