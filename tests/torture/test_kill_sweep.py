"""kill -9 during sweep: finished cells are kept, and going on ends with the same report."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from lever_demo.demo import DemoOptions, prepare_demo
from lever_demo.world import WorldSpec
from tests.torture.conftest import Report
from tests.torture.harness import LONG_SIZES, Nursery, verify, verify_checks

SWEEP = """
name = "s"
base = "d/lever.toml"
[train.rce]
epochs = 1
[train.grpo]
epochs = 0
[train.sft]
epochs = 1
[grid]
"reward.mode" = ["hard_plus_soft", "soft_only"]
"""


def _report_of(text: str) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(text)["cells"]
    return sorted(cells, key=lambda cell: str(cell["cell"]))


@pytest.mark.slow
@pytest.mark.parametrize("long", LONG_SIZES)
def test_sweep_killed_at_random_moments(
    warm: Nursery, tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare_demo(DemoOptions(Path("d"), WorldSpec(60, 20, 6)))
    Path("sweep.toml").write_text(SWEEP)
    shutil.copytree("d", "saved")
    words = ("sweep", "sweep.toml", "--json", "-")
    undisturbed = warm.run(*words, cwd=tmp_path)
    assert undisturbed.code == 0, undisturbed.stderr
    expected, committed = _report_of(undisturbed.stdout), verify(tmp_path / "d" / "store")
    roll = random.Random(1)
    kills = sweeps = 0
    outcome = undisturbed
    while kills < (60 if long else 1):
        if outcome.code == 0:
            for folder in ("d", "sweeps"):
                shutil.rmtree(folder)
            shutil.copytree("saved", "d")
            sweeps += 1
        after = roll.uniform(0.1, 0.9) * undisturbed.seconds
        outcome = warm.run(*words, cwd=tmp_path, kill_after=after)
        kills += outcome.killed
        assert verify_checks(tmp_path / "d" / "store").items() <= committed.items()
    outcome = warm.run(*words, cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert _report_of(outcome.stdout) == expected
    assert verify(tmp_path / "d" / "store") == committed
    report(f"{kills} kills over {sweeps} sweeps")
