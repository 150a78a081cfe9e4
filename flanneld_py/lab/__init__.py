"""Hosts as network namespaces with a real etcd, for the demo, the tests and the benches.

It starts the commands of this project as an operator would and imports none of its code. Everything it
makes is a child process, an anonymous namespace or a file below one temporary directory, so that nothing
remains of it, even when it is killed.
"""

from flanneld_py.lab.daemon import Daemon
from flanneld_py.lab.etcd import EtcdServer
from flanneld_py.lab.hosts import Host, Pod
from flanneld_py.lab.probes import PingLoss, PingResult, PingRun, Throughput, Transfer, tcp_throughput
from flanneld_py.lab.topology import Lab
from flanneld_py.lab.underlay import Underlay
from flanneld_py.lab.waiting import CommandFailed, LabError, WaitTimeout, wait_for

__all__ = [
    "CommandFailed",
    "Daemon",
    "EtcdServer",
    "Host",
    "Lab",
    "LabError",
    "PingLoss",
    "PingResult",
    "PingRun",
    "Pod",
    "Throughput",
    "Transfer",
    "Underlay",
    "WaitTimeout",
    "tcp_throughput",
    "wait_for",
]
