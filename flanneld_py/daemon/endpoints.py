"""Which HTTP servers the operator asked for, and what each of them has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flanneld_py.daemon.inbox import Inbox
from flanneld_py.daemon.options import Options
from flanneld_py.daemon.status import Process

if TYPE_CHECKING:
    from flanneld_py.daemon.httpserver import HttpServer, Page


def http_servers(
    options: Options, inbox: Inbox, process: Process, look: Callable[[], None]
) -> dict[str, HttpServer]:
    """Thread name → its server, listening; one for both when they were given one address.

    Raises:
        HostError: an address cannot be listened on.
    """
    if options.healthz_port <= 0 and options.metrics is None:
        return {}
    # Imported here: few ask for them, and a start shall not wait for what they need.
    from flanneld_py.daemon.health import health_pages  # noqa: PLC0415
    from flanneld_py.daemon.httpserver import HttpServer  # noqa: PLC0415

    wanted: dict[tuple[str, int], tuple[str, str, dict[str, Page]]] = {}
    if options.healthz_port > 0:
        flags = f"--healthz-ip {options.healthz_ip}, --healthz-port {options.healthz_port}"
        pages = health_pages(inbox, process, look)
        wanted[options.healthz_ip, options.healthz_port] = ("health", flags, pages)
    if options.metrics is not None:
        from flanneld_py.daemon.metrics import metrics_page  # noqa: PLC0415

        name, flags, pages = wanted.get(options.metrics, ("metrics", "", {}))
        flags = ", ".join(filter(None, (flags, f"--metrics-addr {join_address(*options.metrics)}")))
        wanted[options.metrics] = (name, flags, {**pages, "/metrics": metrics_page(inbox, process, look)})
    return {name: HttpServer(ip, port, pages, flags) for (ip, port), (name, flags, pages) in wanted.items()}


def join_address(ip: str, port: int) -> str:
    """`127.0.0.1:9100`, `[::1]:9100`."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
