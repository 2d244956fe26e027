"""Secrets in the environment never reach the store, an output folder, stdout or stderr."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lever_data.store import Store
from tests.commands import Done, lever
from tests.torture.harness import write_rl_data
from tests.training import Bench

SECRETS = {
    "OPENAI_API_KEY": "sk-proj-Zx81secretQw",
    "HF_TOKEN": "hf_Lk92secretRt",
    "AWS_SECRET_ACCESS_KEY": "Aw73secretTy",
    "LEVER_PASSWORD": "Pw55secretUi",
}


def _texts(folder: Path) -> list[str]:
    """What every file below a folder says, Parquet decoded."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.append(f"{path}\n{path.read_bytes().decode('latin-1')}")
        if path.suffix == ".parquet":
            found.append(str(pq.read_table(path, partitioning=None).to_pylist()))
    return found


def test_no_command_keeps_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    bench = Bench(tmp_path)
    store, out = bench.store.path, tmp_path / "out"
    source = write_rl_data(tmp_path / "a.json", 20)
    vectors = ["--query-embeddings", bench.vectors, "--hidden-dim", 8]
    done: list[Done] = []
    for words in (
        ["ingest", source, "--store", store, "--dataset", "e", "--split", "train"],
        ["train", "--store", store, "--run", bench.run.run, "--out", out, *vectors],
        ["audit", "--store", store, "--json", out / "a.json", "--html", out / "a.html"],
        ["export", "--store", store, "--run", bench.run.run, "--out", out / "back.json"],
        ["query", "select * from duckdb_settings()", "--store", store],
        ["query", "select * from duckdb_secrets()", "--store", store],
        ["--debug", "train", "--store", store, "--view", "nope", "--out", out, *vectors],
        ["--debug", "generate", "--store", store, "--answerer", "openai:http://127.0.0.1:9/v1"],
    ):
        done.append(lever(*words, check=False))
    assert [d.returncode for d in done[:4]] == [0, 0, 0, 0], [d.stderr for d in done]
    assert len(Store.open(store).runs()) >= 2
    texts = _texts(store) + _texts(out) + [d.stdout for d in done] + [d.stderr for d in done]
    assert len(texts) > 25
    for name, value in SECRETS.items():
        assert not [text[:200] for text in texts if value in text], name
