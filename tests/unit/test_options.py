"""Backend options: types, bounds and misspellings."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core import options
from flanneld_py.errors import ConfigError

if TYPE_CHECKING:
    from flanneld_py.addresses import Family

JSON_VALUES: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.lists(st.integers())
    | st.just({})
)


def test_absent_and_null_are_the_default() -> None:
    for given_options in ({}, {"vni": None}):
        assert options.integer(given_options, "VNI", 7, 0, 10) == 7
        assert options.boolean(given_options, "VNI", default=True) is True
        assert options.one_of(given_options, "VNI", "strict", ("strict", True)) == "strict"


def test_values_in_range() -> None:
    assert options.integer({"vni": 0}, "VNI", 7, 0, 10) == 0
    assert options.integer({"vni": 10}, "VNI", 7, 0, 10) == 10
    assert options.boolean({"gbp": True}, "GBP", default=False) is True
    assert options.one_of({"sourcecheck": False}, "SourceCheck", "strict", ("strict", True, False)) is False


@pytest.mark.parametrize("value", [-1, 11, 1.0, "1", True, [], {}, float("inf")])
def test_no_such_integer(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^Backend\.VNI .*: expected a whole number from 0 to 10"):
        options.integer({"vni": value}, "VNI", 7, 0, 10)


@pytest.mark.parametrize("value", [0, 1, "true", []])
def test_no_boolean(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^Backend\.GBP .*: expected true or false"):
        options.boolean({"gbp": value}, "GBP", default=False)


@pytest.mark.parametrize("value", [1, 0, "STRICT", "true", None.__class__.__name__])
def test_none_of_the_choices(value: Any) -> None:
    with pytest.raises(ConfigError, match=r'^Backend\.SourceCheck .*: expected one of "strict", true, false'):
        options.one_of({"sourcecheck": value}, "SourceCheck", "strict", ("strict", True, False))


LOWEST_MTU: dict[Family, int] = {4: 576, 6: 1350}


@pytest.mark.parametrize(("value", "mtu"), [(None, 0), (0, 0), (1350, 1350), (65535, 65535)])
def test_mtu(value: int | None, mtu: int) -> None:
    assert options.mtu({"mtu": value}, (4, 6), LOWEST_MTU) == mtu


@pytest.mark.parametrize("value", [-1, 1349, 65536, False, 1400.0, "1400"])
def test_no_mtu(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^Backend\.MTU"):
        options.mtu({"mtu": value}, (4, 6), LOWEST_MTU)


def test_ipv4_alone_bears_a_smaller_mtu() -> None:
    assert options.mtu({"mtu": 576}, (4,), LOWEST_MTU) == 576
    with pytest.raises(ConfigError, match=r"^Backend\.MTU 575: expected 576 to 65535, or 0"):
        options.mtu({"mtu": 575}, (4,), LOWEST_MTU)


def test_unknown_keys_with_the_nearest_name() -> None:
    found = options.unknown(
        {"vni": 1, "prot": 8472, "directrouteing": True, "zzz": 1}, ("VNI", "Port", "DirectRouting")
    )
    assert found == {"prot": "Port", "directrouteing": "DirectRouting", "zzz": ""}


@given(JSON_VALUES)
def test_nothing_but_config_errors(value: Any) -> None:
    for read in (
        lambda: options.integer({"x": value}, "X", 1, 0, 5),
        lambda: options.boolean({"x": value}, "X", default=False),
        lambda: options.one_of({"x": value}, "X", "a", ("a", "b")),
        lambda: options.mtu({"mtu": value}, (4,), LOWEST_MTU),
    ):
        with contextlib.suppress(ConfigError):
            read()
