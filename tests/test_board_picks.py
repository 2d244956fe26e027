"""Page *One query* of `lever board`: the picks of each checkpoint are those of `lever predict`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lever_board import picks
from lever_board.board import Board
from lever_board.export import FileLinks
from lever_board.job import work
from lever_board.page import PageRequest
from lever_board.pages import show
from lever_board.picks import Pick, Picks, picks_of
from lever_board.server import ServedLinks
from tests.commands import lever
from tests.stores import commit_examples
from tests.training import QUERIES, Bench

PLACE = ("d", "train")


@pytest.fixture
def bench(trained: Bench) -> Bench:
    """A training, and the items that its pointers name."""
    row = {"dataset": "d", "split": "train", "answers": ["a"], "answer": "a", "question": "?"}
    items = [row | {"example_id": n, "question_id": n} for n in range(QUERIES)]
    commit_examples(trained.store, items)
    return trained


@pytest.fixture
def board(bench: Bench) -> Iterator[Board]:
    made = Board(bench.store)
    yield made
    made.close()


def _asked(board: Board, **parameters: str) -> PageRequest:
    """As an export asks, which waits for what is being made."""
    return PageRequest(board, board.state(), FileLinks(9), parameters)


def _predicted(bench: Bench, checkpoint: Path, out: Path) -> dict[int, tuple[int, ...]]:
    place = ["--dataset", "d", "--split", "train", "--candidate-split", "train"]
    words = [*place, "--query-embeddings", bench.vectors, "--store", bench.store.path]
    lever("predict", "--checkpoint", checkpoint, *words, "--out", out)
    rows = map(json.loads, out.read_text().splitlines())
    return {row["query_id"]: tuple(row["pointer"]) for row in rows}


def _folder(bench: Bench) -> Path:
    (run,) = [run for run in bench.store.runs() if run.kind == "training"]
    return Path(run.source["path"])


@pytest.mark.long
def test_picks_are_those_of_lever_predict(bench: Bench, board: Board, tmp_path: Path) -> None:
    folder = _folder(bench)
    best = (folder / "best.pt").resolve().name
    names = ["rce_epoch1.pt", "rce_epoch2.pt"]
    said = {name: _predicted(bench, folder / name, tmp_path / f"{name}.jsonl") for name in names}
    for query in (0, 7, QUERIES - 1):
        (pick,) = picks_of(_asked(board), PLACE, query).found
        assert (pick.checkpoint, pick.pointer) == (best, said[best][query])
    (run,) = board.state().kind("training")
    every = picks_of(_asked(board, training=run.run), PLACE, 7).found
    assert [(p.checkpoint, p.pointer) for p in every] == [(name, said[name][7]) for name in names]


def test_a_checkpoint_that_changed_is_asked_anew(bench: Bench, board: Board) -> None:
    (run,) = board.state().kind("training")
    run.source["path"] = str(bench.folder / "out")
    asked = PageRequest(board, board.state(), ServedLinks(), {})
    assert picks_of(asked, PLACE, 7).is_waiting and picks_of(asked, PLACE, 7).is_waiting
    assert len([*board.folder.rglob("request.json")]) == 1
    board.close()  # its process need not end by itself
    (bench.folder / "out" / "best.pt").unlink()
    shutil.copy(bench.folder / "out" / "rce_epoch2.pt", bench.folder / "out" / "best.pt")
    assert picks_of(asked, PLACE, 7).is_waiting
    assert len([*board.folder.rglob("request.json")]) == 2


def test_a_reader_who_waits_has_the_page_at_once(bench: Bench, board: Board) -> None:
    asked = PageRequest(board, board.state(), ServedLinks(), {})
    assert picks_of(asked, PLACE, 7) == Picks(is_waiting=True)
    # another block of queries is asked only when the first is done
    assert picks_of(asked, PLACE, 7 + picks.BLOCK) == Picks(is_waiting=True)


def test_large_vectors_are_read_when_the_reader_says_so(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picks, "HEAVY", 100)
    found = picks_of(_asked(board), PLACE, 7)
    assert found.size is not None and found.size.endswith("kB") and not found.found


def test_what_is_missing_is_said(bench: Bench, board: Board) -> None:
    (pick,) = picks_of(_asked(board), ("d", "val"), 7).found
    assert pick.why_not == (
        "no vectors of d/val are on record: `lever eval` on d/val names them"
    )  # fmt: skip
    assert picks_of(_asked(board), ("other", "train"), 7) == Picks()


def test_a_training_whose_folder_is_gone(bench: Bench, board: Board, tmp_path: Path) -> None:
    (run,) = board.state().kind("training")
    run.source["path"] = str(tmp_path / "gone")
    (pick,) = picks_of(_asked(board), PLACE, 7).found
    assert pick == Pick(f"gone {run.run[-12:]}", "–", (), f"no checkpoint lies in {tmp_path}/gone")


@pytest.mark.slow
def test_a_checkpoint_that_may_not_be_read_costs_the_page_nothing_else(
    bench: Bench, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:  # chmod does not stop root
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(picks, "sha256_file", refuse)
    asked = PageRequest(
        board, board.state(), ServedLinks(), {"dataset": "d", "split": "train", "id": "7"}
    )
    text, status = show("query", asked)
    assert status == 200 and "They cannot be shown: Permission denied: " in text
    assert text.count('class="candidate') > 2


def test_a_relative_path_is_looked_for_beside_the_store(bench: Bench, board: Board) -> None:
    (run,) = board.state().kind("training")
    run.source["path"] = "out"  # as where the training was started
    run.parameters["data"]["query_embeddings"] = "vectors.pt,none.pt"
    assert picks_of(PageRequest(board, board.state(), ServedLinks(), {}), PLACE, 7).is_waiting
    (request,) = board.folder.rglob("request.json")
    (asked,) = json.loads(json.loads(request.read_text())["request"])
    assert asked["request"]["checkpoints"] == [str(bench.folder / "out" / "best.pt")]
    assert asked["request"]["questions"]["query_embeddings"] == f"{bench.folder}/vectors.pt,none.pt"


def _worked(bench: Bench, folder: Path, out: str, vectors: Path) -> str | None:
    """Why the board's process, here in this one, makes no picks; ``None`` where it makes some."""
    run = next(run for run in bench.store.runs() if run.kind == "training")
    place = {"dataset": "d", "split": "train", "candidate_split": "train"}
    request = {
        "store": str(bench.store.path),
        "checkpoints": [str(bench.folder / out / "best.pt")],
        "questions": {**place, "query_embeddings": str(vectors)},
        "query_ids": [7, 100],
    }
    asked = [{"request": request, "training": run.run}]
    words = {"store": str(bench.store.path), "kind": "picks", "request": json.dumps(asked)}
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps(words))
    work(folder)
    (answer,) = json.loads((folder / "answer.json").read_text())["picks"]
    assert answer.get("pointers", {"7": []}).keys() == {"7"}
    why: str | None = answer.get("why_not")
    return why


@pytest.mark.long
def test_the_process_says_why_there_is_no_pick(bench: Bench, tmp_path: Path) -> None:
    assert _worked(bench, tmp_path / "a", "out", bench.vectors) is None
    none = Path("none.pt")
    assert _worked(bench, tmp_path / "b", "out", none) == (
        "there is no such embeddings file; value 'none.pt'"
    )
    bench.train("out", overwrite=True, rce_epochs=1)
    assert _worked(bench, tmp_path / "c", "out", bench.vectors) == (
        "the folder holds another training by now"
    )
