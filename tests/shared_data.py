"""Where the real data lies, when it is there: the folder `shared` beside the checkout."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
OKVQA = SHARED / "data" / "okvqa"
GOLDEN = SHARED / "golden"

needs_shared = pytest.mark.skipif(
    not OKVQA.is_dir(), reason="the real data (../shared) is not beside this checkout"
)
