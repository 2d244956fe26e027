"""The command line as a whole."""

from __future__ import annotations

import lever_data
from tests.commands import lever


def test_it_says_its_version() -> None:
    assert lever("--version").stdout == f"lever {lever_data.__version__}\n"
