"""Hosts and the pods on them."""

from __future__ import annotations

import copy
import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from pathlib import Path

from flanneld_py.lab.daemon import Daemon
from flanneld_py.lab.etcd import EtcdServer
from flanneld_py.lab.netns import Namespace
from flanneld_py.lab.notify import NotifySocket
from flanneld_py.lab.underlay import BOTH, HOST_SYSCTLS, Underlay, ipv4, ipv6
from flanneld_py.lab.waiting import LabError
from flanneld_py.lab.workspace import Workspace

_NAME = re.compile(r"[a-z][a-z0-9-]{0,11}")
"""`to-<name>` must fit the 15 bytes of an interface name (IFNAMSIZ)."""
_LINE = re.compile(r'^(\w+)="?([^"\n]*)"?$', re.MULTILINE)


class Pod(Namespace):
    """A pod on a host's bridge, wired as the CNI bridge plugin does it."""

    def __init__(
        self, host: Host, number: int, gateways: Sequence[IPv4Interface | IPv6Interface], mtu: int
    ) -> None:
        super().__init__(host.workspace, f"{host.name}-pod{number}")
        self.addresses = [gateway.ip + number for gateway in gateways]
        self.port = f"{host.pod_port}{number}"
        # 0a:58 and the IPv4 address, as CNI does it: a new pod under an old address has the old MAC.
        # For IPv6 not 0a:58, as the end of its address may be a host's number, and so the bridge's MAC.
        kind = {4: "0a:58", 6: "0a:59"}[self.addresses[0].version]
        mac = f"{kind}:{int(self.addresses[0]) & 0xFFFFFFFF:08x}"
        mac = mac[:6] + ":".join(mac[6:][i : i + 2] for i in range(0, 8, 2))
        host.ip_batch(
            [
                f"link add {self.port} mtu {mtu} type veth peer name eth0 address {mac} mtu {mtu} "
                f"netns {self.holder_pid}",
                f"link set {self.port} master {host.pod_bridge} up",
            ]
        )
        self.sysctl(HOST_SYSCTLS)
        commands = ["link set lo up", "link set eth0 up"]
        for address, gateway in zip(self.addresses, gateways, strict=True):
            commands.append(f"address add {address}/{gateway.network.prefixlen} dev eth0")
            commands.append(f"route add default via {gateway.ip} dev eth0")
        self.ip_batch(commands)

    @property
    def address(self) -> str:
        """IPv4, or IPv6 where the network has no IPv4."""
        return str(self.addresses[0])


class Host(Namespace):
    """A machine of the lab: eth0 in the underlay, a daemon, a bridge cni0 and pods on it."""

    def __init__(
        self,
        workspace: Workspace,
        name: str,
        number: int,
        *,
        underlay: Underlay,
        etcd: EtcdServer,
        notify: NotifySocket,
        segment: int = 0,
        families: Sequence[int] = BOTH,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise LabError(f"host name {name!r} is not 1 to 12 lower-case letters, digits and dashes")
        super().__init__(workspace, name)
        self.number = number
        self.segment = segment
        self.families = tuple(families)
        self.interface = "eth0"
        """The one in the underlay, as it is called now."""
        self.iface = "eth0"
        """For --iface; empty: without it."""
        self.pod_bridge, self.pod_port = "cni0", "pod"
        """The bridge of the pods, and how the names of its ports begin."""
        self.underlay = underlay
        self.etcd = etcd
        self.notify = notify
        self._keeper: NotifySocket | None = None
        self.prefix = etcd.prefix
        self.directory = workspace.directory / f"host-{number}-{name}"
        self.run_directory = self.directory / "run"
        self.state_directory = self.directory / "state"
        self.run_directory.mkdir(parents=True, exist_ok=True)
        self.node_id = hashlib.sha256(name.encode()).hexdigest()[:32]
        self.daemons: list[Daemon] = []
        self.pods: list[Pod] = []
        self.others: list[Host] = []
        """The same machine in other overlays."""
        self._attach()

    def beside(self, name: str) -> Host:
        """The same machine in another overlay: below another prefix, with daemons, files and pods of its own.

        As a machine (reboot, close) it is this one.
        """
        other = copy.copy(self)
        other.etcd = copy.copy(self.etcd)
        other.etcd.prefix = other.prefix = f"{self.prefix}/{name}"
        other.directory = self.directory / name
        other.run_directory, other.state_directory = other.directory / "run", other.directory / "state"
        other.run_directory.mkdir(parents=True)
        other.pod_bridge, other.pod_port = f"cni-{name}", f"{name}-pod"
        other.daemons, other.pods, other.others = [], [], []
        other._keeper = None
        if self._keeper is not None:
            other.keep_descriptors()
        self.others.append(other)
        return other

    def keep_descriptors(self) -> None:
        """From now on somebody keeps what the daemon hands over (FDSTORE), as systemd does."""
        if self._keeper is None:
            self._keeper = NotifySocket(self.workspace, self.directory, keeps=True)

    def drop_descriptors(self) -> None:
        """Nobody does any more."""
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None

    @property
    def manager(self) -> NotifySocket:
        """Whom daemons report to."""
        return self._keeper or self.notify

    def _attach(self) -> None:
        self.underlay.attach(self, self.number, self.segment, self.families)

    @property
    def address(self) -> str:
        """IPv4 in the underlay, which a host without IPv4 does not have."""
        return ipv4(self.number, self.segment)

    @property
    def address6(self) -> str:
        """IPv6 in the underlay, which a host without IPv6 does not have."""
        return ipv6(self.number, self.segment)

    @property
    def subnet_file(self) -> Path:
        return self.run_directory / "subnet.env"

    @property
    def status_file(self) -> Path:
        return self.run_directory / "status.json"

    @property
    def control_socket(self) -> Path:
        return self.run_directory / "flanneld-py.sock"

    @property
    def flags(self) -> list[str]:
        """What every daemon of this host is started with."""
        endpoint = self.etcd.endpoint if 4 in self.families else self.etcd.endpoint6
        return [
            f"--etcd-endpoints={endpoint}",
            f"--etcd-prefix={self.prefix}",
            f"--subnet-file={self.subnet_file}",
            f"--state-dir={self.state_directory}",
            f"--node-id={self.node_id}",
            *([f"--iface={self.iface}"] if self.iface else []),
        ]

    def start_daemon(
        self,
        args: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
        strace: Sequence[str] | None = None,
    ) -> Daemon:
        """Start the daemon; it is the host's `daemon` from now on.

        Args:
            args: flags after the host's own; of a flag given twice the last one counts.
            env: variables in addition.
            wrapper: a command that runs the daemon, such as `["nice"]`.
            strace: run under strace with these options (`[]`: all system calls); see Daemon.trace.
        """
        log = self.directory / f"daemon-{len(self.daemons) + 1}.log"
        self.daemons.append(Daemon(self, args=args, env=env, wrapper=wrapper, strace=strace, log=log))
        return self.daemon

    @property
    def daemon(self) -> Daemon:
        """The one started last."""
        if not self.daemons:
            raise LabError(f"host {self.name} has had no daemon")
        return self.daemons[-1]

    def subnet_env(self) -> dict[str, str]:
        """The variables of subnet.env; empty when there is no such file."""
        try:
            return dict(_LINE.findall(self.subnet_file.read_text()))
        except FileNotFoundError:
            return {}

    def gateways(self) -> list[IPv4Interface | IPv6Interface]:
        """FLANNEL_SUBNET and FLANNEL_IPV6_SUBNET: the bridge's address with the leased subnet."""
        variables = self.subnet_env()
        names = ("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET")
        return [ip_interface(variables[name]) for name in names if name in variables]

    def attach_pods(self, count: int = 1) -> list[Pod]:
        """Start pods in the leased subnet; the bridge comes with the first one. Returns the new ones.

        Raises:
            LabError: no subnet leased yet.
        """
        gateways, variables = self.gateways(), self.subnet_env()
        if not gateways:
            raise LabError(f"host {self.name} has no {self.subnet_file.name} yet")
        mtu = int(variables["FLANNEL_MTU"])
        if not self.pods:
            # A MAC of its own: otherwise it changes with the ports.
            create = (
                f"link add {self.pod_bridge} address 0a:58:00:00:00:{self.number:02x} mtu {mtu} type bridge"
            )
            addresses = [f"address add {gateway} dev {self.pod_bridge}" for gateway in gateways]
            self.ip_batch([create, *addresses, f"link set {self.pod_bridge} up"])
        new = [Pod(self, len(self.pods) + n + 1, gateways, mtu) for n in range(count)]
        self.pods.extend(new)
        return new

    def remove_pods(self) -> None:
        """Remove all pods and the bridge, as a drained node would."""
        if self.pods:
            ports = [f"link delete {pod.port}" for pod in self.pods]
            self.ip_batch([*ports, f"link delete {self.pod_bridge}"])
        for pod in self.pods:
            pod.close()
        self.pods.clear()

    @property
    def pod(self) -> Pod:
        """The first one."""
        if not self.pods:
            raise LabError(f"host {self.name} has no pods; attach_pods() once the daemon is ready")
        return self.pods[0]

    def reboot(self) -> None:
        """Power off and on: a new network, empty run directory, same state directory; no daemon started."""
        self.close()
        shutil.rmtree(self.run_directory)
        self.run_directory.mkdir()
        self._hold()
        self._attach()

    def close(self) -> None:
        """Kill the daemon, remove pods and veths, let go of the namespace; the files stay."""
        for overlay in (self, *self.others):
            for daemon in overlay.daemons:
                daemon.kill()
            for pod in overlay.pods:
                pod.close()
            overlay.pods.clear()
            overlay.drop_descriptors()
        self.underlay.detach(self)
        super().close()
