"""A whole call of the CNI plugin: conf on stdin, subnet.env, its own notes, status.json, delegate, kernel.

An input is these, with a NUL between them, after a byte for the verb.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import shutil
import socket
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.fuzz.target import Target, one_line
from tests.unit import cni_calls

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

plugin = cni_calls.load()
VERBS = ("ADD", "DEL", "CHECK", "GC", "STATUS")
CONTAINER, IFNAME = "c1", "eth0"
INDEX = 7
DONE = (20).to_bytes(4, sys.byteorder) + b"\3\0" + bytes(14)
"""NLMSG_DONE."""


class Call(NamedTuple):
    """The parts of an input."""

    verb: str
    conf: bytes
    env: bytes
    notes: bytes
    status: bytes
    delegate: bytes
    kernel: bytes


def unpack(data: bytes) -> Call:
    verb = VERBS[data[0] % len(VERBS)] if data else "ADD"
    return Call(verb, *(data[1:].split(b"\0", 5) + [b""] * 6)[:6])


class Clock:
    """`time` for the plugin: waiting takes no time."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += max(seconds, 1e12)


class Kernel:
    """`_socket` for the plugin: a netlink socket answers what the input says, nothing else leads anywhere."""

    AF_INET, AF_INET6, AF_UNIX, AF_NETLINK = (
        socket.AF_INET,
        socket.AF_INET6,
        socket.AF_UNIX,
        socket.AF_NETLINK,
    )
    SOCK_RAW, SOCK_STREAM = socket.SOCK_RAW, socket.SOCK_STREAM
    SOCK_CLOEXEC, SOCK_NONBLOCK = socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK
    inet_pton, inet_ntop = staticmethod(socket.inet_pton), staticmethod(socket.inet_ntop)

    def __init__(self) -> None:
        self.answer = b""
        self._pending: list[bytes] = []

    def if_nametoindex(self, name: str) -> int:
        if "\0" in name:
            raise ValueError("embedded null character")
        if not name.startswith("cni"):
            raise OSError(errno.ENODEV, "No such device")
        return INDEX

    def socket(self, *_: int) -> Kernel:
        return self

    def connect(self, _: str) -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    def send(self, _: bytes) -> None:
        self._pending = [self.answer, DONE]

    def recv(self, _: int) -> bytes:
        return self._pending.pop(0)

    def close(self) -> None:
        """Nothing to give back."""


class World:
    """The plugin in a folder of its own; where files are and what answers it is not the fuzzer's to say."""

    def __init__(self, folder: Path) -> None:
        self.state, self.subnet_env, self.status = (
            folder / "state",
            folder / "subnet.env",
            folder / "status.json",
        )
        self.state.mkdir()
        self.kernel = Kernel()
        self.call = unpack(b"")
        self.given: list[dict[str, Any]] = []
        """Configs that the delegate got."""
        self._lock = plugin.lock
        self._locks: list[int] = []
        plugin.time, plugin._socket = Clock(), self.kernel
        plugin._stdin, plugin._spawned, plugin.lock = lambda: self.call.conf, self.spawned, self.lock
        plugin._say, plugin.find_plugin = lambda _: None, find_plugin
        plugin.Call._path = lambda call, key, default: self.path(call.conf, key, default)

    def begin(self, call: Call) -> None:
        self.call, self.kernel.answer, self.given = call, call.kernel, []
        while self._locks:
            with suppress(OSError):  # it gives some back itself
                os.close(self._locks.pop())  # as the end of the plugin would
        for path in self.state.iterdir():
            path.unlink()
        notes = self.state / CONTAINER
        for path, text in ((self.subnet_env, call.env), (self.status, call.status), (notes, call.notes)):
            path.unlink(missing_ok=True)
            if text:
                path.write_bytes(text)

    def path(self, conf: Mapping[str, Any], key: str, default: str) -> str:
        if not isinstance(conf.get(key) or default, str):
            raise plugin.Failure(
                plugin.GENERAL, f"{key} in the conf is {plugin.render(conf[key])}, not a path"
            )
        return str(self.state if key == "dataDir" else self.subnet_env)

    def lock(self, path: str) -> int | None:
        fd: int | None = self._lock(path)
        if fd is not None:
            self._locks.append(fd)
        return fd

    def spawned(self, _: object, verb: str, config: dict[str, Any], __: object) -> str:
        """The delegate: it must be given a config, and says what the input says."""
        assert json.loads(plugin.render(config)) == config
        assert isinstance(config["type"], str)
        if verb != "VERSION":
            self.given.append(config)
        text = self.call.delegate.decode(errors="replace")
        try:
            answer = plugin.parse(text) if text.strip() else {}
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise plugin.Failure(0, "no result")
        if type(answer.get("code")) is int:
            raise plugin.Failure(answer["code"], str(answer.get("msg", "")), str(answer.get("details", "")))
        return text if text.strip() else ""


def find_plugin(kind: object, _: str) -> str:
    """Every delegate is there that can be."""
    if not isinstance(kind, str) or not kind or "/" in kind:
        raise plugin.Failure(plugin.GENERAL, f"{plugin.render(kind)} is no name of a plugin")
    return f"/plugins/{kind}"


@cache
def _world() -> World:
    folder = tempfile.mkdtemp(prefix="fuzz-cni-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return World(Path(folder))


def check(data: bytes) -> None:
    call, world = unpack(data), _world()
    world.begin(call)
    code, text = plugin.answer(
        {
            "CNI_COMMAND": call.verb,
            "CNI_CONTAINERID": CONTAINER,
            "CNI_IFNAME": IFNAME,
            "CNI_NETNS": "/run/netns/no-such",
            "CNI_PATH": "/plugins",
        }
    )
    _check_answer(code, text)
    if code == 0 and call.verb == "ADD":
        _check_given(world.given[-1])


def _check_answer(code: int, text: str) -> None:
    assert code in (0, 1)
    if code == 0:
        return
    error = json.loads(text)
    assert {"code", "msg"} <= error.keys() <= {"code", "msg", "details"}
    assert type(error["code"]) is int
    assert "a bug of this plugin" not in error["msg"], error["details"]


def _check_given(config: dict[str, Any]) -> None:
    """The ranges are the lease's, whatever the conf says, and no route of the lease is all the world's."""
    lease = plugin.read_lease(str(_world().subnet_env))
    assert not isinstance(lease, str)
    assert config["ipam"]["ranges"] == [[{"subnet": str(subnet)}] for subnet in lease.subnets]
    routes = [route["dst"] for route in config["ipam"]["routes"]]
    assert routes[-len(lease.networks) :] == [str(net) for net in lease.networks]
    assert config["name"]
    one_line(config["name"])


# --- seeds ----------------------------------------------------------------------------------------


def seeds() -> Iterator[bytes]:
    conf: dict[str, Any] = {"cniVersion": "1.0.0", "name": "cni-flannel", "type": "flannel", "waitSeconds": 0}
    confs: list[dict[str, Any]] = [
        conf,
        conf
        | {
            "cniVersion": "1.1.0",
            "delegate": {"isDefaultGateway": True, "hairpinMode": True, "bridge": "cni0"},
        },
        conf | {"ipam": {"routes": [{"dst": "0.0.0.0/0", "gw": "10.1.17.1"}], "dataDir": "/x"}},
        conf
        | {
            "prevResult": {
                "ips": [{"address": "10.1.17.2/24", "gateway": "10.1.17.1"}],
                "routes": [{"dst": "::/0"}],
            }
        },
        conf
        | {"cniVersion": "1.1.0", "cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]},
        conf | {"cniVersion": "1.1.0", "cni.dev/valid-attachments": []},
        conf | {"subnetFile": 7, "waitSeconds": 1e300, "delegate": {"type": "bridge", "ipam": {}}},
        conf | {"runtimeConfig": {"portMappings": []}, "delegate": {"type": "host-local"}},
        *(conf | {key: odd} for key in ("delegate", "ipam", "prevResult") for odd in (7, "x", [7])),
    ]
    notes = json.dumps(conf | {"type": "bridge", "ipam": {"type": "host-local"}}).encode()
    status = json.dumps(
        {
            "state": "waiting",
            "pid": 7,
            "problems": [
                {
                    "code": "registry-unreachable",
                    "reason": "etcd",
                    "since": "2026-11-21T00:00:00Z",
                    "fix": "x",
                }
            ],
        }
    ).encode()
    said = b'{"cniVersion":"1.0.0","ips":[{"address":"10.1.17.2/24"}],"supportedVersions":["1.0.0","1.1.0"]}'
    refused = b'{"code":1,"msg":"no","details":"really"}'
    wrong = _address(bytes((10, 9, 0, 1)))
    for number in range(len(VERBS)):
        for one in confs:
            parts = (json.dumps(one).encode(), cni_calls.DUAL.encode(), notes, status, said, wrong)
            yield bytes([number]) + b"\0".join(parts)
        yield bytes([number]) + b"\0".join((json.dumps(conf).encode(), b"", b"{", status, refused, b""))
        yield bytes([number]) + b"\0".join((b'{"name":"x"}', b"FLANNEL_MTU=1", b"", b"[]", b"no JSON", b""))
        yield bytes([number]) + b"\0".join(
            (json.dumps(conf).encode(), cni_calls.IPV4.encode(), notes, b"", refused, wrong[:21])
        )


def _address(packed: bytes) -> bytes:
    """RTM_NEWADDR of an address on the bridge."""
    body = bytes((2, 24, 0, 0)) + INDEX.to_bytes(4, "little") + b"\x08\0\2\0" + packed
    return (16 + len(body)).to_bytes(4, "little") + b"\x14\0\0\0" + bytes(8) + body


TARGET = Target(
    check,
    seeds,
    words=(
        *(
            "cniVersion",
            "1.1.0",
            "1.0.0",
            "0.3.1",
            "name",
            "type",
            "delegate",
            "ipam",
            "routes",
            "dst",
            "gw",
            "bridge",
        ),
        *(
            "isGateway",
            "forceAddress",
            "prevResult",
            "ips",
            "gateway",
            "address",
            "runtimeConfig",
            "waitSeconds",
        ),
        *(
            "cni.dev/valid-attachments",
            "containerID",
            "ifname",
            "subnetFile",
            "dataDir",
            "cni0",
            "supportedVersions",
        ),
        *(
            "FLANNEL_NETWORK=",
            "FLANNEL_SUBNET=",
            "FLANNEL_MTU=",
            "FLANNEL_IPMASQ=",
            "problems",
            "state",
            "pid",
        ),
    ),
    plugins=(plugin,),
)
