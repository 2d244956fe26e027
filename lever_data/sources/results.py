"""Results files of the evaluation servers: predictions as a run that can be compared.

In goes ``[{"question_id": …, "answer": …}]`` as JSON, JSON lines or a zip archive of one (GQA
writes ``questionId`` and ``prediction``, VizWiz ``image``); out comes a run of kind
``evaluation``, scored by the official metric against the annotations in the store.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pyarrow as pa

from lever_data.errors import LeverError
from lever_data.items.items import official_id
from lever_data.items.prompts import Id
from lever_data.items.scoring import Scoring
from lever_data.items.task import stored_task
from lever_data.items.vqa_metric import few_annotators
from lever_data.readers import json_exact
from lever_data.readers.detect import zipped_json
from lever_data.readers.json_exact import Place
from lever_data.readers.json_object import Scanner
from lever_data.readers.source import Source
from lever_data.sources.fields import Int64, decode_typed
from lever_data.store import schema
from lever_data.store.store import Run, RunSpec, Store


class _Result(msgspec.Struct, gc=False):
    question_id: Int64 | str | None = None
    questionId: Int64 | str | None = None  # noqa: N815 - the name in the file
    image: str | None = None
    answer: str | None = None
    prediction: str | None = None


def ingest_results(
    source: Source, store: Store, spec: RunSpec, notice: Callable[[str], None]
) -> tuple[Run, bool]:
    """Score and commit the predictions of one file; returns the run, and whether it is new.

    Args:
        spec: with ``results``, the name of what predicted, and ``shots`` among its parameters.

    Raises:
        LeverError: a question is not in the store, has no annotation, or is answered twice.
    """
    items = _items(store, spec)
    scoring = Scoring(
        stored_task(store.runs(), spec.dataset, spec.split), [i[2] for i in items.values()]
    )
    parameters = spec.parameters | {"metric_version": scoring.name}
    spec = RunSpec(
        **{
            **vars(spec),
            "parameters": parameters,
            "parents": tuple(sorted({i[0] for i in items.values()})),
        }
    )
    if (known := store.find(spec)) is not None:
        return known, False
    predictions = read_results(source)
    if strangers := predictions.keys() - items.keys():
        raise LeverError(
            f"{len(strangers):,} of {len(predictions):,} questions are not in the store",
            where=str(source.path),
            value=f"question {next(q for q in predictions if q in strangers)}, in "
            f"{spec.dataset}/{spec.split}",
            hint="--dataset and --split name the questions that were asked",
        )
    truths = [items[q][2] for q in predictions]
    for question, truth in zip(predictions, truths, strict=True):
        if not truth:
            raise LeverError(
                "a question has no annotation in the store",
                where=f"question {question}",
                hint="`lever ingest QUESTIONS ANNOTATIONS` stores both",
            )
    said = [scoring.task.normalized(answer) for answer in predictions.values()]
    accuracy = scoring.score(said, truths)
    right = scoring.is_right(said, truths, accuracy)
    ids = [items[q][1] for q in predictions]
    with store.begin(spec) as writer:
        writer.write("evaluations", _table(spec, ids, said, (accuracy, right)))
        made = writer.commit({"accuracy": float(accuracy.mean()), "questions": len(items)})
    few = sum(len(truth) < 4 for truth in truths)
    if few and scoring.task.metric == "vqa-accuracy":
        notice(f"{source.path}: {few_annotators(few, len(truths))}")
    lacking = len(items) - len(predictions)
    if lacking:
        notice(f"{source.path}: {lacking:,} of {len(items):,} questions have no prediction")
    notice(f"{source.path}: accuracy {accuracy.mean():.2%} of {len(predictions):,} questions")
    return made, True


def read_results(source: Source) -> dict[Id, str]:
    """Predictions by question id, in file order.

    Raises:
        LeverError: not of this form, or a question is answered twice.
    """
    found: dict[Id, str] = {}
    decoder, name = msgspec.json.Decoder(_Result), str(source.path)
    with _text(source) as read:
        scanner = Scanner(read, name)
        for offset, data in _entries(scanner):
            place = Place(name, offset)
            value, _ = json_exact.parse(data, place)
            item: _Result = decode_typed(decoder, value, data, place)
            ids = (item.question_id, item.questionId, item.image)
            key = next((official_id(i) for i in ids if i is not None), None)
            said = item.prediction if item.answer is None else item.answer
            if key is None or said is None:
                raise place.error("a result needs question_id and answer", value=data[:80])
            if key in found:
                raise place.error("a question is answered twice", value=key)
            found[key] = said
    return found


@contextmanager
def _text(source: Source) -> Iterator[Callable[[], bytes]]:
    """Reads the text of the file, or of the one file in the archive, piece by piece."""
    inside = zipped_json(source)
    if inside is None:
        with source.reader() as reader:
            yield lambda: reader.read(1 << 18)
        return
    with zipfile.ZipFile(source.path) as archive, archive.open(inside) as file:
        yield lambda: file.read(1 << 18)


def _entries(scanner: Scanner) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the objects of a list, or of JSON lines."""
    scanner.skip_bom()
    if scanner.peek() != b"[":
        while scanner.peek():
            yield scanner.value()
        return
    going = scanner.enter(b"[", "a list: [ … ]")
    while going:
        yield scanner.value()
        going = scanner.more(b"]")
    scanner.finish()


def _items(store: Store, spec: RunSpec) -> dict[Id, tuple[str, int, tuple[str, ...]]]:
    """By question id: the run of examples, the example id, the annotators' answers."""
    from lever_data.relations.db import open_session

    con = open_session(store, only=["examples"]).con
    sql = (
        "select question_id, run, example_id, answers from examples "
        "where dataset = ? and split = ? order by example_id"
    )
    rows: list[tuple[Any, ...]] = con.execute(sql, [spec.dataset, spec.split]).fetchall()
    if not rows:
        raise LeverError(
            "the store has no questions to score these predictions by",
            where=f"{spec.dataset}/{spec.split}",
            hint="`lever ingest QUESTIONS ANNOTATIONS --dataset D --split S` first",
        )
    found = {}
    for question_id, run, example_id, answers in rows:
        found[official_id(question_id)] = (run, example_id, tuple(answers or ()))
    return found


def _table(spec: RunSpec, ids: list[int], said: list[str], verdict: tuple[Any, Any]) -> pa.Table:
    name, count = str(spec.parameters["results"]), len(ids)
    columns: dict[str, Any] = {
        "dataset": [spec.dataset] * count,
        "split": [spec.split] * count,
        "query_id": ids,
        "selector": [name] * count,
        "shots": [spec.parameters["shots"]] * count,
        "pointer": [[]] * count,
        "prediction": said,
        "accuracy": verdict[0],
        "correct": verdict[1].astype("int8"),
        "error": [None] * count,
        "scorer": ["unknown"] * count,
        "metric": [spec.parameters["metric_version"]] * count,
    }
    return pa.table(
        {f.name: pa.array(columns[f.name], f.type) for f in schema.EVALUATIONS},
        schema=schema.EVALUATIONS,
    )
