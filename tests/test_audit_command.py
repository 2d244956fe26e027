"""`lever audit` as a command: what it prints, writes and refuses."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lever_cli.__main__ import main

from lever_data.report.audit import audit_views
from lever_data.report.options import AuditRequest
from lever_data.store.files import sha256_file
from lever_data.store.schema import CANDIDATES, QUERIES
from lever_data.store.store import RunSpec, Store
from tests.audits import KEYS, rows
from tests.commands import lever
from tests.stores import candidate, commit, commit_examples, new_store, table


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = new_store(tmp_path_factory.mktemp("audit"))
    commit(made, rows())
    return made


@pytest.mark.slow
def test_the_command(store: Store, tmp_path: Path) -> None:
    out, page = tmp_path / "a.json", tmp_path / "a.html"
    done = lever("audit", "--store", store.path, "--json", out, "--html", page)
    assert "1 of 2 queries (50.0 %) can teach anything" in done.stdout
    assert set(json.loads(out.read_text())) >= KEYS
    assert page.read_text().startswith("<!doctype html>")
    failed = lever(
        "audit", "--store", store.path, "--json", out, "--fail-on", "fallback_share > 0.05",
        check=False,
    )  # fmt: skip
    assert failed.returncode == 1
    assert "the audit gate failed: fallback_share > 0.05 in all_candidates" in failed.stderr
    usage = lever("audit", "--store", store.path, "--fail-on", "nonsense", check=False)
    assert usage.returncode == 2


@pytest.mark.slow
def test_the_command_compares(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    views = ["--compare", "beam", "--compare", "all_candidates"]
    done = lever("audit", "--store", store.path, *views, "--json", out)
    assert "all_candidates" in done.stdout
    assert [found["view"] for found in json.loads(out.read_text())] == ["beam", "all_candidates"]


def test_the_command_refuses_before_the_work(tmp_path: Path) -> None:
    """The store is not even there: none of these needs it to see that it cannot end well."""
    there = ["audit", "--store", tmp_path / "none"]
    gate = lever(*there, "--fail-on", "fallback_shar > 0", check=False)
    assert (gate.returncode, "did you mean fallback_share?" in gate.stderr) == (2, True)
    for path, why in [("no/a.json", "no such folder"), (".", "a folder stands where")]:
        for option in ("--json", "--html"):
            done = lever(*there, option, tmp_path / path, check=False)
            assert (done.returncode, why in done.stderr) == (1, True)
    both = lever(*there, "--reward-mode", "hard_only", "--reward", "correct", check=False)
    assert (both.returncode, "give one of the two" in both.stderr) == (2, True)


class _Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_leaves_takes_no_file_and_no_gate_along(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, page = tmp_path / "a.json", tmp_path / "a.html"
    monkeypatch.setattr("sys.stdout", _Gone())
    words = ["audit", "--store", str(store.path), "--json", str(out), "--html", str(page)]
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(io.StringIO()) as said:
        main([*words, "--fail-on", "fallback_share > 0.05"])
    assert (stop.value.code, "gate failed" in said.getvalue()) == (1, True)
    assert set(json.loads(out.read_text())) >= KEYS
    assert page.exists()


@pytest.mark.long
def test_data_moves_no_cursor(tmp_path: Path) -> None:
    made = new_store(tmp_path)
    evil = {"gen_method": "\x1b]0;mine\x1b\\[bold]", "score": 1.0}
    commit(made, [*rows(), candidate(0, 5, [7, 8], correct=1, **evil)])
    done = lever("audit", "--store", made.path, "--reward", "correct -- \x1b[2J[x]")
    assert "\x1b" not in done.stdout
    assert "reward correct -- \\e[2J[x]" in done.stdout


@pytest.mark.slow
def test_a_gate_over_a_reward_that_is_not_finite(store: Store, tmp_path: Path) -> None:
    """It once passed: every comparison with NaN is false."""
    out = tmp_path / "a.json"
    gate = ["--json", out, "--fail-on", "mean_reward > 0"]
    done = lever("audit", "--store", store.path, "--reward", "correct / 0", *gate, check=False)
    assert (done.returncode, out.exists()) == (1, False)


@pytest.mark.long
def test_a_closed_pipe_is_no_error(store: Store) -> None:
    words = [sys.executable, "-m", "lever_cli", "audit", "--store", str(store.path)]
    piped = f"{shlex.join(words)} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0" and done.stderr == ""


@pytest.mark.long
def test_examples_come_along_with_a_chosen_run(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    run = commit(store, [candidate(0, 0, [1], answer="cat", correct=1, score=1.0)])
    shown = {"dataset": "d", "split": "train", "example_id": 1, "question_id": 1}
    commit_examples(store, [shown | {"question": "?", "answers": ["cat"], "answer": "cat"}])
    (found,) = audit_views(store, AuditRequest(runs=(run.run,)), ["all_candidates"])
    (row,) = found.figures["answer_copying"]
    assert row["copied_share"] == 1.0
    assert found.figures["runs"] == [run.run]


@pytest.mark.slow
def test_only_the_runs_it_read_are_named(tmp_path: Path) -> None:
    """A store has more: examples, embeddings, and what the view leaves out."""
    store = new_store(tmp_path)
    run = commit(store, [candidate(0, 0, [1], correct=1, score=1.0)])
    commit(store, [candidate(1, 0, [2], gen_method="sample", correct=1)], name="b")
    shown = {"dataset": "d", "split": "train", "example_id": 1, "question_id": 1}
    commit_examples(store, [shown | {"question": "?", "answers": ["cat"], "answer": "cat"}])
    (found,) = audit_views(store, AuditRequest(), ["beam"])
    assert (found.figures["runs"], found.figures["places"]) == ([run.run], ["d/train"])
    (read,) = found.figures["inputs"]
    assert read["sha256"] == sha256_file(run.path / "manifest.json")


@pytest.mark.long
def test_one_dataset_or_split_of_a_store(tmp_path: Path) -> None:
    made = new_store(tmp_path)
    commit(made, [candidate(0, n, [7 + n], correct=n, score=n) for n in (0, 1)])
    for dataset, split in (("d", "val"), ("e", "val")):
        place: dict[str, Any] = {"dataset": dataset, "split": split}
        row = candidate(3, 0, [5], correct=1, score=1.0) | place
        with made.begin(RunSpec("rl_data", **place, source_sha256=dataset)) as writer:
            writer.write("candidates", table(CANDIDATES, [row]))
            writer.write("queries", table(QUERIES, [place | {"query_id": 3}]))
            writer.commit()

    def places(*flags: str) -> list[str]:
        done = lever("audit", "--store", made.path, *flags, "--json", "-")
        found: list[str] = json.loads(done.stdout)["places"]
        return found

    assert places() == ["d/train", "d/val", "e/val"]
    assert places("--dataset", "d") == ["d/train", "d/val"]
    assert places("--split", "val") == ["d/val", "e/val"]
    assert places("--dataset", "d", "--split", "val") == ["d/val"]
    refused = lever("audit", "--store", made.path, "--dataset", "f", check=False)
    assert refused.returncode == 2 and "it has d/train, d/val, e/val" in refused.stderr
    run = next(run.run for run in made.runs() if run.dataset == "e")
    refused = lever("audit", "--store", made.path, "--dataset", "d", "--run", run, check=False)
    assert "no runs of this dataset and split; value 'd/any'" in refused.stderr
