"""flannelctl plan: what the daemon would change now."""

from __future__ import annotations

import click

from flanneld_py.cli.ctl.control import NoAnswer, ask
from flanneld_py.cli.ctl.settings import Settings, with_settings
from flanneld_py.cli.ctl.status import checked, tell_other_prefix
from flanneld_py.cli.ctl.text import echo_json, printable
from flanneld_py.errors import FlanneldError


@click.command()
@click.option("--json", "as_json", is_flag=True, help='An object: {"ops": […]}.')
@with_settings
def plan(settings: Settings, as_json: bool) -> int:
    """What the daemon would change on this host now.

    The daemon reads kernel and files afresh and compares them with what should be; nothing is changed by
    asking. Exit 0: nothing to change; 1: something, or no daemon answers, or that of another prefix.
    """
    try:
        status = checked(ask(settings.control_socket, "status"), settings.control_socket)
        tell_other_prefix(status, settings)
        ops: list[str] = ask(settings.control_socket, "plan")
        obstacle = "" if ops else _obstacle(ask(settings.control_socket, "status"))
    except NoAnswer as error:
        raise error.with_advice from None
    if obstacle:
        raise FlanneldError(f"there is no plan yet: {obstacle}")
    if as_json:
        echo_json({"ops": ops})
    else:
        click.echo("\n".join(map(printable, ops)) or "nothing to change")
    return 1 if ops or status["prefix"] != settings.prefix else 0


def _obstacle(status: dict[str, object]) -> str:
    """Why an empty plan does not mean that all is well: a daemon that lacks config or lease plans nothing.

    The MTU is known from the first plan on.
    """
    if status.get("subnets") and status.get("mtu") is not None:
        return ""
    problems = status.get("problems")
    first = problems[0] if isinstance(problems, list) and problems else {}
    return str(first.get("reason") or "the daemon has no lease yet; see `flannelctl status`")
