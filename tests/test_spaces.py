"""Several vector spaces of an item: texts of items, templates over them, vectors side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lever_data import connect
from lever_data.errors import LeverError, UsageError
from lever_data.sources.ingest import IngestOptions, ingest
from lever_data.store.store import Store
from lever_train.embed.embed import embed
from lever_train.inputs.embeddings import load_embeddings
from lever_train.inputs.model_folder import model_folder
from lever_train.options.embed import EmbedRequest
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
    return load_embeddings(name, connect(store))


def test_a_list_of_texts_becomes_a_relation(store: Store) -> None:
    _ingest(store, WORDS)
    rows = connect(store).execute("select name, example_id, text from texts order by 2").fetchall()
    assert rows == [("picture", item, text) for item, text in enumerate(WORDS)]


def test_texts_of_another_type_are_refused(store: Store) -> None:
    with pytest.raises(LeverError, match="this is not a list of texts"):
        _ingest(store, ["a", 1])


def test_a_template_reads_every_field(store: Store, tmp_path: Path) -> None:
    encoder = tiny_clip(tmp_path / "encoder")
    _ingest(store, WORDS)
    filled = _embed(store, encoder, "{question} {picture}", "both")
    _ingest(store, [f"{q} {w}" for q, w in zip(QUESTIONS, WORDS, strict=True)], "joined")
    assert torch.equal(filled, _embed(store, encoder, "{joined}", "same"))
    answers = _embed(store, encoder, "{answer}", "answer")
    assert torch.allclose(answers[0], answers[1]) and not torch.allclose(filled[0], filled[1])


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


def test_a_cosine_side_by_side_is_the_mean_of_cosines(store: Store, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(4, 3)).astype(np.float32))
    paths = [str(tmp_path / f"{name}.npy") for name in "ab"]
    con = connect(store)
    whole = load_embeddings(",".join(paths), con)
    parts = [torch.nn.functional.normalize(load_embeddings(p, con), dim=1) for p in paths]
    torch.testing.assert_close(whole @ whole.T, sum(p @ p.T for p in parts) / 2)
    np.save(tmp_path / "b.npy", np.ones((5, 3), np.float32))
    with pytest.raises(UsageError, match="side by side differ in rows"):
        load_embeddings(",".join(paths), con)


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="not installed"):
        model_folder("package:no-such-model")
    with pytest.raises(UsageError, match="holds 0 models"):
        model_folder("package:json")
