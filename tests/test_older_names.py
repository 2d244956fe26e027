"""Columns had other names: runs of that time, and queries, rewards and views that say them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lever_data import connect, older
from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import open_session
from lever_data.relations.query import query
from lever_data.relations.reward_spec import RewardSpec
from lever_data.relations.rewards import require_scores, with_todays_columns
from lever_data.report.audit import audit
from lever_data.report.check import check
from lever_data.report.options import AuditRequest, RescoreRequest
from lever_data.report.rescore import rescore
from lever_data.sources.export import export
from lever_data.sources.transfer import transfer
from lever_data.store.compact import compact
from lever_data.store.files import sha256_file
from lever_data.store.manifest import sealed, to_json
from lever_data.store.schema import EVALUATIONS
from lever_data.store.store import Run, RunSpec, Store

from .cases import long, long_except
from .stores import candidate, commit, commit_examples, new_store, table

SHOTS = [{"shot": 1, "correct": 0, "score": 0.25, "answer": "c", "eval_mode": "file"}]


@pytest.fixture(autouse=True)
def _nothing_told() -> None:
    older._tell_once.cache_clear()


def _rows(query_id: int) -> list[dict[str, Any]]:
    return [
        candidate(
            query_id,
            n,
            [n + 10],
            answer=word,
            generation=f"{word}, Question",
            correct=int(score > 0),
            score=score,
            expected_score=0.5 * n,
            token_f1=0.1,
            edit_sim=0.2,
            similarity=0.2,
            metric="vqa-accuracy-1",
            eval_mode="file",
            shot_scores=SHOTS if n else None,
        )
        for n, (word, score) in enumerate([("cat", 0.3), ("dog", 0.0), ("cow", 1.0)])
    ]


def _as_before(run: Run) -> None:
    """The run as it was written until schema 2: older names in its files, also of prefixes."""
    before = {name: old for old, name in older.NAMES.items()}
    manifest = json.loads((run.path / "manifest.json").read_text())
    for file in manifest["files"]:
        if file.startswith(("candidates/", "evaluations/")):
            rows = pq.read_table(run.path / file, partitioning=None)
            fields = [f.with_name(before.get(f.name, f.name)) for f in rows.schema]
            if "shot_scores" in rows.column_names:
                at = rows.schema.get_field_index("shot_scores")
                inner = rows.schema.field(at).type.value_field
                kind = pa.struct([f.with_name(before.get(f.name, f.name)) for f in inner.type])
                fields[at] = fields[at].with_type(pa.list_(inner.with_type(kind)))
            arrays = [
                pa.concat_arrays(c.chunks).view(f.type)
                for c, f in zip(rows.columns, fields, strict=True)
            ]
            old = pa.Table.from_arrays(arrays, schema=pa.schema(fields))
            assert any("vqa_" in f or f == "metric_version" for f in old.column_names)
            pq.write_table(old, run.path / file)
            manifest["files"][file] = sha256_file(run.path / file)
    manifest = {k: v for k, v in manifest.items() if k != "seal"} | {"schema_version": 1}
    (run.path / "manifest.json").write_bytes(to_json(sealed(manifest)))


def _commit_evaluation(store: Store) -> Run:
    row = {"dataset": "d", "split": "train", "query_id": 1, "selector": "zero_shot", "shots": 0,
           "pointer": [], "scorer": "m", "metric": "vqa"}  # fmt: skip
    with store.begin(RunSpec(kind="evaluation", dataset="d", split="train")) as writer:
        writer.write("evaluations", table(EVALUATIONS, [row]))
        return writer.commit()


def _stores(tmp_path: Path, mixed: bool) -> tuple[Store, Store]:
    """Two stores of the same runs: as written now, and with all (or one) of them from before."""
    found = []
    for name in ("now", "before"):
        (tmp_path / name).mkdir()
        store = new_store(tmp_path / name)
        runs = [commit(store, _rows(0)), commit(store, _rows(1), name="b")]
        runs.append(commit(store, [candidate(2, 0, [7, 8], info_score=0.5)], kind="beam"))
        runs.append(_commit_evaluation(store))
        if name == "before":
            for run in runs[: 1 if mixed else None]:
                _as_before(run)
        found.append(store)
    return found[0], found[1]


RELATIONS = ("all_candidates", "stg_beams", "evaluations", "scored", "mode_rewards", "balanced")


@pytest.mark.long
@pytest.mark.parametrize("mixed", long_except([False, True], True))
def test_runs_of_before_are_read_as_runs_of_now(tmp_path: Path, mixed: bool) -> None:
    now, before = _stores(tmp_path, mixed)
    both = connect(now), connect(before)
    for name in RELATIONS:
        (a, types), (b, older_types) = (
            (
                con.execute(f"from {name} order by all").fetchall(),
                con.execute(f"describe {name}").fetchall(),
            )
            for con in both
        )
        assert types == older_types and a == b and (a or name == "balanced"), name
    assert not check(before).problems
    with duckdb.connect() as shell:
        script = (before.path / "views.sql").read_text().replace("glob('lever.json')", "(select 1)")
        shell.execute(script.replace("then '.'", f"then '{before.path}'"))
        sql = "select run, query_id, candidate, answer, correct, shot_scores from candidates"
        rows = [c.execute(f"{sql} order by all").fetchall() for c in (shell, both[0])]
        assert rows[0] == rows[1]


@pytest.mark.long
@pytest.mark.parametrize("mixed", long_except([False, True], True))
def test_runs_of_before_are_audited_as_runs_of_now(tmp_path: Path, mixed: bool) -> None:
    audits = [audit(store, AuditRequest()).figures for store in _stores(tmp_path, mixed)]
    for figures in audits:
        del figures["inputs"]  # digests of the manifests
    assert audits[0] == audits[1]


@pytest.mark.slow
def test_runs_of_both_times_become_one(tmp_path: Path) -> None:
    now, before = _stores(tmp_path, mixed=True)
    found = []
    for store in (now, before):
        assert len(compact(store)) == 1
        con = connect(store, only=["candidates"])
        found.append(con.execute("select * exclude (run) from candidates order by all").fetchall())
    assert found[0] == found[1] and len(found[0]) == 6


@pytest.mark.long
def test_a_run_is_the_same_whenever_it_was_written(tmp_path: Path) -> None:
    """A copy takes what is there, though its bytes are others."""
    now, before = _stores(tmp_path, mixed=False)
    assert [run.run for run in now.runs()] == [run.run for run in before.runs()]
    for source, target in ((now, before), (before, now)):
        assert not any(one.is_new for one in transfer(source, target, (), print))
    other = Store.create(tmp_path / "other")
    assert all(one.is_new for one in transfer(before, other, (), print))
    assert all(run.has_older_names for run in other.runs()) and not check(other).problems


@pytest.mark.long
def test_a_run_of_before_is_exported_and_rescored_as_one_of_now(tmp_path: Path) -> None:
    now, before = _stores(tmp_path, mixed=True)
    item = {"dataset": "d", "split": "train", "question": "?", "answers": ["dog"] * 10}
    files, scores = [], []
    for store in (now, before):
        commit_examples(store, [item | {"example_id": n, "question_id": n} for n in range(20)])
        run = store.runs()[0].run
        export(store, run, tmp_path / "out.json")
        file = json.loads((tmp_path / "out.json").read_bytes())
        files.append(file["0"])
        made = rescore(store, RescoreRequest(run=run)).run
        assert not made.has_older_names
        with connect(store, runs=[made.run]) as con:
            sql = "select score, correct, shot_scores from stg_candidates order by candidate"
            scores.append(con.execute(sql).fetchall())
    assert files[0] == files[1] and scores[0] == scores[1]
    last = files[1]["pointer_candidates"][2]
    assert (last["vqa_pred_answer"], last["vqa_acc_score"]) == ("cow", 1.0)
    assert last["shot_scores"][0]["vqa_acc_score"] == 0.25
    assert not last.keys() & {*older.NAMES.values()}


def _asked(store: Store, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    with query(store.path, sql) as reader:
        found = reader.read_all()
    return found.column_names, [tuple(row.values()) for row in found.to_pylist()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sql", "names"),
    [
        ("select gen_method, avg(vqa_correct) from all_candidates group by 1", ["vqa_correct"]),
        long("select {name} as share from all_candidates", ["vqa_acc_score"]),
        long('select "vqa_correct" as correct from beam where VQA_Correct = 1', ["vqa_correct"]),
        long(
            "select [s.vqa_acc_score for s in shot_scores] as s from candidates", ["vqa_acc_score"]
        ),
        long(
            "select 'ü', vqa_correct, vqa_gt_prob from stg_candidates",
            ["vqa_correct", "vqa_gt_prob"],
        ),
        long("select min(metric_version) as m from evaluations", ["metric_version"]),
    ],
)
def test_a_query_with_an_older_name_gets_its_figure_and_is_told(
    tmp_path: Path, sql: str, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = _stores(tmp_path, mixed=True)
    sql = sql.replace("{name}", "vqa_acc_score")
    new = sql
    for name in (*names, "VQA_Correct"):
        new = new.replace(name, older.NAMES[name.lower()])
    asked, expected = _asked(store, sql + " order by all"), _asked(store, new + " order by all")
    assert asked[1] == expected[1]
    assert [n.replace("vqa_", "") for n in asked[0]] == [
        n.replace("expected_score", "gt_prob").replace("avg(score)", "avg(acc_score)")
        for n in expected[0]
    ]
    assert [r.getMessage() for r in caplog.records] == [
        f"{name} is called {older.NAMES[name]} now" for name in names
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sql",
    [
        "select 'vqa_correct' as x, count(*) from candidates /* vqa_correct */ group by 1",
        long(
            "with v as (select correct as vqa_correct from candidates) "
            "select sum(vqa_correct) from v"
        ),
    ],
)
def test_a_query_that_only_looks_like_it_is_left_alone(
    tmp_path: Path, sql: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = _stores(tmp_path, mixed=True)
    assert len(_asked(store, sql)[1]) == 1 and not caplog.records


@pytest.mark.long
def test_where_the_column_is_not_the_error_says_the_name_of_today(tmp_path: Path) -> None:
    store, _ = _stores(tmp_path, mixed=True)
    with pytest.raises(LeverError, match="vqa_correct") as caught:
        _asked(store, "select vqa_correct from queries")
    assert caught.value.hint == "vqa_correct is called correct now"
    assert "LINE" not in caught.value.what
    with pytest.raises(UsageError, match="no such view any more") as gone:
        _asked(store, "select correct from answers")
    assert "all_candidates" in str(gone.value.hint)


@pytest.mark.long
def test_rewards_and_views_of_ones_own_keep_their_older_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = _stores(tmp_path, mixed=True)
    folder = store.path / "views"
    folder.mkdir()
    (folder / "turned.sql").write_text(
        "select * replace (1 - vqa_correct as vqa_correct) from all_candidates"
    )
    (folder / "own.sql").write_text("select *, 3 as vqa_rel_score from all_candidates")
    con = open_session(store).con
    turned = con.execute("select sum(correct) from turned").fetchall()
    assert turned == con.execute("select sum(1 - correct) from all_candidates").fetchall()
    text = "vqa_correct + 0.5 * vqa_gt_prob"
    spec = with_todays_columns(con, ["turned"], RewardSpec(expression=text))
    assert spec.expression == "correct + 0.5 * expected_score"
    require_scores(con, "turned", spec)
    own = with_todays_columns(con, ["own"], RewardSpec(expression="vqa_rel_score + vqa_correct"))
    assert own.expression == "vqa_rel_score + correct"
    assert len(caplog.records) == 2  # once a name
    with caplog.at_level(logging.ERROR):
        both = [
            audit(store, AuditRequest(reward=RewardSpec(expression=said))).figures["oracle"]
            for said in (text, "correct + 0.5 * expected_score")
        ]
    assert both[0] == both[1]


@pytest.mark.long
def test_a_view_that_gives_an_older_column_of_its_own_is_told(tmp_path: Path) -> None:
    store, _ = _stores(tmp_path, mixed=False)
    (store.path / "views").mkdir()
    sql = "select * exclude (correct, score), 1 as vqa_correct, 1.0 as vqa_acc_score from beam"
    (store.path / "views" / "own.sql").write_text(sql)
    with pytest.raises(LeverError, match="no column for the reward") as caught:
        audit(store, AuditRequest(view="own"))
    assert "vqa_correct is called correct now" in str(caught.value.hint)
