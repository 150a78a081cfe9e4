"""The network between the hosts: one bridge in a namespace of its own."""

from __future__ import annotations

from collections.abc import Sequence

from flanneld_py.lab.netns import Namespace
from flanneld_py.lab.waiting import LabError
from flanneld_py.lab.workspace import Workspace

ROUTER = 254
"""Host number of the underlay itself: default gateway of the hosts and address of etcd."""
HOST_SYSCTLS = {
    "net.ipv4.ip_forward": 1,
    "net.ipv6.conf.all.forwarding": 1,
    "net.ipv4.conf.all.rp_filter": 0,
    "net.ipv4.conf.default.rp_filter": 0,
    # Duplicate address detection takes seconds in which an address does not answer.
    "net.ipv6.conf.all.accept_dad": 0,
    "net.ipv6.conf.default.accept_dad": 0,
}


def ipv4(number: int) -> str:
    """Address of host `number` (TEST-NET-1, RFC 5737)."""
    return f"192.0.2.{number}"


def ipv6(number: int) -> str:
    """Address of host `number` (RFC 3849)."""
    return f"2001:db8::{number:x}"


def mac(number: int) -> str:
    """Of eth0 of host `number`: the same in every lab, so that nobody's neighbour cache is ever wrong."""
    return f"02:00:c0:00:02:{number:02x}"


class Underlay(Namespace):
    """Bridge br0 with 192.0.2.254/24 and 2001:db8::fe/64; hosts hang on it by veth pairs."""

    def __init__(self, workspace: Workspace, mtu: int = 1500) -> None:
        super().__init__(workspace, "underlay")
        self.mtu = mtu
        # br_netfilter would send bridged frames through iptables as well (docs.kernel.org bridge, sysctl).
        self.sysctl(HOST_SYSCTLS | {"net.bridge.bridge-nf-call-iptables": 0})
        self.ip_batch(
            [
                "link set lo up",
                f"link add br0 address {mac(ROUTER)} mtu {mtu} type bridge mcast_snooping 0",
                f"address add {ipv4(ROUTER)}/24 dev br0",
                f"address add {ipv6(ROUTER)}/64 dev br0 nodad",
                "link set br0 up",
            ]
        )

    @staticmethod
    def port(name: str) -> str:
        """The bridge port of host `name`."""
        return f"to-{name}"

    def attach(self, host: Namespace, number: int) -> None:
        """Give a namespace eth0 with the addresses of `number` and default routes via br0."""
        if not 1 <= number < ROUTER:
            raise LabError(f"host number {number} of {host.name} is not in 1..{ROUTER - 1}")
        port = self.port(host.name)
        self.ip_batch(
            [
                f"link add {port} mtu {self.mtu} type veth peer name eth0 address {mac(number)} "
                f"mtu {self.mtu} netns {host.holder_pid}",
                f"link set {port} master br0 up",
            ]
        )
        host.sysctl(HOST_SYSCTLS)
        host.ip_batch(
            [
                "link set lo up",
                f"address add {ipv4(number)}/24 dev eth0",
                f"address add {ipv6(number)}/64 dev eth0 nodad",
                "link set eth0 up",
                f"route add default via {ipv4(ROUTER)} dev eth0",
                f"route add default via {ipv6(ROUTER)} dev eth0",
            ]
        )

    def detach(self, host: Namespace) -> None:
        """Remove the veth pair at once, not only when the kernel gets to the namespace."""
        self.ip("link", "delete", self.port(host.name))

    def cut(self, host: Namespace) -> None:
        """Take the port of a host down: nothing gets in or out."""
        self.ip("link", "set", self.port(host.name), "down")

    def mend(self, host: Namespace) -> None:
        """Undo `cut`."""
        self.ip("link", "set", self.port(host.name), "up")

    def drop(self, matches: Sequence[str]) -> None:
        """Drop what any of these nft matches names, for example `ip saddr 192.0.2.1 udp dport 8472`.

        It holds for what passes between hosts and for what they exchange with etcd, and replaces what an
        earlier call said; without a match everything passes.
        """
        rules = "\n".join(f"{match} counter drop" for match in matches)
        chains = "\n".join(
            f"chain {hook} {{\n type filter hook {hook} priority 0;\n{rules}\n}}"
            for hook in ("forward", "input", "output")
        )
        self.nft(f"table bridge lab\ndelete table bridge lab\ntable bridge lab {{\n{chains}\n}}\n")

    def dropped(self) -> int:
        """Packets dropped since `drop`."""
        counters = self.run(["nft", "list", "table", "bridge", "lab"]).split("packets ")[1:]
        return sum(int(counter.split()[0]) for counter in counters)
