"""What every torture room has: a warm process to kill children of, and a count of what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import ROOM
from tests.torture.harness import Nursery

Report = Callable[[str], None]


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """A nursery with everything that ingest, query and rm import."""
    modules = (
        "lever_data.sources.ingest",
        "lever_data.relations.query",
        "lever_data.sources.export",
        "lever_data.report.rescore",
    )
    with Nursery(tmp_path_factory.mktemp("nursery"), *modules) as warm:
        yield warm


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """Say what a room did (how many kills, how many inputs); shown at the end of the tests."""

    def say(line: str) -> None:
        request.node.user_properties.append((ROOM, f"{request.node.name}: {line}"))

    return say
