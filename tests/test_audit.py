"""`lever audit`: figures, gates, errors a newcomer understands, and real data counted apart."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import open_session
from lever_data.relations.reward_spec import RewardSpec
from lever_data.report.audit import audit, audit_views, audited
from lever_data.report.gate import parse_gate, require_passed
from lever_data.report.options import AuditRequest
from lever_data.report.scored import put_settings
from lever_data.report.verdict import verdict
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.files import write_json
from lever_data.store.store import Store
from tests.audits import KEYS, rows
from tests.cases import long
from tests.shared_data import OKVQA, needs_shared
from tests.stores import candidate, commit, commit_examples, new_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = new_store(tmp_path_factory.mktemp("audit"))
    commit(made, rows())
    return made


@pytest.mark.slow
def test_the_figures(store: Store) -> None:
    figures = audit(store, AuditRequest()).figures
    assert set(figures) >= KEYS
    assert (figures["view"], figures["reward_mode"]) == ("all_candidates", "hard_plus_soft")
    assert (figures["queries"], figures["candidates"]) == (2, 4)
    assert figures["classes"] == {"mixed": 1, "all_wrong": 1, "all_right": 0, "tied": 0}
    assert (figures["fallback_share"], figures["unknown_share"]) == (0.25, 0.25)
    assert (figures["failed_share"], figures["missing_share"]) == (0.2, 0.25)
    assert (figures["oracle_gap"], figures["mean_reward"]) == (2.0, 0.5)
    assert [row["gen_method"] for row in figures["by_gen_method"]] == ["beam", "sample"]
    assert json.loads(json.dumps(figures)) == figures


@pytest.mark.long
def test_the_sql_shown_can_be_run(store: Store) -> None:
    found = audit(store, AuditRequest(view="beam_sample"))
    con = open_session(store, only=["beam_sample"]).con
    rows = con.execute(f"select count(*), avg(reward) from ({found.sql['scored']})").fetchall()
    assert rows == [(found.figures["candidates"], found.figures["mean_reward"])]


@pytest.mark.slow
def test_figures_are_the_same_twice_and_computed_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = audit(store, AuditRequest())
    with audited(store, AuditRequest()) as (_, computed):
        assert vars(computed) == vars(first)
    with monkeypatch.context() as patch:
        patch.delattr("lever_data.report.audit._audit")
        assert vars(audit(store, AuditRequest())) == vars(first)


@pytest.mark.long
def test_remembered_figures_are_of_the_same_runs_view_reward_and_policy(tmp_path: Path) -> None:
    made = new_store(tmp_path)
    run = commit(made, rows()).run
    (made.path / "views").mkdir()
    (made.path / "views" / "mine.sql").write_text("from all_candidates")
    mine = AuditRequest(view="mine")
    assert audit(made, mine).figures["candidates"] == 4
    (made.path / "views" / "mine.sql").write_text("from all_candidates where query_id = 0")
    shown = audit(made, mine).figures["candidates"]
    assert shown == sum(not row.get("eval_failed") and row["query_id"] == 0 for row in rows()) < 4
    doubled = AuditRequest(reward=RewardSpec(hard_weight=2.0))
    assert audit(made, doubled).figures != audit(made, AuditRequest()).figures
    more = [candidate(9, i, [i + 1], correct=1, score=1.0) for i in range(3)]
    commit(made, more, name="b")
    assert audit(made, AuditRequest()).figures["candidates"] == 7
    assert audit(made, AuditRequest(runs=(run,))).figures["candidates"] == 4


@pytest.mark.long
def test_an_expression_is_a_reward(store: Store) -> None:
    text = "coalesce(correct, 0) + 0.5 * coalesce(expected_score, 0)"
    figures = audit(store, AuditRequest(reward=RewardSpec(expression=text))).figures
    assert (figures["reward_mode"], figures["reward"]) == ("expression", text)
    assert (figures["missing_share"], figures["mean_reward"]) == (0.0, (1 + 0.25) / 4)
    assert figures["classes"]["mixed"] == 2
    assert text in [row["reward_mode"] for row in figures["reward_modes"]]


@pytest.mark.slow
def test_missing_scores_are_told(store: Store) -> None:
    spec = RewardSpec(expression="expected_score")
    figures = audit(store, AuditRequest(reward=spec)).figures
    assert figures["missing_share"] == 0.75
    assert "75.0 % lack a score, which counts as 0" in verdict(figures)[1].text


@pytest.mark.slow
def test_few_annotators_and_string_matched_shots_are_said(tmp_path: Path) -> None:
    """A row is official, a shorter prompt of it is not: multi_shot would train on that."""
    made = new_store(tmp_path)
    official = {"eval_mode": "file", "correct": 1, "score": 0.67}
    shot = {"shot": 1, "correct": 1, "score": 1.0, "eval_mode": "fallback"}
    unread = {"expected_score": None, "answer": "tea"}
    commit(
        made,
        [
            candidate(0, 0, [1, 2], **official, shot_scores=[shot | unread]),
            candidate(1, 0, [0, 2], **official),
        ],
    )
    place = {"dataset": "d", "split": "train", "question": "?", "image_id": 1}
    commit_examples(
        made,
        [
            {**place, "example_id": i, "question_id": i, "answers": ["tea"] * n, "answer": "tea"}
            for i, n in ((0, 3), (1, 4), (2, 10))
        ],
    )
    figures = audit(made, AuditRequest()).figures
    assert (figures["fallback_share"], figures["fallback_shots_share"]) == (0.0, 0.5)
    said = " ".join(finding.text for finding in verdict(figures))
    assert "50.0 % hold a shorter prompt scored by string match" in said
    assert "1 of 2 questions have one to three annotators" in said
    assert "at most 0, 0.33 or 0.67 with one, two or three" in said
    with pytest.raises(LeverError, match="fallback_shots_share"):
        require_passed([parse_gate("fallback_shots_share > 0.1")], [figures])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "share"),
    [
        long(RewardSpec(mode="legacy", reward_alpha=1, use_logprob=True), 0.25),
        long(RewardSpec(mode="legacy", reward_beta=1), 0.25),
        long(RewardSpec(mode="hard_plus_gtprob_plus_rel", soft_weight=0, hard_weight=0), 0.5),
        long(RewardSpec(mode="hard01_plus_gtprob", soft_weight=0), 0.25),
        (RewardSpec(mode="hybrid", hybrid_alpha=1), 0.75),
    ],
)
def test_missing_is_what_the_reward_counts_as_0(
    tmp_path: Path, spec: RewardSpec, share: float
) -> None:
    """A value with a substitute, without weight, or that a right answer needs not, is none."""
    made = new_store(tmp_path)
    commit(
        made,
        [
            candidate(0, 0, [1], correct=1, beam_score=2.0),
            candidate(0, 1, [2], correct=0, similarity=0.5, logprob_score=-1.0),
            candidate(0, 2, [3], score=0.6, logprob_score=-1.0),
            candidate(0, 3, [4], correct=0) if spec.mode != "legacy" else candidate(0, 3, [4]),
        ],
    )
    assert audit(made, AuditRequest(reward=spec)).figures["missing_share"] == share


@pytest.mark.slow
@pytest.mark.parametrize("text", ["correct / 0", long("'-inf'::double"), long("'nan'::double")])
def test_a_reward_that_is_not_finite(store: Store, text: str) -> None:
    spec = RewardSpec(expression=text)
    with pytest.raises(LeverError, match=r"not a finite number, in . candidates") as caught:
        audit(store, AuditRequest(reward=spec))
    assert str(caught.value.where) == "all_candidates, query 0"


def test_json_is_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"mean_reward": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (RewardSpec(mode="legacy"), "reward_alpha, reward_beta"),
        (RewardSpec(mode="hard_only", hard_weight=0), "hard_weight"),
    ],
)
def test_a_reward_that_weighs_nothing(store: Store, spec: RewardSpec, found: str) -> None:
    with pytest.raises(UsageError, match="weighs nothing") as caught:
        audit(store, AuditRequest(reward=spec))
    assert caught.value.hint == found


@pytest.mark.parametrize(
    ("spec", "largest"),
    [
        (RewardSpec(), 2.0),
        (RewardSpec(hard_weight=2, soft_weight=0.5), 2.5),
        (RewardSpec(mode="separated"), 3.0),
        (RewardSpec(mode="hard_plus_gtprob_plus_rel"), 2.0),
        (RewardSpec(mode="hard_plus_gtprob_plus_rel", hard_weight=0, rel_weight=3), 4.0),
        (RewardSpec(soft_weight=-1), 1.0),
        (RewardSpec(hard_weight=50), 5.0),
        (RewardSpec(mode="hybrid", hybrid_alpha=0.25), 1.75),
        (RewardSpec(mode="multi_shot"), 2.0),
        (RewardSpec(mode="multi_shot", shot_weights=(0.5, 0.3, 0.2)), 2.0),
        (RewardSpec(mode="multi_shot", shot_weights=(1.5, -0.5)), 3.0),
    ],
)
def test_the_largest_reward_of_a_mode(store: Store, spec: RewardSpec, largest: float) -> None:
    con = open_session(store, only=["runs"]).con
    put_settings(con, spec)
    assert con.execute("select max_reward from audit_settings").fetchall() == [(largest,)]


@pytest.mark.long
def test_hybrid_over_several_runs(tmp_path: Path) -> None:
    """As a view, the information term took minutes once two runs overlapped."""
    made = new_store(tmp_path)
    for name in ("a", "b"):
        scores = [{**row, "beam_score": 0.1 * row["candidate"]} for row in rows()]
        commit(made, scores, name=name)
    figures = audit(made, AuditRequest(reward=RewardSpec(mode="hybrid"))).figures
    assert figures["classes"]["mixed"] == 2


@pytest.mark.slow
def test_a_policy_of_ones_own(tmp_path: Path) -> None:
    made = new_store(tmp_path)
    commit(made, rows())
    (made.path / "views").mkdir()
    (made.path / "views" / "mine.sql").write_text(
        "select dataset, split, query_id, pointer, -0.5 as logprob from all_candidates"
    )
    found = audit(made, AuditRequest(policy="mine")).figures["importance_weights"]
    assert [(row["num_drawn"], row["num_weighted"]) for row in found] == [(1, 1)]


def test_a_policy_without_its_columns(store: Store) -> None:
    with pytest.raises(LeverError, match="the policy has no column logprob; at beam") as caught:
        audit(store, AuditRequest(policy="beam"))
    assert "dataset, split, query_id, pointer, logprob" in str(caught.value.hint)


@pytest.mark.long
def test_a_users_view_without_what_only_diagnostics_read(tmp_path: Path) -> None:
    made = new_store(tmp_path)
    commit(made, rows())
    (made.path / "views").mkdir()
    (made.path / "views" / "narrow.sql").write_text(
        "select run, dataset, split, query_id, candidate, pointer, gen_method, eval_mode, "
        "eval_failed, correct, score from candidates"
    )
    figures = audit(made, AuditRequest(view="narrow")).figures
    assert (figures["candidates"], figures["oracle_gap"]) == (4, None)
    assert figures["logprob_vs_reward"] == []


@pytest.mark.long
def test_a_users_view_and_policy_that_read_diagnostics(tmp_path: Path) -> None:
    """They read those of all_candidates; the audit's own stand beside them."""
    made = new_store(tmp_path)
    commit(made, rows())
    (made.path / "views").mkdir()
    (made.path / "views" / "mixed.sql").write_text(
        "select c.* from all_candidates as c semi join "
        "(select * from query_rewards where class = 'mixed') using (dataset, split, query_id)"
    )
    found = audit(made, AuditRequest(view="mixed", policy="policy_logprobs"))
    assert found.figures["classes"] == {"mixed": 1, "all_wrong": 0, "all_right": 0, "tied": 0}
    assert 'from main."mixed"' in found.sql["scored"]


@pytest.mark.long
def test_views_side_by_side(store: Store) -> None:
    found = audit_views(store, AuditRequest(), ["beam", "beam_sample"])
    assert [a.figures["candidates"] for a in found] == [3, 4]
    assert [a.figures["classes"]["mixed"] for a in found] == [0, 1]


def test_a_store_without_runs(tmp_path: Path) -> None:
    with pytest.raises(LeverError, match="no runs yet, so there is nothing to audit") as caught:
        audit(new_store(tmp_path), AuditRequest())
    assert "lever ingest" in str(caught.value.hint)


def test_an_empty_view(tmp_path: Path) -> None:
    made = new_store(tmp_path)
    commit(made, rows()[:1])
    with pytest.raises(LeverError, match="the view holds no candidates") as caught:
        audit(made, AuditRequest(view="balanced"))
    assert "lever views" in str(caught.value.hint)


@pytest.mark.slow
def test_a_view_emptied_by_pointers_that_hold_their_own_query(tmp_path: Path) -> None:
    made = new_store(tmp_path)
    commit(made, [candidate(3, 0, [3, 1], correct=1, score=1.0)])
    with pytest.raises(LeverError, match="the view holds no candidates") as caught:
        audit(made, AuditRequest())
    assert "answer in the prompt, are left out: 1 (view own_pointers)" in str(caught.value.hint)


@pytest.mark.slow
def test_a_view_that_is_not_for_training(store: Store) -> None:
    with pytest.raises(LeverError, match="not made for training: it has no column candidate"):
        audit(store, AuditRequest(view="queries"))
    with pytest.raises(UsageError, match="no such view") as caught:
        audit(store, AuditRequest(view="beem"))
    assert "did you mean beam?" in str(caught.value.hint)


@pytest.mark.slow
def test_a_reward_that_cannot_be_computed(store: Store) -> None:
    with pytest.raises(LeverError, match="null in every row") as caught:
        audit(store, AuditRequest(reward=RewardSpec(mode="hard_plus_gtprob_plus_rel")))
    assert "lever rescore" in str(caught.value.hint)
    with pytest.raises(LeverError, match="cannot be computed over this view") as caught:
        audit(store, AuditRequest(reward=RewardSpec(expression="vqa_corect + 1")))
    assert "correct" in str(caught.value.hint)


@pytest.mark.long
@needs_shared
def test_okvqa_agrees_with_an_independent_count(tmp_path: Path) -> None:
    source = OKVQA / "rl_data_TextSimSampler_NearestDemo.json.gz"
    store = Store.create(tmp_path / "store")
    for _ in ingest([source], store, IngestOptions(dataset="okvqa", split="train")):
        pass
    figures = audit(store, AuditRequest()).figures
    classes: Counter[str] = Counter()
    methods: Counter[str] = Counter()
    fallback = 0
    for value in json.loads(gzip.decompress(source.read_bytes())).values():
        rewards = [c["vqa_correct"] + c["vqa_acc_score"] for c in value["pointer_candidates"]]
        methods.update(c["gen_method"] for c in value["pointer_candidates"])
        fallback += sum(c["vqa_eval_mode"] == "fallback" for c in value["pointer_candidates"])
        kind = {0: "all_wrong", 2: "all_right"}.get(max(rewards), "tied")
        classes["mixed" if min(rewards) < max(rewards) else kind] += 1
    assert sum(classes.values()) == 9009
    assert Counter(figures["classes"]) == classes
    assert figures["candidates"] == methods.total() == 88_827
    assert {r["gen_method"]: r["num_candidates"] for r in figures["by_gen_method"]} == methods
    assert figures["fallback_share"] == pytest.approx(fallback / methods.total())
