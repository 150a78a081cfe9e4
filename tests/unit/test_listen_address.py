"""Where to listen: what operators write, and what cannot stand side by side."""

from __future__ import annotations

import socket

import pytest

from flanneld_py.core.listenaddress import overlap, parse_listen_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9100", ("127.0.0.1", 9100)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),  # noqa: S104
        (":9100", ("127.0.0.1", 9100)),
        ("[::1]:65535", ("::1", 65535)),
        ("localhost:9100", ("127.0.0.1", 9100)),
        ("127.0.0.1", None),
        ("::1", None),
        ("[::1]", None),
        ("2001:db8::9100", None),
        ("10.0.0.1:0", None),
        ("", None),
    ],
)
def test_what_operators_write(text: str, address: tuple[str, int] | None) -> None:
    assert parse_listen_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "9100",
        "1.2.3:9",
        ":70000",
        "host:9100",
        "[127.0.0.1]:9",
        "[::1",
        "::1]:9",
        "1.2.3.4:",
        ":x",
        ":-1",
        " :9",
    ],
)
def test_what_cannot_be_meant(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_listen_address(text)


ADDRESSES = ("127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", "::")  # noqa: S104


@pytest.mark.parametrize("one", ADDRESSES)
@pytest.mark.parametrize("other", ADDRESSES)
def test_overlap_is_what_the_kernel_says(one: str, other: str) -> None:
    with listening(one, 0) as first:
        port = first.getsockname()[1]
        try:
            listening(other, port).close()
            taken = False
        except OSError:
            taken = True
    if one != other:
        assert overlap((one, port), (other, port)) == taken
    assert not overlap((one, port), (other, port + 1))
    assert not overlap((one, port), (one, port)), "one server then has both"


def listening(ip: str, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((ip, port))
        made.listen()
    except OSError:
        made.close()
        raise
    return made
