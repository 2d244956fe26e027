"""Several vector spaces of an item: texts of items, templates over them, vectors side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lever_data import catalog, connect
from lever_data.errors import LeverError, UsageError
from lever_data.sources.ingest import IngestOptions, ingest
from lever_data.store.store import Store
from lever_demo.files import write_world
from lever_demo.world import WorldSpec, make_world
from lever_train.embed.embed import embed
from lever_train.flow.run import mode
from lever_train.inputs.embeddings import load_embeddings
from lever_train.inputs.model_folder import model_folder
from lever_train.options.embed import EmbedRequest
from lever_train.options.pipeline import EmbedTable, load_pipeline
from tests.commands import lever
from tests.encoders import QUESTIONS, tiny_clip
from tests.stores import commit_examples

WORDS = ["cup, table", "tree", "dog, grass", "sea"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.create(tmp_path / "store")
    rows = [
        {
            "dataset": "d",
            "split": "train",
            "example_id": item,
            "question_id": item,
            "question": question,
            "answers": ["tea"],
            "answer": "tea",
        }
        for item, question in enumerate(QUESTIONS)
    ]
    commit_examples(store, rows)
    return store


def _ingest(store: Store, texts: object, name: str = "picture") -> None:
    path = store.path.parent / "texts.json"
    path.write_text(json.dumps(texts))
    list(ingest([path], store, IngestOptions(dataset="d", split="train", name=name)))


def _embed(store: Store, encoder: Path, template: str, name: str) -> torch.Tensor:
    request = EmbedRequest(
        store=store.path, encoder=str(encoder), features="text", template=template, name=name
    )
    embed(request)
    return load_embeddings(name, connect(store, only=["embeddings"]))


@pytest.mark.slow
def test_a_list_of_texts_becomes_a_relation(store: Store) -> None:
    _ingest(store, WORDS)
    rows = connect(store).execute("select name, example_id, text from texts order by 2").fetchall()
    assert rows == [("picture", item, text) for item, text in enumerate(WORDS)]


def test_texts_of_another_type_are_refused(store: Store) -> None:
    with pytest.raises(LeverError, match="this is not a list of texts"):
        _ingest(store, ["a", 1])


@pytest.mark.long
def test_a_template_reads_every_field(store: Store, tmp_path: Path) -> None:
    encoder = tiny_clip(tmp_path / "encoder")
    _ingest(store, WORDS)
    filled = _embed(store, encoder, "{question} {picture}", "both")
    _ingest(store, [f"{q} {w}" for q, w in zip(QUESTIONS, WORDS, strict=True)], "joined")
    assert torch.equal(filled, _embed(store, encoder, "{joined}", "same"))
    answers = _embed(store, encoder, "{answer}", "answer")
    assert torch.allclose(answers[0], answers[1]) and not torch.allclose(filled[0], filled[1])


@pytest.mark.long
def test_a_template_of_unknown_or_few_texts_is_refused(store: Store, tmp_path: Path) -> None:
    encoder = tiny_clip(tmp_path / "encoder")
    _ingest(store, WORDS[:2])
    for template, problem in (("{picture}", "has 2 texts"), ("{ocr}", "has 0 texts")):
        with pytest.raises(LeverError, match=problem):
            _embed(store, encoder, template, "x")
    with pytest.raises(UsageError, match="reads nothing of an item"):
        _embed(store, encoder, "words", "x")
    with pytest.raises(UsageError, match="need a --name"):
        EmbedRequest(template="{question}", features="text")


@pytest.mark.slow
def test_a_cosine_side_by_side_is_the_mean_of_cosines(store: Store, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(4, 3)).astype(np.float32))
    paths = [str(tmp_path / f"{name}.npy") for name in "ab"]
    con = connect(store)
    whole = load_embeddings(",".join(paths), con)
    parts = [torch.nn.functional.normalize(load_embeddings(p, con), dim=1) for p in paths]
    torch.testing.assert_close(whole @ whole.T, sum(p @ p.T for p in parts) / 2)
    np.save(tmp_path / "b.npy", np.eye(5, 3, dtype=np.float32) + 1)
    with pytest.raises(UsageError, match="side by side differ in rows"):
        load_embeddings(",".join(paths), con)


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="not installed"):
        model_folder("package:no-such-model")
    with pytest.raises(UsageError, match="holds 0 models"):
        model_folder("package:json")


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        ({"templates": {"q": "{question}"}}, "compared names spaces of templates"),
        ({"compared": ["q"]}, "compared names spaces of templates"),
        ({"templates": {"a": "{answer}"}, "compared": ["a"]}, "which a query has none of"),
    ],
)
def test_what_is_compared_is_a_template_without_answers(
    tables: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        EmbedTable(**tables)


@pytest.mark.parametrize(
    ("name", "compared", "texts"),
    [
        ("okvqa_features", ("question", "both"), {"words": "okvqa/picture_words_train.json.gz"}),
        ("okvqa_text_features", ("question",), {}),
    ],
)
def test_the_recipe_of_features_is_a_config(
    name: str, compared: tuple[str, ...], texts: dict[str, str]
) -> None:
    path = Path(__file__).resolve().parents[1] / "examples" / f"{name}.toml"
    config = load_pipeline(path)
    assert config.embed.compared == compared
    assert config.data.texts == {key: path.parent / file for key, file in texts.items()}
    assert set(config.train.model.pair_features) <= set(catalog.features())
    assert mode(config) == "dense (3 epochs)"


_CONFIG = """
[data]
dataset = "demo"
questions = "world/train_questions.json"
annotations = "world/train_annotations.json"
eval_questions = "world/val_questions.json"
eval_annotations = "world/val_annotations.json"
texts.words = "train.json"
eval_texts.words = "val.json"
[embed]
encoder = "package:tiny-encoder"
features = "text"
compared = ["question", "both"]
[embed.templates]
question = "{question}"
both = "{question} {words}"
answer = "{answer}"
[pool]
size = 8
[sft]
enabled = false
[generate]
shot_num = 1
num_beams = 8
temps = []
num_random = 0
[train.model]
selector = "features"
pair_features = ["vote", "cosine_question", "cosine_answer"]
votes = true
hidden = 8
[train.data]
split_ratio = 1.0
[train.dense]
objective = "pointwise"
epochs = 1
[train.run]
stage = "dense"
batch_size = 16
[eval]
shots = [1]
"""


@pytest.mark.long
def test_the_pipeline_embeds_every_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own encoder, texts, side by side pools, and a selector that reads features of pairs."""
    write_world(make_world(WorldSpec(train=60, held_out=12, pool=8)), tmp_path / "world")
    for split, count in (("train", 60), ("val", 12)):
        words = [QUESTIONS[i % len(QUESTIONS)] for i in range(count)]
        (tmp_path / f"{split}.json").write_text(json.dumps(words))
    tiny_clip(tmp_path / "tiny_encoder")
    monkeypatch.syspath_prepend(tmp_path)  # as an installed package that holds a model
    (tmp_path / "lever.toml").write_text(_CONFIG)
    lever("run", "--config", tmp_path / "lever.toml")
    board = json.loads((tmp_path / "lever-out" / "eval.json").read_text())
    shown = {row["selector"] for row in board["rows"]}
    assert shown == {"zero_shot", "random", "nearest", "vote", "dense", "oracle"}
    again = lever("run", "--config", tmp_path / "lever.toml")
    assert "skipped" in again.stderr and "it has not run yet" not in again.stderr
