"""A module of tests that is run by itself and prints a table of what passed."""

import sys
from collections.abc import Callable, Collection

import pytest


class _Failures:
    """A plugin that keeps the ids of what fails."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.ids.append(report.nodeid.partition("[")[2].removesuffix("]"))


def main(file: str, table: Callable[[Collection[str]], str]) -> int:
    """Run the tests of ``file`` and print ``table`` of the ids of those that failed."""
    failures = _Failures()
    # That module's imports come before pytest can look at them.
    unseen = "ignore::pytest.PytestAssertRewriteWarning"
    code = pytest.main([file, "-q", "-W", unseen], plugins=[failures])
    sys.stdout.write(f"\n{table(failures.ids)}\n")
    return code
