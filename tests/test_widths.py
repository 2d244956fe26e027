"""What commands print fits a terminal of 80 columns, and breaks no word that is not longer."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from lever_cli.__main__ import main

from tests.cases import long
from tests.conftest import DemoDone

SHORT = {
    "runs": "committed_at",
    "runs show evaluation": "input: query embeddings",
    "views": "require-positive-query",
    "audit": "hard_plus_soft",
    "diff beam beam_sample": "queries with a pick in both",
    "check": "0 problems",
    "query 'from candidates limit 3'": "…",
    "generate {generate} --dry-run": "answers would be asked",
    "ingest world/val_questions.json world/val_annotations.json --dataset demo --split val": "run",
}
LONG = {
    "audit --compare beam --compare balanced": "fallback",
    "audit --dataset demo --split train": "can teach anything",
    "plan --looks 3": "independent",
    "rescore --run rl_data": "score changed",
    "eval {eval}": "nearest",
    "value {value}": "doubly",
    "train {train}": "val",
    "generate {generate}": "generated",
}
VECTORS = "--query-embeddings world/train_embeddings.npy --pool world/train_pool.npy"
NAMED = {
    "eval": "--checkpoint out/rl/best.pt --query-embeddings world/val_embeddings.npy --shots 1,2 "
    "--candidate-embeddings world/train_embeddings.npy --pool world/val_pool.npy",
    "value": f"--checkpoint out/rl/best.pt --view beam {VECTORS} --behaviour uniform "
    "--least-support 0",
    "train": f"--view beam --rce-epochs 2 --out new {VECTORS}",
    "generate": f"--dataset demo --split train --limit 5 {VECTORS}",
}


@pytest.mark.long
@pytest.mark.parametrize("commands", [SHORT, long(LONG)], ids=["short", "long"])
def test_results_fit_80_columns(
    commands: dict[str, str],
    demo_done: DemoDone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(demo_done.folder, tmp_path / "demo", symlinks=True)
    monkeypatch.chdir(tmp_path / "demo")
    monkeypatch.setenv("LEVER_STORE", "store")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for command, word in commands.items():
        with pytest.raises(SystemExit) as left:
            main(shlex.split(command.format(**NAMED)))
        shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        assert left.value.code == 0 and word in shown, command
        assert [line for line in shown.splitlines() if len(line) > 80] == [], command
