"""For all tests: the cheap ones come first, and a test that could not run is never passed over in silence."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab.requirements import obstacle

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips",
        action="store_true",
        default=os.environ.get("CI") == "true",
        help="a skipped test is a failure (the default where CI=true)",
    )
    parser.addoption("--rows", metavar="FILE", help="append a line of JSON for each fault that was tried")
    parser.addoption(
        "--full", action="store_true", help="every fault on every backend, and for its full time"
    )


REPORT_END = 3000  # of a report's text: the assertion, and the last lines of the logs
FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call it with a line that whoever runs the tests should read: it stands in the summary."""
    return request.config.stash.setdefault(FIGURES, []).append


@functools.cache
def netns_obstacle() -> str | None:
    """Why tests marked netns cannot run here, or None."""
    return obstacle(
        commands=["nft", "iptables", "strace", "tcpdump", "iperf3", "ethtool", "/usr/lib/cni/bridge"],
        links=["vxlan id 1 dstport 0"],
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("netns") is not None)
    if not config.getoption("full"):
        for_later = [item for item in items if item.get_closest_marker("full") is not None]
        items[:] = [item for item in items if item.get_closest_marker("full") is None]
        config.hook.pytest_deselected(items=for_later)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("netns") is not None and (reason := netns_obstacle()) is not None:
        pytest.skip(reason)


def _fail_if_skipped(config: pytest.Config, report: pytest.TestReport | pytest.CollectReport) -> None:
    if config.getoption("no_skips") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"did not run, and with --no-skips or CI=true every test must: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped(item.config, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(collector.config, report)
    return report


def _minutes(terminalreporter: pytest.TerminalReporter) -> Iterator[str]:
    """What each folder took, the longest first."""
    took: defaultdict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                took[report.nodeid.partition("::")[0].rpartition("/")[0]] += report.duration
    for folder, seconds in sorted(took.items(), key=lambda item: -item[1]):
        yield f"{folder:<24}{seconds / 60:>6.1f} min"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    figures = config.stash.get(FIGURES, [])
    if figures:
        terminalreporter.section("measured")
        for line in figures:
            terminalreporter.line(line)
    if "CI_BEGAN" in os.environ:
        terminalreporter.section("time")
        for line in _minutes(terminalreporter):
            terminalreporter.line(line)
    once = terminalreporter.getreports("rerun")
    if once:
        terminalreporter.section(f"failed once, then passed or failed again: {len(once)}", yellow=True)
        for report in once:
            terminalreporter.line(f"{report.nodeid} ({report.when}): {report.longreprtext[-REPORT_END:]}")
    skipped = len(terminalreporter.getreports("skipped"))
    if skipped:
        terminalreporter.section(f"NOT RUN: {skipped} (reasons below)", sep="!", yellow=True, bold=True)
        terminalreporter.line("What was not run is not known to work. Everything, as root: make test")
