"""The real data in the store: counts, scorers, joins, and every RL file back equal."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lever_data.sources.export import export
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.store import Run, Store
from tests.cases import long_except
from tests.shared_data import OKVQA, needs_shared

pytestmark = needs_shared

BEAM = (
    "vqa-okvqa-NearestDemo-TextSimSampler-scorer_infoscore-beam_size_5-max_shot_2-"
    "candidate_num_64-sample_num_800.json"
)
LARGE = "rl_data_TextSimSampler_NearestDemo.json.gz"
RL = {
    LARGE: (88_827, 9_009),
    "rl_data_no_eval_mode_800.json": (7_886, 800),
    "rl_data_v4_strict_400.json": (3_826, 400),
    BEAM: (4_000, 800),
}
FILES = [
    *RL,
    "OpenEnded_mscoco_train2014_questions.json.gz",
    "mscoco_train2014_annotations.json.gz",
    "train_question_embeddings.pt",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Training files, by their names (questions and annotations: by that of the questions)."""
    return _ingested(tmp_path_factory.mktemp("okvqa"), [f for f in FILES if f != LARGE])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The one that takes more than the others together."""
    return _ingested(tmp_path_factory.mktemp("large"), [LARGE])


def _ingested(folder: Path, files: list[str]) -> dict[str, Run]:
    store = Store.create(folder / "store")
    done = ingest([OKVQA / f for f in files], store, IngestOptions(dataset="okvqa", split="train"))
    names = [f for f in files if "annotations" not in f]
    return {name: d.run for name, d in zip(names, done, strict=True)}


def load(name: str) -> Any:
    path = OKVQA / name
    return json.loads(
        gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    )


def column(run: Run, table: str, name: str) -> list[Any]:
    return [v for f in run.table_files(table) for v in pq.read_table(f)[name].to_pylist()]


@pytest.mark.slow
@pytest.mark.parametrize("name", long_except(RL, *[n for n in RL if "TextSim" not in n]))
def test_counts_and_the_way_back(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run: Run = request.getfixturevalue("large" if name == LARGE else "runs")[name]
    assert (run.rows["candidates"], run.rows["queries"]) == RL[name]
    out = tmp_path / "back.json.gz"
    export(Store.open(run.path.parents[1]), run.run, out)
    assert json.loads(gzip.decompress(out.read_bytes())) == load(name)


@pytest.mark.long
def test_columns_agree_with_a_count_over_the_json(large: dict[str, Run]) -> None:
    run = large[LARGE]
    candidates = [c for v in load(LARGE).values() for c in v["pointer_candidates"]]
    for key, found in (("gen_method", "gen_method"), ("vqa_eval_mode", "eval_mode")):
        counted = Counter(c[key] for c in candidates)
        assert Counter(column(run, "candidates", found)) == counted
    assert column(run, "candidates", "score") == [c["vqa_acc_score"] for c in candidates]
    assert set(column(run, "candidates", "extra")) == {None}


def test_the_strict_file_has_its_scorer_text_and_pools(runs: dict[str, Run]) -> None:
    run = runs["rl_data_v4_strict_400.json"]
    source = load("rl_data_v4_strict_400.json")
    assert set(column(run, "candidates", "scorer")) == {"nearest-demonstration"}
    assert run.details["top"]["_meta"] == source["_meta"]
    assert run.details["generation"] == 3
    assert column(run, "queries", "candidate_pool") == [
        source[str(i)]["candidate_pool_indices"] for i in range(400)
    ]


@pytest.mark.slow
def test_examples_hold_questions_and_answers(runs: dict[str, Run]) -> None:
    run = runs["OpenEnded_mscoco_train2014_questions.json.gz"]
    questions = load("OpenEnded_mscoco_train2014_questions.json.gz")["questions"]
    answers = {
        a["question_id"]: [x["answer"] for x in a["answers"]]
        for a in load("mscoco_train2014_annotations.json.gz")["annotations"]
    }
    assert column(run, "examples", "question") == [q["question"] for q in questions]
    assert column(run, "examples", "answers") == [answers[q["question_id"]] for q in questions]
    assert column(run, "examples", "example_id") == list(range(9_009))
    assert column(run, "examples", "answer")[0] == "pony tail"


@pytest.mark.slow
def test_embeddings_are_those_torch_reads(runs: dict[str, Run]) -> None:
    run = runs["train_question_embeddings.pt"]
    (path,) = run.table_files("embeddings")
    vectors = pq.read_table(path)["vector"].combine_chunks().flatten().to_numpy()
    expected = torch.load(OKVQA / "train_question_embeddings.pt", weights_only=True).float()
    assert np.array_equal(vectors.reshape(9_009, 384), expected.numpy())


@pytest.mark.slow
def test_the_validation_files_name_their_split(tmp_path: Path) -> None:
    files = ["OpenEnded_mscoco_val2014_questions.json.gz", "mscoco_val2014_annotations.json.gz"]
    store = Store.create(tmp_path / "store")
    (done,) = ingest([OKVQA / f for f in files], store, IngestOptions(dataset="okvqa"))
    assert (done.run.split, done.run.num_rows) == ("val", 5_046)
