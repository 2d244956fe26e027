"""The store of lever and everything columnar. Nothing in here imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lever_data.errors import LeverError
    from lever_data.relations.db import connect
    from lever_data.store.store import Store

__version__ = "0.1.0"
__all__ = ["LeverError", "Store", "__version__", "connect"]


def __getattr__(name: str) -> object:
    """Import on first use: `import lever_data` alone must stay cheap for the command line."""
    from importlib import import_module

    homes = {"connect": "relations.db", "LeverError": "errors", "Store": "store.store"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"lever_data.{homes[name]}"), name)
    return found
