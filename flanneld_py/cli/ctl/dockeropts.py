"""flannelctl docker-opts: mk-docker-opts.sh without a shell, so that nothing of subnet.env is executed."""

from __future__ import annotations

import os
from pathlib import Path

import click

from flanneld_py.cli.ctl.settings import Settings, with_settings
from flanneld_py.core.dockeropts import DEFAULT_KEY, find_gateway, read_variables, render_docker_opts
from flanneld_py.drivers.files import read_text
from flanneld_py.errors import FlanneldError

DEFAULT_OUTPUT = "/run/docker_opts.env"
ROUTES = Path("/proc/net/route")


@click.command("docker-opts")
@click.option("-f", "flannel_env", metavar="FILE", help="File to read.  [default: that of --subnet-file]")
@click.option("-d", "output", metavar="FILE", default=DEFAULT_OUTPUT, show_default=True, help="To write.")
@click.option("-i", "individual", is_flag=True, help="Only a DOCKER_OPT_ variable for each option.")
@click.option("-c", "combined", is_flag=True, help="Only one variable for all.")
@click.option("-k", "key", metavar="KEY", default=DEFAULT_KEY, show_default=True, help="Its name.")
@click.option("-m", "no_ipmasq", is_flag=True, help="Leave --ip-masq out.")
@with_settings
def docker_opts(
    settings: Settings,
    flannel_env: str | None,
    output: str,
    individual: bool,
    combined: bool,
    key: str,
    no_ipmasq: bool,
) -> int:
    """Write Docker's options for this host's subnet, as flannel's mk-docker-opts.sh does.

    What else the environment has of DOCKER_OPT_ variables, and of KEY, is kept. Exit 0: written; 1: not, or
    this host sends to its own subnet through a gateway, so that Docker must not use it.
    """
    source = Path(flannel_env or settings.subnet_file)
    try:
        variables = read_variables(os.environ, read_text(source) or "")
        text = render_docker_opts(
            variables,
            key=key,
            individual=individual or not combined,
            combined=combined or not individual,
            ipmasq=not no_ipmasq,
        )
        Path(output).write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise FlanneldError(f"{error.filename or output}: {error.strerror or error}") from None
    _tell_doubts(source, variables.get("FLANNEL_SUBNET", ""))
    return 0


def _tell_doubts(source: Path, subnet: str) -> None:
    """After the file is written, as mk-docker-opts.sh does.

    Raises:
        FlanneldError: the subnet is another host's.
    """
    if not subnet:
        click.echo(
            f"flannelctl: no FLANNEL_SUBNET in {source} nor in the environment: Docker will choose a subnet "
            "of its own; is the flannel daemon ready? (flannelctl wait-ready)",
            err=True,
        )
    gateway = find_gateway(subnet, read_text(ROUTES) or "")
    if gateway is not None:
        raise FlanneldError(
            f"FLANNEL_SUBNET={subnet}: this host has a route to that subnet via {gateway}, so it is another "
            f"host's; restart the flannel daemon, or remove the route if {source} is right"
        )
