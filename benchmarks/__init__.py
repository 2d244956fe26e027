"""Benchmarks: each module is a command, `python -m benchmarks.NAME`."""

import lever_train  # noqa: F401 - before torch: it makes waiting threads sleep
