"""docs/configuration.md, made of the tables that command line and config are read by."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from flanneld_py.backends import BACKENDS, backend_of
from flanneld_py.cli.flagtable import GROUPS, Flag
from flanneld_py.core.config import EXAMPLE, parse_config
from flanneld_py.core.configkeys import KEYS, Key
from flanneld_py.daemon.metrictable import METRICS, PREFIX
from flanneld_py.model import NetworkConfig

HEAD = """\
# Configuration

<!-- Made by `make docs` of the tables in the code; a change here is lost. -->

Two places: the network config in etcd, which all hosts share, and the flags or variables of each daemon.

## The network config

JSON at `<prefix>/config`, such as `{example}`.
Keys match whatever their case. `flannelctl config check` says what a config means, `flannelctl config set`
checks and writes one.

"""
BACKEND_HEAD = """
### Backend

`Backend` is an object with a `Type` (one of {types}) and options of that type. Without `Backend`
the type is `udp`, as in flannel.

"""
BETWEEN = """
What happens to running daemons when it changes: [Operations](operations.md#changing-the-network-config).

## The daemon's flags

Each is also an environment variable: `--etcd-endpoints` is `FLANNELD_ETCD_ENDPOINTS`. A flag wins over its
variable; an empty variable counts as none. Syntax is Go's: `-iface eth0`, `--iface=eth0`; a boolean's value
goes with it: `--ip-blackhole-route=false`. Flags marked † are not flannel's.
"""
CTL = """
## flannelctl

Takes `--etcd-*`, `--subnet-file`, and `--state-dir` as above, before or after the command; else from
`FLANNELD_*`, else from the file of `--env-file` (`/etc/default/flanneld-py`). Give what the daemon was given.
"""

METRICS_HEAD = """
## Metrics

At `/metrics` of `--metrics-addr`, for Prometheus and OpenMetrics, with `process_*` of prometheus-client. None
is by peer.

| metric | type | labels | meaning |
|---|---|---|---|
"""


def reference() -> str:
    """The whole document, in Markdown."""
    return "".join(_parts())


def _parts() -> Iterator[str]:
    yield HEAD.format(example=EXAMPLE)
    yield from _keys(KEYS)
    yield BACKEND_HEAD.format(types=", ".join(f"`{name}`" for name in sorted(BACKENDS)))
    for name in sorted(BACKENDS):
        options = backend_of(_imagined(name)).keys
        if options:
            yield f"Options of `{name}`:\n\n"
            yield from _keys(options)
        else:
            yield f"`{name}` has no options.\n\n"
    yield BETWEEN
    for topic, flags in GROUPS.items():
        yield f"\n### {topic[0].upper()}{topic[1:]}\n\n| flag | default | meaning |\n|---|---|---|\n"
        yield from (_flag(flag) for flag in flags)
    yield CTL
    yield METRICS_HEAD
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{PREFIX}{metric.name}` | {metric.kind} | {labels} | {metric.meaning} |\n"


def _keys(keys: Iterable[Key]) -> Iterator[str]:
    yield "| key | default | meaning |\n|---|---|---|\n"
    for key in keys:
        yield f"| `{key.name}` | {key.default} | {key.meaning} |\n"
    yield "\n"


def _flag(flag: Flag) -> str:
    default = f"`{flag.default}`" if flag.default else ""
    meaning = f"{flag.meaning} Any other value is refused." if flag.refused else flag.meaning
    choices = f" One of {', '.join(f'`{choice}`' for choice in flag.choices)}." if flag.choices else ""
    mark = "" if flag.flannel else " †"
    return f"| `--{flag.name}`{mark} | {default} | {meaning}{choices} |\n"


def _imagined(backend: str) -> NetworkConfig:
    return parse_config(f'{{"Network": "10.5.0.0/16", "Backend": {{"Type": "{backend}"}}}}')


if __name__ == "__main__":
    sys.stdout.write(reference())
