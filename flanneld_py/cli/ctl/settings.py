"""Which daemon and which registry are meant: a flag, its variable, or the service's file."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import click
from msgspec import Struct

from flanneld_py.cli.variables import ENV_FILE as ENV_FILE_VARIABLE
from flanneld_py.cli.variables import misspelt
from flanneld_py.core.hostfiles import (
    DEFAULT_SUBNET_FILE,
    exported_names,
    parse_environment_file,
    socket_path,
    status_path,
    stray_lines,
)
from flanneld_py.core.prefix import normal_prefix
from flanneld_py.errors import UsageError

if TYPE_CHECKING:
    from flanneld_py.drivers.etcd import EtcdRegistry, EtcdSettings

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_ENV_FILE = "/etc/default/flanneld-py"
ENV_FILE = "env-file"
MOST_STRAY_LINES = 5
"""A file with more of them is no such file."""


class Flag(Struct, frozen=True):
    """One option, which is also a variable of the daemon: `--etcd-prefix`, FLANNELD_ETCD_PREFIX."""

    name: str
    default: str
    help: str

    @property
    def variable(self) -> str:
        return f"FLANNELD_{self.name.upper().replace('-', '_')}"


FLAGS = (
    Flag(
        "etcd-endpoints",
        "http://127.0.0.1:4001,http://127.0.0.1:2379",
        "Comma-separated URLs of etcd, tried in order.",
    ),
    Flag("etcd-prefix", "/coreos.com/network", "Where in etcd."),
    Flag("etcd-cafile", "", "Certificates that etcd's own is checked against. Default: the system's."),
    Flag("etcd-certfile", "", "Our certificate, for an etcd that wants one."),
    Flag("etcd-keyfile", "", "Its private key."),
    Flag("etcd-username", "", "User, for an etcd with authentication."),
    Flag(
        "etcd-password",
        "",
        "Its password; others can read a command line, so rather use the variable or a file.",
    ),
    Flag("etcd-password-file", "", "File with the password."),
    Flag(
        "subnet-file",
        DEFAULT_SUBNET_FILE,
        "subnet.env of the daemon that is meant; its socket and status are beside it.",
    ),
    Flag("state-dir", "/var/lib/flanneld-py", "State directory of the daemon that is meant."),
)
PASSWORD_FLAGS = ("etcd-password", "etcd-password-file")


@dataclass(frozen=True, slots=True)
class Settings:
    """One daemon and its registry."""

    endpoints: tuple[str, ...]
    prefix: str
    ca_file: str
    cert_file: str
    key_file: str
    username: str
    password: str = field(repr=False)
    password_file: str
    subnet_file: Path
    state_dir: Path

    @property
    def status_file(self) -> Path:
        return Path(status_path(str(self.subnet_file)))

    @property
    def control_socket(self) -> Path:
        return Path(socket_path(str(self.subnet_file)))

    @property
    def state_file(self) -> Path:
        return self.state_dir / "state.json"

    @property
    def config_name(self) -> str:
        """The network config's whole key in etcd."""
        return f"{self.prefix.rstrip('/')}/config"

    def etcd(self) -> EtcdSettings:
        # gRPC takes longer to import than most commands to run.
        from flanneld_py.drivers.etcd import EtcdSettings  # noqa: PLC0415

        return EtcdSettings(
            self.endpoints,
            self.prefix,
            self.ca_file,
            self.cert_file,
            self.key_file,
            self.username,
            self.password,
            self.password_file,
        )

    def registry(self) -> EtcdRegistry:
        """The registry; nothing is sent yet.

        Raises:
            UsageError: an endpoint or TLS file cannot be meant.
        """
        from flanneld_py.drivers.etcd import EtcdRegistry  # noqa: PLC0415

        return EtcdRegistry(self.etcd())


def resolve(flags: Mapping[str, str], environ: Mapping[str, str], file: Mapping[str, str]) -> Settings:
    """The value of each flag from the first place that has one; an empty text is none.

    Args:
        flags: name without dashes → value, from the command line.
        environ: this process's environment.
        file: the assignments of the service's environment file.

    Raises:
        UsageError: the prefix names nothing.
    """
    places = [
        flags,
        *({flag.name: place.get(flag.variable, "") for flag in FLAGS} for place in (environ, file)),
    ]
    value = {
        flag.name: next((place[flag.name] for place in places if place.get(flag.name)), flag.default)
        for flag in FLAGS
    }
    # Of a password and a file with one, too, the first place decides: they mean the same.
    password, password_file = next(
        (both for place in places if any(both := [place.get(name, "") for name in PASSWORD_FLAGS])), ("", "")
    )
    return Settings(
        endpoints=tuple(part.strip() for part in value["etcd-endpoints"].split(",") if part.strip()),
        prefix=normal_prefix(value["etcd-prefix"]),
        ca_file=value["etcd-cafile"],
        cert_file=value["etcd-certfile"],
        key_file=value["etcd-keyfile"],
        username=value["etcd-username"],
        password=password,
        password_file=password_file,
        subnet_file=Path(value["subnet-file"]),
        state_dir=Path(value["state-dir"]),
    )


def read_environment_file(given: str | None) -> dict[str, str]:
    """The assignments of the file; of the default one, if it was not given and exists.

    What stands there and means nothing is told on stderr.

    Raises:
        UsageError: the given one cannot be read.
    """
    path = Path(given or DEFAULT_ENV_FILE)
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError as error:
        if given is None:
            return {}
        raise UsageError(f"--env-file {path}: {error.strerror}") from error
    except OSError as error:
        if given is not None:
            raise UsageError(f"--env-file {path}: {error.strerror}") from error
        # It may hold a password and then be root's only; commands that need none of it still work.
        click.echo(f"flannelctl: {path}: {error.strerror}; what is set there is not used", err=True)
        return {}
    variables = parse_environment_file(text)
    for number in stray_lines(text)[:MOST_STRAY_LINES]:
        click.echo(f"flannelctl: {path}: line {number} is no NAME=VALUE, and is ignored", err=True)
    for name in exported_names(text)[:MOST_STRAY_LINES]:
        click.echo(
            f"flannelctl: {path}: systemd ignores a line with `export`, so the daemon does not get {name}; "
            "remove that word",
            err=True,
        )
    for line in misspelt(variables):
        click.echo(f"flannelctl: {path}: {line}", err=True)
    return variables


# --- click ----------------------------------------------------------------------------------------


def connection_options(*, hidden: bool = False) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """The options of `FLAGS` and --env-file for a command or group; given to several, the innermost wins."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        for flag in reversed(FLAGS):
            function = _option(flag.name, flag.help, flag.default, hidden)(function)
        text = "File with FLANNELD_* assignments, for what neither a flag nor the environment gives."
        return _option(ENV_FILE, text, DEFAULT_ENV_FILE, hidden)(function)

    return decorate


def with_settings(function: Callable[Concatenate[Settings, P], T]) -> Callable[P, T]:
    """For a command whose first parameter is the Settings; it takes the connection options as well."""

    @functools.wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> T:
        flags: dict[str, str] = click.get_current_context().ensure_object(dict)
        for line in misspelt(os.environ):
            click.echo(f"flannelctl: {line}", err=True)
        given = flags.get(ENV_FILE) or os.environ.get(ENV_FILE_VARIABLE) or None
        return function(resolve(flags, os.environ, read_environment_file(given)), *args, **kwargs)

    return connection_options(hidden=True)(command)


def _option(name: str, text: str, default: str, hidden: bool) -> Callable[[Callable[P, T]], Callable[P, T]]:
    def keep(ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
        flags: dict[str, str] = ctx.ensure_object(dict)
        if value is not None:
            flags[name] = value

    return click.option(
        f"--{name}",
        default=None,
        expose_value=False,
        hidden=hidden,
        callback=keep,
        help=f"{text}  [default: {default}]" if default else text,
    )
