"""flannelctl: looks at what flanneld-py does on this host and in etcd, and undoes it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from flanneld_py import __version__
from flanneld_py.cli.ctl.bench import bench
from flanneld_py.cli.ctl.cleanup import cleanup
from flanneld_py.cli.ctl.config import config
from flanneld_py.cli.ctl.dockeropts import docker_opts
from flanneld_py.cli.ctl.leases import leases
from flanneld_py.cli.ctl.plan import plan
from flanneld_py.cli.ctl.reservations import release, reserve
from flanneld_py.cli.ctl.settings import connection_options
from flanneld_py.cli.ctl.status import status
from flanneld_py.cli.ctl.waitready import wait_ready
from flanneld_py.errors import FlanneldError, Unreachable, UsageError

EX_USAGE = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Each option may stand before or after the command, and be given as a variable or in the file: "
    "--etcd-prefix is FLANNELD_ETCD_PREFIX. A flag wins over its variable, and that over the file. "
    "Exit codes: 0 well, 1 a problem found, 2 wrong usage, 75 etcd not reached.",
)
@click.version_option(__version__, prog_name="flannelctl", message="%(prog)s %(version)s")
@connection_options()
@click.pass_context
def command(ctx: click.Context) -> None:
    """See what flanneld-py does on this host and what is in etcd; set the network config; clean up."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(EX_USAGE)


for subcommand in (status, leases, config, plan, cleanup, docker_opts, wait_ready, bench):
    command.add_command(subcommand)
for subcommand in (reserve, release):
    leases.add_command(subcommand)


def exit_code(error: FlanneldError) -> int:
    """What went wrong, for scripts."""
    match error:
        case UsageError():
            return EX_USAGE
        case Unreachable():
            return os.EX_TEMPFAIL
        case _:
            return 1


def run(argv: Sequence[str]) -> int:
    """Carry out a command line; the answer is the exit code. What went wrong is one line on stderr."""
    try:
        return command.main(list(argv), prog_name="flannelctl", standalone_mode=False) or 0
    except click.ClickException as error:
        click.echo(f"flannelctl: {error.format_message()}", err=True)
        return EX_USAGE
    except click.Abort:
        return INTERRUPTED
    except FlanneldError as error:
        click.echo(f"flannelctl: {error}", err=True)
        return exit_code(error)
