"""An overlay network daemon for Linux container hosts: flannel's etcd mode, self-healing."""

__version__ = "0.1.0"
