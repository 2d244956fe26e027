"""`lever board` without a browser: who is let in, and that pages show what SQL says."""

from __future__ import annotations

import html
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from lever_board.board import Board
from lever_board.export import export
from lever_board.page import PAGES_SHOWN
from lever_board.server import application
from lever_data.errors import UsageError
from lever_data.relations.db import connect
from lever_data.report.audit import audit
from lever_data.report.diff import diff
from lever_data.report.options import AuditRequest, DiffRequest
from lever_train.learn.log import Log
from tests.boards import EVIL, board_store, selectors
from tests.commands import lever
from tests.stores import candidate, commit, commit_examples, new_store

PORT, TOKEN = 8000, "secret"


def _client(board: Board) -> TestClient:
    app = application(board, TOKEN, PORT)
    return TestClient(app, base_url=f"http://127.0.0.1:{PORT}/{TOKEN}/")


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    board = Board(board_store(tmp_path_factory.mktemp("board")))
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


@pytest.mark.slow
def test_every_answer_forbids_what_is_outside(client: TestClient) -> None:
    for address in ("store", "static/board.js", "nowhere", "view?view=nowhere"):
        policy = client.get(address).headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")


@pytest.mark.long
@pytest.mark.parametrize("name", PAGES_SHOWN)
def test_texts_of_the_data_stay_text(client: TestClient, name: str) -> None:
    text = _text(client, name)
    assert "<script>alert" not in text and "\u202e</td>" not in text.replace(html.escape(EVIL), "")
    assert not re.search(r"<[^>]+\s(style|on\w+)=", text)


def test_a_megabyte_of_an_answer_does_not_reach_the_page(client: TestClient) -> None:
    text = _text(client, "query?dataset=d&split=train&id=1")
    assert "… (1,000,012 characters)" in text and len(text) < 100_000


@pytest.mark.long
def test_a_filter_shows_the_rows_that_sql_gives(board: Board, client: TestClient) -> None:
    con = connect(board.store)
    for condition, sql in (
        ("where=query_id:ge:6&where=correct:eq:1", "query_id >= 6 and correct = 1"),
        ("column=eval_mode&operator=eq&value=fallback", "eval_mode = 'fallback'"),
        ("column=pointer&operator=eq&value=[1,10]", "pointer = [1, 10]"),
        ("column=error&operator=some", "error is not null"),
    ):
        count = con.sql(f"select count(*) from candidates where {sql}").fetchall()[0][0]
        text = _text(client, f"view?view=candidates&{condition}")
        assert f"<dt>rows</dt><dd>{count:,}</dd>" in text
    assert "could not" in client.get(
        "view?view=candidates&column=query_id&operator=eq&value=x").text.lower()  # fmt: skip


@pytest.mark.long
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


@pytest.mark.long
def test_a_view_of_the_store_runs_in_the_sandbox_too(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, [candidate(0, 0, [1])])
    (store.path / "views").mkdir()
    (store.path / "views" / "huge.sql").write_text(
        "select len(repeat('x', 4000000000 + candidate)) as n from candidates"
    )
    board = Board(store)
    answer = _client(board).get("view?view=huge")
    assert answer.status_code == 400 and "memory" in answer.text.lower()
    board.close()


@pytest.mark.long
def test_a_download_holds_every_row(client: TestClient) -> None:
    found = {
        form: client.get("download", params={"sql": "from candidates", "form": form}).content
        for form in ("csv", "parquet")
    }
    assert len(found["csv"].splitlines()) >= 1 + 12 * 6  # a text may hold line ends
    rows = pq.read_table(io.BytesIO(found["parquet"]))
    assert rows.num_rows == 12 * 6 and rows["answer"][0].as_py() == EVIL
    assert client.get("download", params={"sql": "select 1", "form": "exe"}).status_code == 400


@pytest.mark.slow
def test_a_view_is_sorted_and_paged_by_its_sql(board: Board, client: TestClient) -> None:
    sql = "select logprob_score from candidates order by logprob_score limit 50"
    texts = [f"{row[0]:g}" for row in connect(board.store).sql(sql).fetchall()]
    text = _text(client, "view?view=candidates&sort=logprob_score&order=asc")
    assert re.findall(r'<td class="figure"><span class="cell">(-[\d.]+)</span>', text) == texts
    assert "Page 1 of 2" in text
    second = _text(client, "view?view=candidates&sort=logprob_score&order=asc&page=2")
    assert len(re.findall(">query \\d+</a>", second)) == 12 * 6 - 50


@pytest.mark.slow
def test_train_on_this_gives_a_command_that_means_these_rows(
    board: Board, client: TestClient
) -> None:
    text = _text(client, "view?view=beam")
    assert "--view beam --query-embeddings" in text
    text = _text(client, "view?view=beam&where=query_id:ge:6")
    assert "--view mine --query-embeddings" in text and "views/mine.sql</code>" in text
    sql = html.unescape(re.findall(r"<pre[^>]*><code>(select.*?)</code>", text, re.S)[0])
    rows = "from beam where query_id >= 6"
    (counts,) = connect(board.store).sql(
        f"select (select count(*) from ({sql})), (select count(*) {rows})"
    ).fetchall()  # fmt: skip
    assert counts[0] == counts[1] > 0
    assert "Train on this" not in _text(client, "view?view=runs")


@pytest.mark.slow
def test_a_query_has_its_candidates_by_reward(board: Board, client: TestClient) -> None:
    sql = "select correct + score from candidates where query_id = 5 order by 1 desc"
    rewards = [f"{row[0]:.3f}" for row in connect(board.store).sql(sql).fetchall()]
    text = _text(client, "query?dataset=d&split=train&id=5")
    assert re.findall(r'<div class="earned"><b>([^<]*)', text) == rewards
    other = _text(client, "query?dataset=d&split=train&id=5&mode=soft_only")
    assert re.findall(r'<div class="earned"><b>([^<]*)', other) != rewards
    assert re.findall(r'rel="(?:prev|next)" href="[^"]*id=(\d+)', text) == ["4", "6"]


@pytest.mark.long
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
    # every candidate is wrong, and the oracle of the evaluations found one that is right
    sql = "select count(*) from query_rewards where class = 'all_wrong'"
    ((wrong,),) = con.sql(sql).fetchall()
    assert len(re.findall("oracle 1.000", _text(client, "queries?filter=reach"))) == wrong > 0


def test_what_was_cut_from_an_answer_is_told_apart(client: TestClient) -> None:
    text = html.unescape(_text(client, "query?dataset=d&split=train&id=5"))
    assert f'<q><bdi>{EVIL}</bdi><del title="cut off"><bdi>, Question: </bdi></del></q>' in text


def test_a_query_has_what_each_selector_picked_and_every_prefix(client: TestClient) -> None:
    text = _text(client, "query?dataset=d&split=train&id=5")
    assert "The first k demonstrations alone" in text and "<td>0.250</td>" in text
    rows = re.findall(r'<th scope="row">(\w+)</th><td data-label="shots">(\d)', text)
    assert [name for name, _ in rows] == ["cell", "oracle", "random"] * 3


@pytest.mark.slow
def test_an_evaluation_leads_to_the_questions_two_selectors_disagree_on(
    board: Board, client: TestClient
) -> None:
    run = board.state().kind("evaluation")[0].run
    text = _text(client, f"evaluation?run={run}")
    assert ">cell − random</a>" in text and "+10.00" in text
    address = html.unescape(re.findall(r'href="(disagree[^"]*)"', text)[0])
    rows = (
        connect(board.store)
        .sql(f"""
        select query_id, a.accuracy - b.accuracy
        from evaluations as a inner join evaluations as b using (run, query_id)
        where run = '{run}' and a.selector = 'cell' and b.selector = 'random'
            and a.accuracy <> b.accuracy
        order by 2, 1
    """)
        .fetchall()
    )
    found = re.findall(r"\((\d+)\)</a>", _text(client, address))
    assert found == [str(row[0]) for row in rows]
    wrong = _text(client, f"disagree?run={run}&shots=1&only=1")
    both = [row["random"] == row["cell"] == 0 for row in _by_query(board)]
    assert f"<dt>questions</dt><dd>{sum(both)}</dd>" in wrong


def _by_query(board: Board) -> list[dict[str, float]]:
    named = selectors(int(board.state().kind("evaluation")[0].parameters["cell"]))
    return [{name: scores[q] for name, scores in named.items()} for q in range(12)]


def test_a_sweep_has_its_cells_by_accuracy_and_what_luck_gives(client: TestClient) -> None:
    text = _text(client, "sweep")
    assert "<dt>cells</dt><dd>3</dd>" in text and "by luck" in text
    shares = [sum(selectors(cell)["cell"]) / 12 for cell in (1, 2, 3)]
    shown = re.findall(r'data-label="accuracy" data-sort="([\d.]+)"', text)
    assert [float(share) for share in shown] == sorted(shares, reverse=True)


def test_trainings_lie_over_each_other(board: Board, client: TestClient) -> None:
    runs = [run.run for run in board.state().kind("training")]
    text = _text(client, "training?" + "&".join(f"run={run}" for run in runs))
    charts = [json.loads(html.unescape(c)) for c in re.findall(r'data-chart="([^"]*)"', text)]
    loss = next(chart for chart in charts if chart["label"] == "loss by step")
    lines = {line["name"].split()[0]: line["y"] for line in loss["lines"]}
    assert lines == {"first": [9, 8, 7, 6], "second": [8, 7, 6, 5]}


@pytest.mark.long
def test_a_comparison_is_that_of_lever_diff(board: Board, client: TestClient) -> None:
    done = diff(board.store, DiffRequest(a="beam", b="balanced"))
    text = _text(client, "compare?a=beam&b=balanced")
    assert (
        f'<th scope="row">only A has</th><td data-label="value" data-sort="{done.only_a}">' in text
    )
    assert "there is neither" in client.get("compare?a=beam&b=nowhere").text.lower()


@pytest.mark.long
def test_a_comparison_of_one_pair_has_no_interval(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    for name, accuracy in (("a", 0.0), ("b", 1.0)):
        scores = {"correct": int(accuracy), "score": accuracy}
        commit(store, [candidate(0, 0, [1, 2], **scores)], name=name)
    a, b = (run.run for run in store.runs())
    board = Board(store)
    text = _text(_client(board), f"compare?a={a}&b={b}")
    board.close()
    assert "+100.00 points" in text and "its 95 % interval" not in text


@pytest.mark.long
def test_an_audit_is_that_of_lever_audit(board: Board, client: TestClient) -> None:
    figures = audit(board.store, AuditRequest(view="beam")).figures
    text = _text(client, "audit?view=beam")
    for name, count in figures["classes"].items():
        assert f'<i class="class-{name}"></i>' in text and f"<b>{count}</b>" in text
    assert f"{figures['candidates']:,} rewards from string match" in text


@pytest.mark.long
def test_demonstrations_are_those_of_the_audit(board: Board, client: TestClient) -> None:
    sql = "select example_id, num_picks from demonstration_usage order by 2 desc, 1"
    rows = connect(board.store).sql(sql).fetchall()
    text = _text(client, "demonstrations")
    found = re.findall(r'd (\d+)</span></span></span></th><td [^>]*data-sort="(\d+)"', text)
    assert found == [(str(a), str(b)) for a, b in rows]
    assert "No example is a hub" in _text(client, "demonstrations?hubs=1")


def test_the_store_says_who_answered_and_what_was_made_from_what(client: TestClient) -> None:
    text = _text(client, "store")
    assert 'data-label="answered by" class="words">a model</td>' in text
    assert text.count('class="node ') == 8


@pytest.mark.long
def test_an_export_holds_no_form_and_no_dead_link(board: Board, tmp_path: Path) -> None:
    done = export(board, tmp_path / "pages", queries=3)
    files = {path.name: path.read_text() for path in (tmp_path / "pages").glob("*.html")}
    assert len(files) == done.pages and done.left_out > 0
    assert len([name for name in files if name.startswith("query-")]) == 3
    for text in files.values():
        assert "<form" not in text
        links = set(re.findall(r'href="([^"#]*)', text)) - {""}
        assert all((tmp_path / "pages" / html.unescape(link)).exists() for link in links)
    with pytest.raises(UsageError, match="holds something"):
        export(board, tmp_path / "pages", queries=3)


@pytest.mark.slow
def test_a_damaged_run_is_shown_and_left_out(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, [candidate(0, 0, [1], correct=1)])
    broken = commit(store, [candidate(1, 0, [2], correct=1)], name="b")
    file = broken.table_files("candidates")[0]
    board = Board(store)
    client = _client(board)
    assert "<dt>rows</dt><dd>2</dd>" in _text(client, "view")
    file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    text = _text(client, "view")
    assert "<dt>rows</dt><dd>1</dd>" in text and "1 damaged run is left out" in text
    assert "is not what was committed" in _text(client, f"run?run={broken.run}")
    board.close()


@pytest.mark.slow
def test_an_empty_store_says_what_to_do(tmp_path: Path) -> None:
    client = _client(Board(new_store(tmp_path)))
    assert "The store has no runs yet" in _text(client, "store")
    for name in PAGES_SHOWN:
        assert "lever" in client.get(name).text and client.get(name).status_code in (200, 400)


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_training_that_has_not_written_yet_is_waited_for(tmp_path: Path) -> None:
    board = Board(new_store(tmp_path), trainings=[tmp_path / "live"])
    text = _text(_client(board), "training")
    assert "data-follow" in text and "they come with the first epoch" in text
    (tmp_path / "live").mkdir()
    log = Log()
    log.epoch("rce", 1, {"val_loss": 2.0})
    pq.write_table(log.table(), tmp_path / "live" / "metrics.parquet")
    text = _text(_client(board), "training")
    assert "data-follow" in text and "val_loss" in text and "first epoch" not in text
