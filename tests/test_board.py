"""`lever board` without a browser: who is let in, and that pages show what SQL says."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lever_board.board import Board
from lever_board.page import PAGES_SHOWN
from lever_board.server import application
from lever_data.relations.db import connect
from lever_data.store.store import Store
from tests.commands import lever
from tests.stores import candidate, commit, commit_examples, new_store

PORT, TOKEN = 8000, "secret"
EVIL = "<script>alert(1)</script> \"'\u202e</td>"


def _client(board: Board) -> TestClient:
    app = application(board, TOKEN, PORT)
    return TestClient(app, base_url=f"http://127.0.0.1:{PORT}/{TOKEN}/")


def _store(path: Path) -> Store:
    store = new_store(path)
    rows = [
        candidate(
            query, ordinal, [ordinal, ordinal + 9],
            beam_rank=ordinal,
            logprob_score=-1.0 - ordinal,
            eval_mode="fallback" if (query, ordinal) == (3, 1) else "file",
            eval_failed=(query, ordinal) == (2, 5),
            error=EVIL if (query, ordinal) == (2, 5) else None,
            vqa_pred_answer=EVIL,
            vqa_raw_generation=EVIL + ", Question: " + "x" * 1_000_000 * (query == 1),
            vqa_correct=int((query * ordinal) % 4 == 1),
            vqa_acc_score=0.6 * ((query * ordinal) % 4 == 1),
        )
        for query in range(12)
        for ordinal in range(6)
    ]  # fmt: skip
    commit(store, rows)
    questions = [
        {"dataset": "d", "split": "train", "example_id": n, "question_id": n, "image_id": n,
         "question": f"{EVIL} number {n}", "answers": [EVIL] * 3, "answer": EVIL}
        for n in range(20)
    ]  # fmt: skip
    commit_examples(store, questions)
    return store


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    board = Board(_store(tmp_path_factory.mktemp("board")))
    yield board
    board.close()


@pytest.fixture(scope="module")
def client(board: Board) -> TestClient:
    return _client(board)


def _text(client: TestClient, address: str) -> str:
    answer = client.get(address)
    assert answer.status_code == 200, answer.text
    return answer.text


@pytest.mark.parametrize(
    ("address", "headers"),
    [
        (f"http://127.0.0.1:{PORT}/wrong/store", {}),
        (f"http://127.0.0.1:{PORT}/", {}),
        (f"http://127.0.0.1:{PORT}/wrong/static/board.js", {}),
        ("store", {"host": "evil.example"}),
        ("store", {"host": f"evil.example:{PORT}"}),
        ("store", {"origin": "http://evil.example"}),
        ("store", {"origin": "null"}),
        ("download?sql=select+1&form=csv", {"origin": f"http://127.0.0.1:{PORT + 1}"}),
    ],
)
def test_a_stranger_is_refused(client: TestClient, address: str, headers: dict[str, str]) -> None:
    answer = client.get(address, headers=headers)
    assert answer.status_code == 403
    assert TOKEN not in answer.text


def test_nothing_is_changed_by_a_request(client: TestClient) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client.request(method, "store").status_code == 405


def test_every_answer_forbids_what_is_outside(client: TestClient) -> None:
    for address in ("store", "static/board.js", "nowhere", "view?view=nowhere"):
        policy = client.get(address).headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")


@pytest.mark.parametrize("name", PAGES_SHOWN)
def test_texts_of_the_data_stay_text(client: TestClient, name: str) -> None:
    text = _text(client, name)
    assert "<script>alert" not in text and "\u202e</td>" not in text.replace(html.escape(EVIL), "")
    assert not re.search(r"<[^>]+\s(style|on\w+)=", text)


def test_a_megabyte_of_an_answer_does_not_reach_the_page(client: TestClient) -> None:
    text = _text(client, "query?dataset=d&split=train&id=1")
    assert "alert(1)" in text and len(text) < 300_000


def test_a_filter_shows_the_rows_that_sql_gives(board: Board, client: TestClient) -> None:
    con = connect(board.store)
    for condition, sql in (
        ("where=query_id:ge:6&where=vqa_correct:eq:1", "query_id >= 6 and vqa_correct = 1"),
        ("column=eval_mode&operator=eq&value=fallback", "eval_mode = 'fallback'"),
        ("column=pointer&operator=eq&value=[1,10]", "pointer = [1, 10]"),
        ("column=error&operator=some", "error is not null"),
    ):
        count = con.sql(f"select count(*) from candidates where {sql}").fetchall()[0][0]
        text = _text(client, f"view?view=candidates&{condition}")
        assert f"<dt>rows</dt><dd>{count:,}</dd>" in text
    assert "could not" in client.get(
        "view?view=candidates&column=query_id&operator=eq&value=x").text.lower()  # fmt: skip


def test_the_editor_is_the_sandbox_of_lever_query(board: Board, client: TestClient) -> None:
    text = _text(client, "view?sql=select+41%2B1+as+answer")
    assert ">42</span>" in text
    for sql in (
        "delete from candidates",
        "select * from read_text('/etc/passwd')",
        "select 1; select 2",
    ):
        answer = client.get("view", params={"sql": sql})
        assert answer.status_code == 400 and "root:" not in answer.text
    before = {p: p.stat().st_mtime_ns for p in board.store.path.rglob("*")}
    client.get(
        "view", params={"sql": f"with x as (copy (select 1) to '{board.store.path}/y') select 1"}
    )
    assert {p: p.stat().st_mtime_ns for p in board.store.path.rglob("*")} == before


def test_a_download_holds_every_row(client: TestClient) -> None:
    answer = client.get(
        "download", params={"sql": "select query_id from candidates", "form": "csv"}
    )
    assert len(answer.text.splitlines()) == 1 + 12 * 6


def test_a_query_has_its_candidates_by_reward(board: Board, client: TestClient) -> None:
    sql = "select vqa_correct + vqa_acc_score from candidates where query_id = 5 order by 1 desc"
    rewards = [f"{row[0]:.3f}" for row in connect(board.store).sql(sql).fetchall()]
    text = _text(client, "query?dataset=d&split=train&id=5")
    assert re.findall(r'<div class="earned"><b>([^<]*)', text) == rewards
    other = _text(client, "query?dataset=d&split=train&id=5&mode=soft_only")
    assert re.findall(r'<div class="earned"><b>([^<]*)', other) != rewards
    assert re.findall(r'rel="(?:prev|next)" href="[^"]*id=(\d+)', text) == ["4", "6"]


def test_the_grid_filters_as_the_audit_counts(board: Board, client: TestClient) -> None:
    text = _text(client, "queries")
    con = connect(board.store)
    sql = "select class, count(*) from query_rewards group by 1"
    for name, count in con.sql(sql).fetchall():
        assert f'<option value="{name}"' in text and f"({count})</option>" in text
        assert (
            len(re.findall('class="query-tile"', _text(client, f"queries?filter={name}"))) == count
        )
    assert len(re.findall('class="query-tile"', _text(client, "queries?filter=fallback"))) == 1
    assert len(re.findall('class="query-tile"', _text(client, "queries?filter=failed"))) == 1


def test_a_damaged_run_is_shown_and_left_out(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, [candidate(0, 0, [1], vqa_correct=1)])
    broken = commit(store, [candidate(1, 0, [2], vqa_correct=1)], name="b")
    file = broken.table_files("candidates")[0]
    board = Board(store)
    client = _client(board)
    assert "<dt>rows</dt><dd>2</dd>" in _text(client, "view")
    file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    text = _text(client, "view")
    assert "<dt>rows</dt><dd>1</dd>" in text and "1 damaged run is left out" in text
    assert "is not what was committed" in _text(client, f"run?run={broken.run}")
    board.close()


def test_an_empty_store_says_what_to_do(tmp_path: Path) -> None:
    client = _client(Board(new_store(tmp_path)))
    assert "The store has no runs yet" in _text(client, "store")
    for name in PAGES_SHOWN:
        assert "lever" in client.get(name).text and client.get(name).status_code in (200, 400)


def test_pictures_are_those_of_the_image_folder(tmp_path: Path) -> None:
    from PIL import Image

    store = new_store(tmp_path)
    row = {"dataset": "d", "split": "train", "question": "?", "answers": ["a"], "answer": "a"}
    outside = tmp_path / "outside.png"
    (tmp_path / "images").mkdir()
    for file in (outside, tmp_path / "images" / "a.png"):
        Image.new("RGB", (900, 600), "red").save(file)
    paths = ("a.png", "../outside.png", "none.png")
    rows = [row | {"example_id": n, "question_id": n, "image_path": p} for n, p in enumerate(paths)]
    commit_examples(store, rows)
    client = _client(Board(store, tmp_path / "images"))
    found = [client.get(f"image?dataset=d&split=train&id={n}") for n in range(4)]
    assert [answer.status_code for answer in found] == [200, 404, 404, 400]
    assert found[0].headers["content-type"] == "image/webp" and len(found[0].content) < 5000


def test_the_command_refuses_what_is_no_store(tmp_path: Path) -> None:
    done = lever("board", "--store", tmp_path, "--no-browser", check=False)
    assert done.returncode == 1 and "there is no store here" in done.stderr


def test_no_page_needs_torch_and_the_first_one_neither_polars_nor_numpy() -> None:
    code = (
        "import sys, lever_board.server, lever_board.store_pages\n"
        "assert {'polars', 'numpy', 'torch'}.isdisjoint(sys.modules)\n"
        "from lever_board.pages import PAGES\n"
        "from importlib import import_module\n"
        "for name in PAGES.values(): import_module(f'lever_board.{name}')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
