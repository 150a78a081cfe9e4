"""The flags of the daemon: one table, of which command line, variables, help and documentation are made."""

from __future__ import annotations

from typing import Literal, TypeAlias

from msgspec import Struct

Kind: TypeAlias = Literal["string", "list", "boolean", "integer", "duration", "minutes"]
"""`minutes`: a whole number of them, as flannel has it, or a duration."""

ETCD_ONLY = "this daemon keeps leases in etcd (flannel's etcd mode), not in Kubernetes; leave it out"


class Flag(Struct, frozen=True):
    """One flag, which is also a variable: `--etcd-prefix`, FLANNELD_ETCD_PREFIX."""

    name: str
    kind: Kind
    default: str
    """As one would write it; empty: not given."""
    meaning: str
    refused: str = ""
    """Why no other value than the default is taken; empty: others are."""
    choices: tuple[str, ...] = ()
    flannel: bool = True
    """Whether flannel has it, too."""

    @property
    def variable(self) -> str:
        """Its environment variable; empty for --version, which is looked at before."""
        return "" if self.name == "version" else f"FLANNELD_{self.name.upper().replace('-', '_')}"


GROUPS: dict[str, tuple[Flag, ...]] = {
    "etcd": (
        Flag(
            "etcd-endpoints",
            "string",
            "http://127.0.0.1:4001,http://127.0.0.1:2379",
            "Comma-separated URLs of etcd, tried in order.",
        ),
        Flag(
            "etcd-prefix",
            "string",
            "/coreos.com/network",
            "Where in etcd. One daemon serves one prefix; a leading slash is not added.",
        ),
        Flag(
            "etcd-cafile",
            "string",
            "",
            "Certificates that etcd's own is checked against. Default: the system's.",
        ),
        Flag("etcd-certfile", "string", "", "Our certificate, for an etcd that wants one."),
        Flag("etcd-keyfile", "string", "", "Its private key."),
        Flag("etcd-username", "string", "", "User, for an etcd with authentication."),
        Flag(
            "etcd-password",
            "string",
            "",
            "Its password; others can read a command line, so rather use the variable or a file.",
        ),
        Flag(
            "etcd-password-file",
            "string",
            "",
            "File with the password, read again when needed.",
            flannel=False,
        ),
        Flag(
            "registry-wipe-grace",
            "duration",
            "60s",
            "How long peers stay when etcd lost its data, or many left at once.",
            flannel=False,
        ),
    ),
    "interface": (
        Flag(
            "iface",
            "list",
            "",
            "Interface (name or IP) for traffic between hosts; repeatable, the first that fits is used. "
            "Default: on a host new to the overlay the one by which etcd is reached, and then that again; "
            "else that of the default route.",
        ),
        Flag(
            "iface-regex",
            "list",
            "",
            "The same by a regular expression, searched in addresses, then in names; repeatable, tried in "
            "order after all --iface.",
        ),
        Flag("iface-can-reach", "string", "", "The same by the route to this IP; tried last."),
        Flag(
            "public-ip",
            "string",
            "",
            "IPv4 address published to the other hosts. Default: the interface's. Without --iface it also "
            "chooses the interface.",
        ),
        Flag("public-ipv6", "string", "", "The same for IPv6."),
    ),
    "lease": (
        Flag(
            "subnet-lease-ttl",
            "duration",
            "24h",
            "How long a lease lives that is not renewed, at least 5s. It is renewed every third of this, "
            "or every 5 minutes.",
            flannel=False,
        ),
        Flag(
            "subnet-lease-renew-margin",
            "minutes",
            "60",
            "How long before its end a lease is written again while flannel hosts take part: minutes, from 1 "
            "to 1439, or a duration such as 3s. Less than the TTL; unless given, at most a third of it.",
        ),
        Flag(
            "on-lease-loss",
            "string",
            "hold",
            "When another host has taken our subnet: wait for it, take another one, or exit with 75.",
            choices=("hold", "renumber", "exit"),
            flannel=False,
        ),
        Flag(
            "node-id",
            "string",
            "",
            "Identity of this host. Default: kept in --state-dir, or from machine-id.",
            flannel=False,
        ),
    ),
    "files": (
        Flag(
            "subnet-file",
            "string",
            "/run/flannel/subnet.env",
            "Where the lease is written for CNI plugins and Docker.",
        ),
        Flag(
            "state-dir",
            "string",
            "/var/lib/flanneld-py",
            "What must survive a reboot; one directory per daemon.",
            flannel=False,
        ),
    ),
    "packet filter and routes": (
        Flag(
            "ip-masq",
            "boolean",
            "false",
            "Masquerade what leaves the network; containers keep their own addresses within it.",
        ),
        Flag(
            "ip-masq-fully-random-disable",
            "boolean",
            "false",
            "With --ip-masq: keep a connection's source port if it is free, instead of a random one.",
        ),
        Flag(
            "iptables-resync",
            "integer",
            "5",
            "No effect: what is changed by others is noticed at once.",
        ),
        Flag(
            "iptables-forward-rules",
            "boolean",
            "true",
            "Let through what is forwarded from or to the network, unless others drop it in their chains.",
        ),
        Flag(
            "forward-accept-in",
            "list",
            "",
            "Chain of others that shall accept the network's traffic first of all, once it is there: one of "
            "iptables' filter table (DOCKER-USER, FORWARD) or of nft's (inet filter forward); repeatable.",
            flannel=False,
        ),
        Flag(
            "ip-blackhole-route",
            "boolean",
            "false",
            "Drop packets to addresses of our own subnet that no container has, instead of sending them out.",
        ),
    ),
    "health": (
        Flag("healthz-ip", "string", "0.0.0.0", "Address of the health server: /healthz and /readyz."),  # noqa: S104 - flannel's default
        Flag("healthz-port", "integer", "0", "Its TCP port; 0 or less: no health server."),
        Flag(
            "metrics-addr",
            "string",
            "127.0.0.1",
            "Where /metrics is for Prometheus: ip:port, :port for 127.0.0.1, or [ip]:port for IPv6. "
            "Without a port: nowhere.",
            flannel=False,
        ),
    ),
    "Kubernetes": (
        Flag("kube-subnet-mgr", "boolean", "false", "Not for this daemon.", refused=ETCD_ONLY),
        Flag("kube-api-url", "string", "", "Not for this daemon.", refused=ETCD_ONLY),
        Flag("kubeconfig-file", "string", "", "Not for this daemon.", refused=ETCD_ONLY),
        Flag(
            "kube-annotation-prefix",
            "string",
            "flannel.alpha.coreos.com",
            "Not for this daemon.",
            refused=ETCD_ONLY,
        ),
        Flag(
            "net-config-path",
            "string",
            "/etc/kube-flannel/net-conf.json",
            "Not for this daemon: the network's config is in etcd.",
            refused=ETCD_ONLY,
        ),
        Flag("set-node-network-unavailable", "boolean", "true", "Not for this daemon.", refused=ETCD_ONLY),
    ),
    "log": (
        Flag("v", "integer", "0", "Log level; 1 or more: debug."),
        Flag("vmodule", "string", "", "No effect: flannel's log levels by source file."),
        Flag("log_backtrace_at", "string", "", "No effect: flannel's stack trace at a line of its log."),
        Flag("version", "boolean", "false", "Print the version on standard error and exit."),
    ),
}
"""Topic → its flags."""

FLAGS: dict[str, Flag] = {flag.name: flag for flags in GROUPS.values() for flag in flags}
"""Name without dashes → flag."""
BOOLEANS = frozenset(name for name, flag in FLAGS.items() if flag.kind == "boolean")
"""Flags that need no value."""
