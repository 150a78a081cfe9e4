"""For tests of the etcd driver: servers, what lies between them and a client, certificates."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flanneld_py.lab.process import send_signal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PREFIX = "/coreos.com/network"


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_until(condition: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.01)


def b64(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


class Etcd:
    """One etcd of our own. It dies with the test process; its directory goes with the `with` block."""

    def __init__(
        self,
        *options: str,
        scheme: str = "http",
        hosts: tuple[str, ...] = ("127.0.0.1",),
        name: str = "m",
        peers: dict[str, int] | None = None,
    ) -> None:
        self.port, self.admin_port, peer_port = free_ports(3)
        peers = peers or {name: peer_port}
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.directory = Path(tempfile.mkdtemp(prefix="etcd-", dir="/dev/shm"))
        self._process: subprocess.Popen[bytes] | None = None
        peer_url = f"http://127.0.0.1:{peers[name]}"
        self._command = [
            *("setpriv", "--pdeathsig", "KILL", "/usr/bin/etcd", "--name", name),
            *("--data-dir", str(self.directory / "data")),
            *("--listen-client-urls", ",".join(f"{scheme}://{host}:{self.port}" for host in hosts)),
            *("--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url),
            *("--initial-cluster", ",".join(f"{k}=http://127.0.0.1:{v}" for k, v in peers.items())),
            *("--listen-metrics-urls", f"http://127.0.0.1:{self.admin_port}"),
            *("--heartbeat-interval", "20", "--election-timeout", "200", *options),
        ]

    def launch(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def start(self) -> Etcd:
        self.launch()
        wait_until(self.healthy)
        return self

    def healthy(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "log").read_text()[-2000:]
        try:
            return '"true"' in self._admin("/health")
        except OSError:
            return False

    def leads(self) -> bool:
        """Whether it is the leader of its cluster at the moment."""
        return "\netcd_server_is_leader 1\n" in self._admin("/metrics")

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        send_signal(self._process.pid, number)

    def clients(self) -> set[str]:
        """Addresses of those connected, from the kernel."""
        command = ["ss", "-Htn", "state", "established", f"sport = :{self.port}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return {line.split()[3] for line in done.stdout.splitlines()}

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        shutil.rmtree(self.directory / "data")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.directory)

    def _admin(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.admin_port, timeout=2)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def received(self) -> dict[str, int]:
        """Method → messages that came in over gRPC; those with none are left out."""
        found = re.findall(
            r'^grpc_server_msg_received_total\{grpc_method="(\w+)".*\} (\d+)$',
            self._admin("/metrics"),
            re.MULTILINE,
        )
        return {method: int(count) for method, count in found if count != "0"}

    @contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """Fills the mapping, at the end, with the messages received meanwhile."""
        before, counted = self.received(), dict[str, int]()
        yield counted
        after = self.received()
        counted.update({m: n - before.get(m, 0) for m, n in after.items() if n != before.get(m, 0)})

    def etcdctl(self, *arguments: str, text: str = "") -> str:
        return subprocess.run(
            ["etcdctl", "--endpoints", self.url, *arguments],
            input=text,
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
            env={"ETCDCTL_API": "3", "PATH": os.environ["PATH"]},
        ).stdout

    # etcd's JSON gateway, faster than a process a write

    def ask(self, path: str, bodies: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        answers = []
        for body in bodies:
            connection.request("POST", f"/v3/{path}", json.dumps(body))
            answers.append(json.loads(connection.getresponse().read()))
            assert "error" not in answers[-1], answers[-1]
        connection.close()
        return answers

    def put(self, *pairs: tuple[str | bytes, str], lease: int = 0) -> int:
        """Write pairs of full key and value one by one; the last revision."""
        bodies = [{"key": b64(key), "value": b64(value), "lease": str(lease)} for key, value in pairs]
        return int(self.ask("kv/put", bodies)[-1]["header"]["revision"])

    def put_together(self, pairs: list[tuple[str, str]]) -> int:
        """Write in transactions of 100; the last revision."""
        operations = [{"requestPut": {"key": b64(key), "value": b64(value)}} for key, value in pairs]
        bodies = [{"success": operations[i : i + 100]} for i in range(0, len(operations), 100)]
        return int(self.ask("kv/txn", bodies)[-1]["header"]["revision"])

    def remove(self, key: str) -> int:
        return int(self.ask("kv/deleterange", [{"key": b64(key)}])[0]["header"]["revision"])

    def stored(self, prefix: str) -> dict[bytes, bytes]:
        body = {"key": b64(prefix + "/"), "range_end": b64(prefix + "0")}
        kvs = self.ask("kv/range", [body])[0].get("kvs", [])
        return {base64.b64decode(kv["key"]): base64.b64decode(kv.get("value", "")) for kv in kvs}


class Swallower:
    """A TCP way to a server. Connections that are muted pass requests on, but no more answers."""

    def __init__(self, port: int) -> None:
        self._muted: set[socket.socket] = set()
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets = [self._listener]
        self._accepter = threading.Thread(target=self._accept)
        self._threads = [self._accepter]
        self._accepter.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._server_port))
            self._sockets += [client, server]
            for source, sink in ((client, server), (server, client)):
                pump = threading.Thread(target=self._pump, args=(source, sink))
                self._threads.append(pump)
                pump.start()

    def mute(self) -> None:
        """Mute the connections there are; later ones answer."""
        self._muted.update(self._sockets[1::2])

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if sink not in self._muted:
                    sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for each in self._sockets:
            each.close()


class Authority:
    """A CA of our own in a directory, and certificates for 127.0.0.1 by it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.ca, self._ca_key = directory / "ca.crt", directory / "ca.key"
        self._directory = directory
        self._serial = 0
        self._openssl("-x509", "-keyout", self._ca_key, "-out", self.ca, "-subj", "/CN=test CA")

    def issue(self, name: str, subject: str = "IP:127.0.0.1") -> tuple[Path, Path]:
        certificate, key, request, extensions = (
            self._directory / f"{name}.{suffix}" for suffix in ("crt", "key", "csr", "ext")
        )
        self._openssl("-keyout", key, "-out", request, "-subj", f"/CN={name}")
        extensions.write_text(f"subjectAltName={subject}")
        self._serial += 1
        numbered = ["-set_serial", self._serial, "-extfile", extensions]
        signing = ["-CA", self.ca, "-CAkey", self._ca_key, *numbered]
        self._run("x509", "-req", "-in", request, *signing, "-out", certificate)
        return certificate, key

    def revoke(self, *serials: int) -> Path:
        """A list (DER) that revokes the certificates issued as the first, second … of all."""
        index, settings, text, der = (
            self._directory / name for name in ("index.txt", "ca.cnf", "crl.pem", "crl.der")
        )
        rows = (f"R\t491231235959Z\t200101000000Z\t{n:02X}\tunknown\t/CN=x\n" for n in serials)
        index.write_text("".join(rows))
        settings.write_text(f"[ca]\ndefault_ca=ours\n[ours]\ndatabase={index}\ndefault_md=sha256\n")
        signing = ["-config", settings, "-keyfile", self._ca_key, "-cert", self.ca, "-crldays", "1"]
        self._run("ca", "-gencrl", *signing, "-out", text)
        self._run("crl", "-in", text, "-outform", "DER", "-out", der)
        return der

    def _openssl(self, *arguments: object) -> None:
        self._run("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *arguments)

    def _run(self, *arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
