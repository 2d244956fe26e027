"""What the torture rooms did (kills, inputs, disks), shown at the end of any run of the tests."""

from __future__ import annotations

import pytest

ROOM = "room"  # the property of a test's report that travels from its process to the summary


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for rs in terminalreporter.stats.values() for r in rs]
    said = [
        value
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for key, value in report.user_properties
        if key == ROOM
    ]
    if said:
        terminalreporter.section("torture rooms")
        for line in said:
            terminalreporter.write_line(str(line))
