"""Go's flag syntax (T-less part of the specification: its parser's rules)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core.goflags import normalise
from flanneld_py.errors import UsageError

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
        (["-ip-masq", "-version"], ["--ip-masq=true", "--version=true"]),
        (["--ip-masq", "false", "--iface=eth0"], ["--ip-masq=true"]),
        (["-h"], ["--help"]),
        (["-help", "--nonsense"], ["--help"]),
        (["--iface=a", "--help"], ["--iface=a", "--help"]),
        (["--iface=a", "--", "--iface=b"], ["--iface=a"]),
        (["--iface=a", "word", "--iface=b"], ["--iface=a"]),
        (["-", "--iface=b"], []),
        (["", "--iface=b"], []),
        (["--unknown", "x"], ["--unknown=x"]),
        (["--iface"], ["--iface"]),
    ],
)
def test_flags(argv: list[str], expected: list[str]) -> None:
    assert normalise(argv, BOOLEANS) == expected


@pytest.mark.parametrize("word", ["1", "t", "T", "true", "TRUE", "True"])
def test_words_of_truth(word: str) -> None:
    assert normalise([f"-ip-masq={word}"], BOOLEANS) == ["--ip-masq=true"]


@pytest.mark.parametrize("word", ["0", "f", "F", "false", "FALSE", "False"])
def test_words_of_falsehood(word: str) -> None:
    assert normalise([f"--ip-masq={word}"], BOOLEANS) == ["--ip-masq=false"]


@pytest.mark.parametrize("word", ["", "yes", "tRue", "2", " true"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match=f"^--ip-masq={word}: expected true or false"):
        normalise([f"--ip-masq={word}"], BOOLEANS)


@pytest.mark.parametrize("argument", ["---iface", "--=x", "-=x", "----"])
def test_no_flags_at_all(argument: str) -> None:
    with pytest.raises(UsageError, match="expected a flag"):
        normalise([argument], BOOLEANS)


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
    assert normalise(argv, BOOLEANS) == [f"--{name}={value}" for name, value, _, _ in flags]


@given(st.lists(st.text(max_size=12), max_size=6))
def test_what_comes_out_goes_in_unchanged(argv: list[str]) -> None:
    try:
        once = normalise(argv, BOOLEANS)
    except UsageError:
        return
    if once and "=" not in once[-1] and once[-1] != "--help":
        return
    assert normalise(once, BOOLEANS) == once
