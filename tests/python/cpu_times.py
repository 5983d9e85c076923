"""A pytest plugin: `pytest --cpu-times=20` prints the files and tests that use most CPU time.

CPU time is user and system time of a test, its fixtures and the processes that it waits for. It
depends little on what else the machine does.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

spent: Counter[str] = Counter()  # CPU seconds of each test
started = pytest.StashKey[float]()
ITEM = "cpu_seconds"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-times",
        type=int,
        default=0,
        metavar="N",
        help="the N files and N tests that use most CPU time",
    )


def now() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[started] = now()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    report = yield
    if call.when == "teardown":
        report.user_properties.append((ITEM, now() - item.stash[started]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    spent.update({report.nodeid: dict(report.user_properties).get(ITEM, 0.0)})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.getoption("--cpu-times")
    if not rows:
        return
    files: Counter[str] = Counter()
    for test, seconds in spent.items():
        files[test.partition("::")[0]] += seconds
    for what, counts in (("files", files), ("tests", spent)):
        terminalreporter.section(f"CPU seconds of {what}, {sum(counts.values()):.1f} in all")
        for name, seconds in counts.most_common(rows):
            terminalreporter.line(f"{seconds:7.2f}  {name}")
