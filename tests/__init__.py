"""Tests of lever. The import comes before torch and makes its waiting threads sleep."""

import lever_train  # noqa: F401
