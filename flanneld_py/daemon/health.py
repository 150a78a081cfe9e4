"""`/healthz` and `/readyz`: the first line is flannel's, and a line for each named check follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus

from flanneld_py.daemon.checks import Check, is_ready, live_checks, ready_checks
from flanneld_py.daemon.httpserver import Answer, Page
from flanneld_py.daemon.inbox import Inbox, boottime
from flanneld_py.daemon.status import Process


def health_pages(inbox: Inbox, process: Process, look: Callable[[], None]) -> dict[str, Page]:
    """The pages of the health server; `look` offers what no event tells of.

    `/healthz` fails when starting afresh may help, which an etcd that is away never is a reason for.
    """

    def alive(_accept: str) -> Answer:
        return _answer(live_checks(process.hanging()), "running", "running well")

    def ready(_accept: str) -> Answer:
        look()
        return _answer(ready_checks(inbox.levels, boottime(), process.hanging()), "ready", "ready yet")

    return {"/healthz": alive, "/readyz": ready}


def _answer(checks: Sequence[Check], well: str, not_so: str) -> Answer:
    now, good = boottime(), is_ready(checks)
    lines = [f"flanneld is {well if good else f'not {not_so}'}", *(check.line(now) for check in checks)]
    body = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
    return Answer(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, body)
