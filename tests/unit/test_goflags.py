"""Go's flag syntax (T-less part of the specification: its parser's rules)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core.goflags import normalise, parse_integer
from flanneld_py.errors import UsageError

KNOWN = {"iface", "etcd-prefix", "etcd-endpoints", "iptables-resync", "v", "ip-masq", "version"}
BOOLEANS = {"ip-masq", "version"}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], []),
        (["-iface", "eth0"], ["--iface=eth0"]),
        (["--iface", "eth0"], ["--iface=eth0"]),
        (["-iface=eth0", "--iface=eth1"], ["--iface=eth0", "--iface=eth1"]),
        (["--iface="], ["--iface="]),
        (["--etcd-prefix=/a=b"], ["--etcd-prefix=/a=b"]),
        (["-iptables-resync", "-5", "-v", "2"], ["--iptables-resync=-5", "--v=2"]),
        (["--iface", "--ip-masq"], ["--iface=--ip-masq"]),
        (["--iface", ""], ["--iface="]),
        (["-v=2"], ["--v=2"]),
        (["-v", "2"], ["--v=2"]),
        (["--ip-masq"], ["--ip-masq=true"]),
        (["--ip-masq="], ["--ip-masq="]),
        (["-ip-masq", "-version"], ["--ip-masq=true", "--version=true"]),
        (["-h"], ["--help"]),
        (["-help", "--nonsense"], ["--help"]),
        (["--iface=a", "--help"], ["--iface=a", "--help"]),
    ],
)
def test_flags(argv: list[str], expected: list[str]) -> None:
    assert normalise(argv, KNOWN, BOOLEANS) == (expected, [])


@pytest.mark.parametrize(
    ("argv", "flags", "ignored"),
    [
        (["--ip-masq", "false", "--iface=eth0"], ["--ip-masq=true"], ["false", "--iface=eth0"]),
        (["--iface=a", "word", "--nonsense"], ["--iface=a"], ["word", "--nonsense"]),
        (["--iface=a", "--", "--iface=b"], ["--iface=a"], ["--iface=b"]),
        (["--iface=a", "--"], ["--iface=a"], []),
        (["-", "--iface=b"], [], ["-", "--iface=b"]),
        (["", "--iface=b"], [], ["", "--iface=b"]),
    ],
)
def test_the_first_word_that_is_no_flag_ends_them(
    argv: list[str], flags: list[str], ignored: list[str]
) -> None:
    assert normalise(argv, KNOWN, BOOLEANS) == (flags, ignored)


@pytest.mark.parametrize("argument", ["---iface", "--=x", "-=x", "----"])
def test_no_flags_at_all(argument: str) -> None:
    with pytest.raises(UsageError, match="expected a flag"):
        normalise([argument], KNOWN, BOOLEANS)


def test_a_value_that_is_missing() -> None:
    with pytest.raises(UsageError, match=r"^--iface: expected a value after it$"):
        normalise(["--ip-masq", "-iface"], KNOWN, BOOLEANS)


@pytest.mark.parametrize("argument", ["-etcd-endpoint=x", "--etcd-endpoint", "--etcd_endpoints"])
def test_an_unknown_flag_and_the_one_that_may_be_meant(argument: str) -> None:
    with pytest.raises(UsageError, match=r"there is no such flag \(did you mean --etcd-endpoints\?\)"):
        normalise([argument, "x"], KNOWN, BOOLEANS)
    with pytest.raises(UsageError, match=r"^--zzz: there is no such flag; --help lists all$"):
        normalise(["-zzz=1"], KNOWN, BOOLEANS)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["iface", "etcd-prefix", "v"]),
            st.text(max_size=8),
            st.sampled_from(["-", "--"]),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_every_spelling_of_a_list_of_flags_is_the_same(flags: list[tuple[str, str, str, bool]]) -> None:
    argv: list[str] = []
    for name, value, dashes, joined in flags:
        argv += [f"{dashes}{name}={value}"] if joined else [f"{dashes}{name}", value]
    assert normalise(argv, KNOWN, BOOLEANS).flags == [f"--{name}={value}" for name, value, _, _ in flags]


@given(st.lists(st.one_of(st.text(max_size=12), st.sampled_from(["-iface", "--v=2", "--"])), max_size=6))
def test_what_comes_out_goes_in_unchanged(argv: list[str]) -> None:
    try:
        once = normalise(argv, KNOWN, BOOLEANS).flags
    except UsageError:
        return
    assert normalise(once, KNOWN, BOOLEANS) == (once, [])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0), ("10", 10), ("-5", -5), ("+5", 5), ("0x1F", 31), ("-0X1f", -31), ("0b101", 5), ("0o17", 15),
        ("017", 15), ("-017", -15), ("00", 0), ("1_000", 1000), ("0x_f", 15), ("0_7", 7),
    ],
)  # fmt: skip
def test_whole_numbers_as_go_writes_them(text: str, number: int) -> None:
    assert parse_integer(text) == number


@pytest.mark.parametrize(
    "text", ["", "x", "1.0", " 1", "1 ", "1__0", "_1", "09", "0x", "--1", "1e3", "\u0661"]
)
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(ValueError, match="no whole number"):
        parse_integer(text)
