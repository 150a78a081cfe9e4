"""flanneld-py: the flags of the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flanneld_py import __version__
from flanneld_py.core.prefix import normal_prefix

if TYPE_CHECKING:
    from flanneld_py.daemon.run import Daemon

BOOLEANS = {"version"}
"""Flags that need no value."""


@click.command(
    add_help_option=True,
    context_settings={"auto_envvar_prefix": "FLANNELD", "help_option_names": ["-h", "--help"]},
    epilog="Every flag can also be given as an environment variable: --etcd-endpoints is "
    "FLANNELD_ETCD_ENDPOINTS. A flag wins over its variable. Go's syntax (-iface eth0) works too.",
)
@click.option(
    "--etcd-endpoints",
    default="http://127.0.0.1:4001,http://127.0.0.1:2379",
    show_default=True,
    help="Comma-separated URLs of etcd, tried in order.",
)
@click.option("--etcd-prefix", default="/coreos.com/network", show_default=True, help="Where in etcd.")
@click.option("--etcd-cafile", default="", help="Certificates that etcd's own is checked against.")
@click.option("--etcd-certfile", default="", help="Our certificate, for an etcd that wants one.")
@click.option("--etcd-keyfile", default="", help="Its private key.")
@click.option("--etcd-username", default="", help="User, for an etcd with authentication.")
@click.option(
    "--etcd-password",
    default="",
    help="Its password; others can read a command line, so rather use the variable.",
)
@click.option(
    "--iface",
    multiple=True,
    envvar="FLANNELD_IFACE",
    help="Interface (name or IP) for traffic between hosts; repeatable, the first that exists is used. "
    "Default: that of the default route.",
)
@click.option("--public-ip", default="", help="IP published to the other hosts. Default: the interface's.")
@click.option(
    "--subnet-file",
    default="/run/flannel/subnet.env",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the lease is written for CNI plugins and Docker.",
)
@click.option(
    "--state-dir",
    default="/var/lib/flanneld-py",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="What must survive a reboot; one directory per daemon.",
)
@click.option(
    "--node-id", default="", help="Identity of this host. Default: kept in --state-dir, or from machine-id."
)
@click.option("-v", "--v", "verbosity", type=int, default=0, envvar="FLANNELD_V", help="Log level; 1: debug.")
@click.option("--version", is_flag=False, type=bool, default=False, help="Print the version and exit.")
def command(
    etcd_endpoints: str,
    etcd_prefix: str,
    etcd_cafile: str,
    etcd_certfile: str,
    etcd_keyfile: str,
    etcd_username: str,
    etcd_password: str,
    iface: tuple[str, ...],
    public_ip: str,
    subnet_file: Path,
    state_dir: Path,
    node_id: str,
    verbosity: int,
    version: bool,
) -> Daemon | None:
    """Join this host to an overlay network whose config and leases are in etcd."""
    if version:
        click.echo(f"flanneld-py {__version__}", err=True)
        return None
    # Imported here: --help and wrong flags must not wait for gRPC and netlink libraries.
    from flanneld_py.daemon import log  # noqa: PLC0415
    from flanneld_py.daemon.run import Daemon, Options  # noqa: PLC0415
    from flanneld_py.drivers.etcd import EtcdSettings  # noqa: PLC0415

    log.configure(verbosity)
    daemon = Daemon(
        Options(
            etcd=EtcdSettings(
                tuple(part.strip() for part in etcd_endpoints.split(",") if part.strip()),
                normal_prefix(etcd_prefix),
                etcd_cafile,
                etcd_certfile,
                etcd_keyfile,
                etcd_username,
                etcd_password,
            ),
            subnet_file=subnet_file,
            state_dir=state_dir,
            node_id=node_id,
            iface=iface,
            public_ip=public_ip,
        )
    )
    daemon.start()
    return daemon
