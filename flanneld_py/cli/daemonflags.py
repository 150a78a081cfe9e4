"""flanneld-py: from flags and variables to what the daemon is asked to do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click
from click.core import ParameterSource

from flanneld_py import __version__
from flanneld_py.cli.flagtable import BOOLEANS, FLAGS, GROUPS, Flag
from flanneld_py.cli.variables import misspelt
from flanneld_py.core.acceptin import check_chain
from flanneld_py.core.duration import parse_duration
from flanneld_py.core.goflags import TRUTH, normalise, parse_integer
from flanneld_py.core.ifselect import pattern_of
from flanneld_py.core.leasepolicy import LOWEST_TTL, LeasePolicy
from flanneld_py.core.listenaddress import HIGHEST_PORT, overlap, parse_listen_address
from flanneld_py.core.prefix import key_root, normal_prefix
from flanneld_py.core.rules import Wish
from flanneld_py.errors import UsageError
from flanneld_py.udp.kept import Kept

if TYPE_CHECKING:
    from flanneld_py.daemon.options import Options
    from flanneld_py.daemon.run import Daemon

MINUTES_A_DAY = 24 * 60
EPILOG = (
    "Every flag can also be given as an environment variable: --etcd-endpoints is "
    "FLANNELD_ETCD_ENDPOINTS. A flag wins over its variable. Go's syntax (-iface eth0) works too."
)


class Given(NamedTuple):
    """What a start has besides flags."""

    ignored: tuple[str, ...]
    """Arguments that are accepted and mean nothing."""
    kept: Kept = Kept({}, None)


def start(argv: Sequence[str], kept: Kept) -> Daemon | None:
    """A daemon at work; None if only help or the version was asked for.

    `kept`: what an earlier process left.

    Raises:
        UsageError: the command line or a variable is wrong.
        HostError, OSError: as Daemon.
    """
    arguments = normalise(argv, FLAGS, BOOLEANS)
    made = command.main(
        arguments.flags,
        prog_name="flanneld-py",
        standalone_mode=False,
        obj=Given(tuple(arguments.ignored), kept),
    )
    # click's own --help returns a number.
    return None if isinstance(made, int) else made


def _run(**given: Any) -> Daemon:
    """Join this host to an overlay network whose config and leases are in etcd."""
    options = options_of(given)
    # Imported here: --help and wrong flags must not wait for gRPC and netlink libraries.
    from flanneld_py.daemon import log  # noqa: PLC0415
    from flanneld_py.daemon.run import Daemon  # noqa: PLC0415

    log.configure(given["v"])
    daemon = Daemon(options, click.get_current_context().obj.kept)
    _tell(options)
    daemon.start()
    return daemon


def options_of(given: Mapping[str, Any]) -> Options:
    """What is asked for, from the values of all flags (names with underscores) in the current context.

    Raises:
        UsageError: values that do not go together, or that name nothing.
    """
    from flanneld_py.daemon.options import Options  # noqa: PLC0415
    from flanneld_py.drivers.etcd import EtcdSettings  # noqa: PLC0415

    return Options(
        etcd=EtcdSettings(
            tuple(part.strip() for part in given["etcd_endpoints"].split(",") if part.strip()),
            normal_prefix(given["etcd_prefix"]),
            given["etcd_cafile"],
            given["etcd_certfile"],
            given["etcd_keyfile"],
            given["etcd_username"],
            given["etcd_password"],
            given["etcd_password_file"],
        ),
        subnet_file=Path(given["subnet_file"]),
        state_dir=Path(given["state_dir"]),
        node_id=given["node_id"],
        iface=given["iface"],
        iface_regex=given["iface_regex"],
        iface_can_reach=given["iface_can_reach"],
        public_ip=given["public_ip"],
        public_ipv6=given["public_ipv6"],
        lease=_lease_policy(given),
        wipe_grace=given["registry_wipe_grace"],
        blackhole=given["ip_blackhole_route"],
        wish=Wish(
            masquerade=given["ip_masq"],
            forward=given["iptables_forward_rules"],
            fully_random=not given["ip_masq_fully_random_disable"],
            accept_in=tuple(given["forward_accept_in"]),
        ),
        healthz_ip=given["healthz_ip"] or FLAGS["healthz-ip"].default,
        healthz_port=given["healthz_port"],
        metrics=_metrics_address(given),
    )


def _metrics_address(given: Mapping[str, Any]) -> tuple[str, int] | None:
    text, port = given["metrics_addr"], given["healthz_port"]
    metrics, health = parse_listen_address(text), (given["healthz_ip"] or FLAGS["healthz-ip"].default, port)
    if metrics is not None and port > 0 and overlap(metrics, health):
        _refuse(
            "metrics-addr",
            text,
            f"the health server has that port on {health[0]}; choose another port, or give --healthz-ip the "
            "same address, and one server has both",
        )
    return metrics


def _lease_policy(given: Mapping[str, Any]) -> LeasePolicy:
    ttl, margin = given["subnet_lease_ttl"], given["subnet_lease_renew_margin"]
    if ttl < LOWEST_TTL or ttl % 1:
        _refuse("subnet-lease-ttl", f"{ttl:g}s", f"expected whole seconds, at least {LOWEST_TTL}s")
    if not _is_given("subnet-lease-renew-margin"):
        margin = min(margin, ttl // 3)
    if margin >= ttl:
        _refuse(
            "subnet-lease-renew-margin",
            f"{margin:g}s",
            f"expected less than the lease's whole life (--subnet-lease-ttl), which is {ttl:g}s",
        )
    return LeasePolicy(int(ttl), int(margin), given["on_lease_loss"])


def _tell(options: Options) -> None:
    """What is accepted, but does not do what its writer may think."""
    import structlog  # noqa: PLC0415

    log = structlog.get_logger().bind(part="main")
    ignored = (click.get_current_context().obj or Given(())).ignored
    if ignored:
        reason = f"{ignored[0]!r} is no flag: it and what follows it is ignored, as flannel does"
        log.warning("arguments_ignored", reason=reason + _hint(ignored), arguments=len(ignored))
    if options.metrics is None and (address := _address_without_port()):
        log.warning(
            "metrics_off",
            reason=f"{_origin('metrics-addr')} {address!r} has no port, so there is no /metrics; "
            f"give one, such as {address}:9471",
        )
    for line in misspelt(os.environ):
        log.warning("variable_ignored", reason=line)
    if not options.etcd.prefix.startswith("/"):
        log.warning(
            "prefix_without_slash",
            reason=f"--etcd-prefix {options.etcd.prefix!r} does not begin with a slash, and none is added: "
            f"the config is read from the key {key_root(options.etcd.prefix) + 'config'!r}",
        )


def _address_without_port() -> str:
    """Of --metrics-addr, if it was given; a port of 0 is no oversight."""
    text: str = click.get_current_context().params["metrics_addr"]
    if not _is_given("metrics-addr") or not text or re.search(r":0+$", text):
        return ""
    return f"[{text}]" if ":" in text and not text.startswith("[") else text


def _hint(ignored: Sequence[str], flag: str = "flag") -> str:
    """For `--ip-masq false`, which to Go is `--ip-masq=true` and a word."""
    return f"; a boolean's value goes with it: --{flag}={ignored[0]}" if ignored[0] in TRUTH else ""


# --- values ---------------------------------------------------------------------------------------


class Value(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on only
    """The value of one flag, from the command line, its variable or its default."""

    def __init__(self, flag: Flag) -> None:
        self._flag = flag
        self.name = {"list": "string", "minutes": "duration"}.get(flag.kind, flag.kind)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002
        flag = self._flag
        read: dict[str, Callable[[str], Any]] = {
            "boolean": _boolean,
            "integer": _integer,
            "duration": parse_duration,
            "minutes": _minutes,
        }
        try:
            parsed = read.get(flag.kind, str)(value)
            CHECKS.get(flag.name, _anything)(parsed)
        except ValueError as error:
            _refuse(flag.name, value, str(error).removeprefix(f"{value!r}: "))
        if flag.choices and value not in flag.choices:
            _refuse(flag.name, value, f"expected one of {', '.join(flag.choices)}")
        if flag.refused and value != flag.default and parsed != TRUTH.get(flag.default):
            ignored = ((ctx.obj if ctx is not None else None) or Given(())).ignored
            hint = _hint(ignored, flag.name) if ignored and flag.kind == "boolean" else ""
            raise UsageError(f"{_origin(flag.name)}={value}: {flag.refused}{hint}")
        return parsed

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """Unlike click's own options, and like flannel's, a list gets the variable as one element."""
        return [rv]


def _boolean(text: str) -> bool:
    if text not in TRUTH:
        raise ValueError("expected true or false (or 1, t, 0, f)")
    return TRUTH[text]


def _integer(text: str) -> int:
    try:
        return parse_integer(text)
    except ValueError:
        raise ValueError("expected a whole number") from None


def _minutes(text: str) -> float:
    try:
        minutes = parse_integer(text)
    except ValueError:
        seconds = parse_duration(text)
        if seconds < 1 or seconds % 1:
            raise ValueError("expected whole seconds, at least 1s") from None
        return seconds
    if not 1 <= minutes < MINUTES_A_DAY:
        raise ValueError(f"expected minutes from 1 to {MINUTES_A_DAY - 1}, or a duration such as 3s")
    return 60.0 * minutes


def _anything(_value: Any) -> None:
    """No check."""


def _port(number: int) -> None:
    if number > HIGHEST_PORT:
        raise ValueError(f"expected a port up to {HIGHEST_PORT}, or 0 for no health server")


def _ip(text: str) -> None:
    if text:
        try:
            ip_address(text)
        except ValueError:
            raise ValueError("expected an IP address") from None


CHECKS: dict[str, Callable[[Any], object]] = {
    "forward-accept-in": check_chain,
    "healthz-port": _port,
    "healthz-ip": _ip,
    "metrics-addr": parse_listen_address,
    "iface-can-reach": _ip,
    "iface-regex": pattern_of,
}
"""Flag → what raises ValueError, in words, for a value that cannot be meant."""


def _refuse(name: str, value: str, expected: str) -> NoReturn:
    raise UsageError(f"{_origin(name)} {value!r}: {expected}") from None


def _origin(name: str) -> str:
    """How the operator gave it: by flag or variable."""
    ctx = click.get_current_context(silent=True)
    by_variable = ctx is not None and ctx.get_parameter_source(_key(name)) is ParameterSource.ENVIRONMENT
    return FLAGS[name].variable if by_variable else f"--{name}"


def _is_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(_key(name))
    return source is not ParameterSource.DEFAULT


def _key(name: str) -> str:
    return name.replace("-", "_")


# --- click ----------------------------------------------------------------------------------------


class Command(click.Command):
    """The daemon's command, whose help is sorted by topic."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        by_name = {param.name: param for param in self.get_params(ctx)}
        for topic, flags in GROUPS.items():
            records = [by_name[_key(flag.name)].get_help_record(ctx) for flag in flags]
            with formatter.section(topic[0].upper() + topic[1:]):
                formatter.write_dl([record for record in records if record is not None])


def _option(flag: Flag) -> click.Option:
    option = click.Option(
        [f"--{flag.name}", _key(flag.name)],
        type=Value(flag),
        multiple=flag.kind == "list",
        default=None if flag.kind == "list" else flag.default,
        show_default=bool(flag.default),
        envvar=flag.variable or None,
        help=flag.meaning,
    )
    if flag.name == "version":
        option.is_eager, option.expose_value, option.callback = True, False, _print_version
    return option


def _print_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"flanneld-py {__version__}", err=True)
        ctx.exit()


command = Command(
    "flanneld-py",
    params=[_option(flag) for flag in FLAGS.values()],
    callback=_run,
    help=_run.__doc__,
    epilog=EPILOG,
    context_settings={"help_option_names": ["--help"], "max_content_width": 100},
)
