"""What the command line asks of the daemon."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct, field

from flanneld_py.core.leasepolicy import LeasePolicy
from flanneld_py.core.rules import Wish
from flanneld_py.drivers.etcd import EtcdSettings


class Options(Struct, frozen=True):
    """The command line, parsed and checked."""

    etcd: EtcdSettings
    subnet_file: Path
    state_dir: Path
    node_id: str = ""
    iface: tuple[str, ...] = ()
    iface_regex: tuple[str, ...] = ()
    iface_can_reach: str = ""
    public_ip: str = ""
    public_ipv6: str = ""
    lease: LeasePolicy = field(default_factory=LeasePolicy)
    wipe_grace: float = 60.0
    """Seconds for which peers stay when etcd lost its data."""
    blackhole: bool = False
    """Whether packets to addresses of our own subnet that nobody has are dropped here."""
    wish: Wish = field(default_factory=Wish)
    """Which packet-filter rules there are to be."""
    healthz_ip: str = "0.0.0.0"  # noqa: S104 - flannel's default, and off unless a port is given
    healthz_port: int = 0
    """0 or less: no health server."""
    metrics: tuple[str, int] | None = None
    """IP address and port of /metrics; None: there is none."""

    @property
    def state_file(self) -> Path:
        return self.state_dir / "state.json"

    @property
    def registry_file(self) -> Path:
        return self.state_dir / "registry"

    @property
    def tunnel_file(self) -> Path:
        return self.state_dir / "tunnel"
