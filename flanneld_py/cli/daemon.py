"""flanneld-py: the command line of the daemon."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from flanneld_py import __version__
from flanneld_py.core.goflags import normalise
from flanneld_py.core.prefix import normal_prefix
from flanneld_py.errors import FlanneldError, HostError, RegistryError, UsageError

BOOLEANS = {"version"}
EX_CONFIG = 78
"""sysexits.h: a restart does not cure it."""


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
    iface: tuple[str, ...],
    public_ip: str,
    subnet_file: Path,
    state_dir: Path,
    node_id: str,
    verbosity: int,
    version: bool,
) -> int:
    """Join this host to an overlay network whose config and leases are in etcd."""
    if version:
        click.echo(f"flanneld-py {__version__}", err=True)
        return os.EX_OK
    # Imported here: --help and wrong flags must not wait for gRPC and netlink libraries.
    from flanneld_py.daemon import log  # noqa: PLC0415
    from flanneld_py.daemon.run import Daemon, Options  # noqa: PLC0415
    from flanneld_py.drivers.etcd import EtcdSettings  # noqa: PLC0415

    log.configure(verbosity)
    endpoints = tuple(part.strip() for part in etcd_endpoints.split(",") if part.strip())
    return Daemon(
        Options(
            etcd=EtcdSettings(endpoints, normal_prefix(etcd_prefix)),
            subnet_file=subnet_file,
            state_dir=state_dir,
            node_id=node_id,
            iface=iface,
            public_ip=public_ip,
        )
    ).run()


def exit_code(error: FlanneldError) -> int:
    """The exit code that tells a service manager whether a restart can help."""
    match error:
        case UsageError():
            return 2
        case HostError() | RegistryError():
            return EX_CONFIG
        case _:
            return 1


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends the process."""
    try:
        arguments = normalise(sys.argv[1:] if argv is None else argv, BOOLEANS)
        code = command.main(arguments, prog_name="flanneld-py", standalone_mode=False) or 0
    except click.ClickException as error:
        click.echo(f"flanneld-py: {error.format_message()}", err=True)
        code = 2
    except FlanneldError as error:
        click.echo(f"flanneld-py: {error}", err=True)
        code = exit_code(error)
    sys.stderr.flush()
    # gRPC's own clean-up can wait for a server that hangs; nothing of ours is left to do.
    os._exit(code)


if __name__ == "__main__":
    main()
