"""Benchmarks: each module is a command, `python -m benchmarks.NAME`."""

import lever_train  # noqa: F401 - before torch: it makes waiting threads sleep

PER_QUERY = 15  # candidates of a query in synthetic data
