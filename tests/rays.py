"""Ray in tests: whether it is here, and the environment of a process that uses it."""

from __future__ import annotations

import importlib.util
import os

import pytest

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is an extra: pip install 'lever[ray]'")


def ray_environment() -> dict[str, str]:
    """Quiet, and with pandas, which Ray Data imports and other processes of tests do without."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)[1:]
    more = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    return os.environ | more | {"PYTHONPATH": os.pathsep.join(paths)}
