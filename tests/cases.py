"""Parametrised tests: `make test` runs some cases, and `make test-rest` (so CI) the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def long(*values: Any) -> ParameterSet:
    """A case that `make test` leaves out: another one runs the same lines."""
    return pytest.param(*values, marks=pytest.mark.long)


def long_except(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """All cases of one value; `make test` leaves out those that are not ``kept``."""
    listed = list(cases)
    unknown = [case for case in kept if case not in listed]
    assert not unknown, f"no such case: {unknown}"
    return [case if case in kept else long(case) for case in listed]
