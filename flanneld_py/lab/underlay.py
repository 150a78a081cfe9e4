"""The network between the hosts: two segments, each a bridge, with a router between them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flanneld_py.lab.netns import Namespace
from flanneld_py.lab.waiting import LabError
from flanneld_py.lab.workspace import Workspace

ROUTER = 254
"""Host number of the underlay itself: default gateway of the hosts and address of etcd."""
SEGMENTS = (0, 1)
"""The hosts are on the first one unless told otherwise."""
BOTH = (4, 6)
"""IP versions."""
HOST_SYSCTLS = {
    "net.ipv4.ip_forward": 1,
    "net.ipv6.conf.all.forwarding": 1,
    "net.ipv4.conf.all.rp_filter": 0,
    "net.ipv4.conf.default.rp_filter": 0,
    # Duplicate address detection takes seconds in which an address does not answer.
    "net.ipv6.conf.all.accept_dad": 0,
    "net.ipv6.conf.default.accept_dad": 0,
    "net.ipv6.conf.eth0.accept_dad": 0,
}


def ipv4(number: int, segment: int = 0) -> str:
    """Address of host `number` (TEST-NET-1 and TEST-NET-2, RFC 5737)."""
    return f"{('192.0.2', '198.51.100')[segment]}.{number}"


def ipv6(number: int, segment: int = 0) -> str:
    """Address of host `number` (RFC 3849)."""
    return f"2001:db8:{('', '0:1:')[segment]}:{number:x}"


def mac(number: int, segment: int = 0) -> str:
    """Of eth0 of host `number`: the same in every lab, so that nobody's neighbour cache is ever wrong."""
    return f"02:00:c0:00:{2 + segment:02x}:{number:02x}"


_OFFLOADED = re.compile(
    r"^\s*(tx-tcp\S*segmentation|tx-udp-segmentation|tx-(?:udp_tnl|gre|ipxip)\S*segmentation): \S+$",
    re.MULTILINE,
)
"""Lines of `ethtool -k`, unless the driver fixes them: all that a sender leaves to its port to cut."""


class Underlay(Namespace):
    """Bridges br0 (192.0.2.254/24, 2001:db8::fe/64) and br1 (198.51.100.254/24, 2001:db8:0:1::fe/64).

    Hosts hang on them by veth pairs, and the namespace routes between the two.
    """

    def __init__(self, workspace: Workspace, mtu: int = 1500) -> None:
        super().__init__(workspace, "underlay")
        self.mtu = mtu
        # br_netfilter would send bridged frames through iptables as well (docs.kernel.org bridge, sysctl).
        self.sysctl(HOST_SYSCTLS | {"net.bridge.bridge-nf-call-iptables": 0})
        self.ip_batch(["link set lo up"])
        for segment in SEGMENTS:
            bridge = f"br{segment}"
            self.ip_batch(
                [
                    f"link add {bridge} address {mac(ROUTER, segment)} mtu {mtu} "
                    f"type bridge mcast_snooping 0",
                    f"address add {ipv4(ROUTER, segment)}/24 dev {bridge}",
                    f"address add {ipv6(ROUTER, segment)}/64 dev {bridge} nodad",
                    f"link set {bridge} up",
                ]
            )

    @staticmethod
    def port(name: str) -> str:
        """The bridge port of host `name`."""
        return f"to-{name}"

    def attach(self, host: Namespace, number: int, segment: int = 0, families: Sequence[int] = BOTH) -> None:
        """Give a namespace eth0 with the addresses of `number` and default routes via the segment's bridge.

        Args:
            host: the namespace.
            number: 1 to 253.
            segment: one of SEGMENTS.
            families: the IP versions it gets addresses of.
        """
        if not 1 <= number < ROUTER:
            raise LabError(f"host number {number} of {host.name} is not in 1..{ROUTER - 1}")
        port = self.port(host.name)
        self.ip_batch(
            [
                f"link add {port} mtu {self.mtu} type veth peer name eth0 address {mac(number, segment)} "
                f"mtu {self.mtu} netns {host.holder_pid}",
                f"link set {port} master br{segment} up",
            ]
        )
        host.sysctl(HOST_SYSCTLS)
        addresses = {4: f"{ipv4(number, segment)}/24", 6: f"{ipv6(number, segment)}/64 nodad"}
        routers = {4: ipv4(ROUTER, segment), 6: ipv6(ROUTER, segment)}
        host.ip_batch(
            [
                "link set lo up",
                *(f"address add {addresses[family]} dev eth0" for family in families),
                "link set eth0 up",
                *(f"route add default via {routers[family]} dev eth0" for family in families),
            ]
        )

    def detach(self, host: Namespace) -> None:
        """Remove the veth pair at once, not only when the kernel gets to the namespace."""
        self.ip("link", "delete", self.port(host.name))

    def offload(self, host: Namespace, *, on: bool) -> None:
        """Whether the ports at both ends of the host's cable take packets of 64 KiB uncut, tunnelled or not.

        A veth does by default and never cuts them at all; a wire gets packets of its MTU.
        """
        for namespace, port in ((host, "eth0"), (self, self.port(host.name))):
            names = _OFFLOADED.findall(namespace.run(["ethtool", "-k", port]))
            settings = [word for name in names for word in (name, "on" if on else "off")]
            namespace.run(["ethtool", "-K", port, *settings])

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
