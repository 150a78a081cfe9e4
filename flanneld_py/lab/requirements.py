"""What the lab needs of the machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection

from flanneld_py.lab.etcd import find_binary
from flanneld_py.lab.process import environment, run, search_path
from flanneld_py.lab.waiting import CommandFailed, LabError
from flanneld_py.lab.workspace import DISK

_PACKAGES = {
    "setpriv": "util-linux",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "stdbuf": "coreutils",
    "sysctl": "procps",
    "ip": "iproute2",
    "bridge": "iproute2",
    "ping": "iputils-ping",
    "fping": "fping",
    "nft": "nftables",
    "iptables": "iptables",
    "strace": "strace",
    "tcpdump": "tcpdump",
    "iperf3": "iperf3",
    "ethtool": "ethtool",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
}
"""Command → Debian package."""
_ALWAYS = ("setpriv", "nsenter", "unshare", "stdbuf", "sysctl", "ip", "bridge", "ping", "fping")
_LINKS = ("veth", "bridge")


def obstacle(commands: Collection[str] = (), links: Collection[str] = ()) -> str | None:
    """Why there can be no lab here, in one line with the remedy; None when there can.

    Args:
        commands: needed besides those of every lab: nft, strace, tcpdump, iperf3, ethtool.
        links: kinds of devices needed besides veth and bridge, as `ip link add` wants them:
            `vxlan id 1 dstport 0`.
    """
    if missing := [name for name in (*_ALWAYS, *commands) if shutil.which(name, path=search_path()) is None]:
        packages = " ".join(sorted({_PACKAGES[command] for command in missing}))
        return f"commands not found: {', '.join(missing)}; apt-get install {packages}"
    if os.geteuid() != 0:
        return "network namespaces need root; run it with sudo, or in a privileged container"
    try:
        find_binary("etcd")
        find_binary("etcdctl")
    except LabError as error:
        return str(error)
    for link in (*_LINKS, *links):
        attempt = ["unshare", "--net", "--", "ip", "link", "add", "name", "probe", "type", *link.split()]
        try:
            run(attempt, environment(DISK), "", 10)
        except CommandFailed as failure:
            kind, said = link.split()[0], " ".join(failure.stderr.split())
            return f"no {kind} device can be made: {said} (modprobe {kind}, or a privileged container)"
    return None
