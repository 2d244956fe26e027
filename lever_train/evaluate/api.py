"""``eval`` and ``predict`` as library calls: checkpoints on held-out questions of a store.

In go an :class:`EvalRequest`; out come a :class:`Scoreboard`, committed to the store as a run of
kind ``evaluation``, or the picks alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from lever_data.errors import UsageError
from lever_data.items.items import ITEM_RELATIONS, only_dataset, require_images
from lever_data.items.prompts import Id, Item
from lever_data.items.task import Task, require_shown, stored_task
from lever_data.relations.db import connect
from lever_data.store.schema import id_array
from lever_data.store.store import Run, RunSpec, Store
from lever_train.evaluate.baselines import greedy
from lever_train.evaluate.evaluate import Answers, EvalOptions, Outcome, evaluate
from lever_train.evaluate.heldout import HeldOut, open_held_out
from lever_train.evaluate.predictions import PROVENANCE
from lever_train.evaluate.scoreboard import evaluations_table, image_numbers, scoreboard
from lever_train.evaluate.scores import Scoreboard
from lever_train.inputs.check import Vectors, check_inputs
from lever_train.inputs.embeddings import load_embeddings
from lever_train.inputs.provenance import Input, input_records, parents_of, said
from lever_train.options.engine import Engine
from lever_train.options.evaluate import EvalRequest, Questions
from lever_train.rollout.answerers import (
    Answerer,
    Surroundings,
    images_of,
    make_answerer,
    needs_images,
)
from lever_train.rollout.answerers.base import Endpoint, asked_task, seen
from lever_train.rollout.ask import Asker, scope
from lever_train.rollout.cache import open_cache
from lever_train.rollout.policy import Policy, load_policy, widths
from lever_train.rollout.propose import unpadded
from lever_train.rollout.ray_answers import answering

Progress = Callable[[float, float | None, str], None]
HANDFUL = 5  # checkpoints that may be judged by one split without a warning


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: its scoreboard, what every selector showed every query, and which these are.

    ``is_new``: no evaluation of the store was made of the same and came out the same. ``notices``:
    what a reader of the figures should know.
    """

    scoreboard: Scoreboard
    outcomes: tuple[Outcome, ...]
    is_new: bool
    question_ids: tuple[Id | None, ...]
    notices: tuple[str, ...] = ()


def run_evaluation(
    request: EvalRequest,
    progress: Progress = lambda done, total, note: None,
    engine: Engine | None = None,
) -> Evaluation:
    """Evaluate the checkpoints beside the baselines and commit what was found.

    What failed before is asked again; where that changes an outcome, it is a run of its own.

    Raises:
        UsageError: the request contradicts itself.
        LeverError: something it names is missing or does not fit.
    """
    store = Store.open(request.store)
    con = _connect(request, store)
    policies = load_policies(request.checkpoints, request.contest.device, request.names)
    limit = request.contest.most
    questions, task = _asked(request, store, con)
    held = open_held_out(
        con, questions, limit, task=task, only=request.query_ids, widths=widths(policies.values())
    )
    held = held.with_features(store, policies.values())
    answerer = _answerer(request, held, con)
    scorer = held.scoring.scorer(answerer.name)
    options = EvalOptions(
        request.contest.shots,
        request.contest.seed,
        request.wants_oracle,
        progress,
    )
    with _answers(request, held.scoring.task, answerer, store, engine or Engine()) as answers:
        outcomes = evaluate(held, answers, policies, options)
    images = image_numbers(held)
    board = scoreboard(outcomes, request.contest.sizes, images, held.examples)
    inputs = _inputs(request, list(policies), store)
    spec = _spec(request, held, answerer, policies, outcomes)
    run = store.find(spec)
    is_new = run is None
    if run is None:
        with store.begin(spec) as writer:
            writer.write("evaluations", evaluations_table(held, outcomes, scorer))
            run = writer.commit({"scoreboard": board.to_json(), "inputs": inputs})
    about = _about(request, run, answerer, inputs)
    if held.scoring.task.metric != "vqa-accuracy":
        about["metric"] = held.scoring.name
    board = replace(board, run=run.run, about=about)
    ids = tuple(q.question_id for q in held.queries)
    return Evaluation(board, tuple(outcomes), is_new, ids, tuple(_many_looks(store, held)))


def _many_looks(store: Store, held: HeldOut) -> Iterator[str]:
    """A warning where many checkpoints were judged by the questions of this evaluation, unless
    those are what demonstrations are taken from: training questions are there to choose by."""
    if held.ask.own:
        return
    judged = {
        policy
        for run in store.runs()
        if (run.kind, run.dataset, run.split) == ("evaluation", held.dataset, held.split)
        if "selectors" in run.parameters  # results files come without
        for policy in run.parameters["selectors"].values()
    }
    if len(judged) > HANDFUL:
        yield (
            f"WARNING: {len(judged)} checkpoints were judged by {held.dataset}/{held.split} so "
            "far, and the best of many is partly luck. Choose on training questions (--split train "
            "--queries held_out_fold), and read these once"
        )


def _connect(request: EvalRequest, store: Store) -> duckdb.DuckDBPyConnection:
    view = request.questions.queries
    return connect(store, runs=request.runs, only=[*ITEM_RELATIONS, *([view] if view else [])])


def _asked(request: EvalRequest, store: Store, con: Any) -> tuple[Questions, Task]:
    """The questions, with the images that the answerer looks at; and the task, that named or that
    of the stored questions, as the answerer's options ask it."""
    asked, spec = request.questions, request.answerer
    dataset = asked.dataset or only_dataset(con)
    task = asked_task(asked.task or stored_task(store.runs(), dataset, asked.split), spec)
    images = images_of(spec, task, asked.image_root, store.path)
    return asked.but(image_root=images), task


def _about(
    request: EvalRequest, run: Run, answerer: Answerer, inputs: Sequence[Input]
) -> dict[str, str]:
    """What the figures are of, for tables and pages."""
    kind = "checkpoint "
    named = [(i["role"].removeprefix(kind), i) for i in inputs if i["role"].startswith(kind)]
    return {
        "dataset/split": f"{run.dataset}/{run.split}",
        "checkpoints": ", ".join(f"{n} {i['path']}@{i['sha256'][:12]}" for n, i in named) or "none",
        "demonstrations": f"{run.dataset}/{request.questions.candidate_split}",
        "answerer": answerer.name,
        "inputs": said(inputs),
        "run": f"`{run.run}`",
        "date": f"{run.committed_at[:16].replace('T', ' ')} UTC",
    }


def _inputs(request: EvalRequest, names: Sequence[str], store: Store) -> list[Input]:
    """Every file that is read, by its role."""
    asked, contest = request.questions, request.contest
    checkpoints = zip(names, request.checkpoints, strict=True)
    named: dict[str, str | Path | None] = {f"checkpoint {n}": path for n, path in checkpoints}
    named |= {
        "query embeddings": asked.query_embeddings,
        "candidate embeddings": asked.candidate_embeddings,
        "pool": asked.pool,
        "questions": asked.questions,
        "annotations": asked.annotations,
        "answerer's query embeddings": contest.answerer_query_embeddings,
        "answerer's candidate embeddings": contest.answerer_candidate_embeddings,
    }
    return input_records(named, store)


def _parents(request: EvalRequest, held: HeldOut) -> tuple[str, ...]:
    asked = request.questions
    from_store = asked.pool is None and asked.candidate_split == asked.split
    return parents_of(
        Store.open(request.store),
        request.runs,
        held.dataset,
        (asked.split, asked.candidate_split),
        pools_of=asked.split if from_store else None,
    )


def predict(request: EvalRequest) -> pa.Table:
    """The picks of one checkpoint: query_id, question_id, pointer (ordered example ids) and
    demonstration_question_ids, one row a query. Nothing is asked of any answerer. The schema's
    metadata say under ``PROVENANCE`` what it was made from.

    Raises:
        UsageError: not exactly one checkpoint.
    """
    if len(request.checkpoints) != 1:
        raise UsageError("predict takes one checkpoint", value=len(request.checkpoints))
    store = Store.open(request.store)
    con = _connect(request, store)
    limit = request.contest.most
    policy = load_policy(request.checkpoints[0], request.contest.device)
    takes = widths([policy])
    only = request.query_ids
    held = open_held_out(con, request.questions, limit, is_judged=False, only=only, widths=takes)
    held = held.with_features(store, [policy])
    picks = greedy(policy, held.ask_for(policy), max(request.contest.shots))
    pointers = unpadded(picks)
    provenance = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dataset": held.dataset,
        "split": held.split,
        "shots": max(request.contest.shots),
        "inputs": _inputs(request, ["picks"], store),
        "parents": list(_parents(request, held)),
    }
    picked = pa.table(
        {
            "dataset": pa.repeat(held.dataset, len(held)),
            "split": pa.repeat(held.split, len(held)),
            "query_id": pa.array(held.ask.query_ids),
            "question_id": id_array(q.question_id for q in held.queries),
            "pointer": pa.array(pointers, pa.list_(pa.int32())),
            "demonstration_question_ids": pa.ListArray.from_arrays(
                np.cumsum([0, *map(len, pointers)], dtype=np.int32),
                id_array(held.examples[i].question_id for row in pointers for i in row),
            ),
        }
    )
    return picked.replace_schema_metadata({PROVENANCE: json.dumps(provenance)})


def load_policies(
    checkpoints: Sequence[Path], device: str, names: Sequence[str] = ()
) -> dict[str, Policy]:
    """Policies by the names given, else by the shortest that tells the files apart: stem, else
    folder and stem.

    Raises:
        UsageError: two names are the same file name in folders of the same name.
    """
    if names:
        loaded = [load_policy(path, device) for path in checkpoints]
        return dict(zip(names, loaded, strict=True))
    stems = [path.stem for path in checkpoints]
    named: dict[str, Policy] = {}
    for path in checkpoints:
        name = path.stem
        if stems.count(path.stem) > 1:
            name = f"{path.absolute().parent.name}/{path.stem}"
        if name in named:
            raise UsageError("two checkpoints have the same name", value=name)
        named[name] = load_policy(path, device)
    return named


def _answerer(request: EvalRequest, held: HeldOut, con: Any) -> Answerer:
    task, items = held.scoring.task, [*held.queries, *held.examples.values()]
    if request.answerer.spec != "nearest":  # which reads vectors, no words
        require_shown(task, items)
    if needs_images(request.answerer, task):
        require_images(items)
    contest = request.contest
    queries, examples = held.query_table, held.ask.table
    if contest.answerer_query_embeddings is not None:
        place = (held.dataset, held.split)
        queries = load_embeddings(contest.answerer_query_embeddings, con, place)
    if contest.answerer_candidate_embeddings is not None:
        place = (held.dataset, request.questions.candidate_split)
        examples = load_embeddings(contest.answerer_candidate_embeddings, con, place)
    asked = contest.answerer_query_embeddings or request.questions.query_embeddings
    check_inputs(
        Vectors.of(asked, queries),
        Vectors.of(contest.answerer_candidate_embeddings or asked, examples),
        split=held.split,
        size=len(held.query_table),
        last_query=int(held.ask.query_ids.max(initial=-1)),
        candidate_size=len(held.ask.table),
    )
    prior = [item.answers for item in held.examples.values()]
    around = Surroundings(queries.numpy(), examples.numpy(), prior, task)
    return make_answerer(request.answerer.but(device=contest.device), around)


@contextmanager
def _answers(
    request: EvalRequest, task: Task, answerer: Answerer, store: Store, engine: Engine
) -> Iterator[Answers]:
    """How prompts are answered: what costs is cached in the store, ``nearest`` costs nothing."""
    with ExitStack() as stack:
        flight = None
        if engine.engine == "ray":
            if answerer.name == "nearest" or isinstance(answerer, Endpoint):
                raise UsageError(
                    "--engine ray is for a model that each worker loads; this answerer is asked "
                    "from here as fast",
                    value=request.answerer.spec,
                )
            spec = request.answerer.but(device=request.contest.device)
            flight = stack.enter_context(answering(spec, task, answerer.batch_size, engine))
        elif answerer.name == "nearest":
            yield answerer.answer
            return
        asker = Asker(answerer, open_cache(store.path, scope(answerer)), flight=flight)
        yield lambda prompts: [answer for _, answer in asker.ask(prompts)]


def _spec(
    request: EvalRequest,
    held: HeldOut,
    answerer: Answerer,
    policies: Mapping[str, Policy],
    outcomes: Sequence[Outcome],
) -> RunSpec:
    """What the evaluation depends on and how it came out: the same of both make the same run."""
    digest = hashlib.sha256(scope(answerer))
    digest.update(repr([q.example_id for q in held.queries]).encode())
    digest.update(repr([t.answers for t in held.truths]).encode())
    for values in (held.ask.query.numpy(), held.ask.table.numpy(), np.asarray(held.ask.pool)):
        digest.update(np.ascontiguousarray(values).tobytes())
    for name, item in sorted(held.examples.items()):
        digest.update(repr((name, item.question_id, item.answers)).encode())
    for shown in seen(answerer, _shown(held, outcomes)):
        digest.update(shown)
    contest = request.contest
    return RunSpec(
        kind="evaluation",
        dataset=held.dataset,
        split=held.split,
        source={"path": ", ".join(str(path) for path in request.checkpoints)},
        source_sha256=digest.hexdigest(),
        parameters={
            "selectors": {name: policy.name for name, policy in policies.items()},
            "answerer": held.scoring.scorer(answerer.name),
            "answerer_embeddings": [
                contest.answerer_query_embeddings,
                contest.answerer_candidate_embeddings,
            ],
            "shots": list(contest.shots),
            "limit": list(contest.sizes) or ([] if contest.limit is None else [contest.limit]),
            "seed": contest.seed,
            "oracle": request.wants_oracle,
            "outcomes": _digest(outcomes),
        },
        parents=_parents(request, held),
    )


def _shown(held: HeldOut, outcomes: Sequence[Outcome]) -> list[Item]:
    """What the answerer saw: the queries, and the demonstrations any selector showed."""
    picked = np.unique(np.concatenate([outcome.pointer.ravel() for outcome in outcomes]))
    return [*held.queries, *(held.examples[number] for number in picked.tolist() if number >= 0)]


def _digest(outcomes: Sequence[Outcome]) -> str:
    """A digest of picks, answers and accuracies; why an answer failed may be said in other words
    each time."""
    digest = hashlib.sha256()
    for one in outcomes:
        digest.update(repr((one.selector, one.shots, one.predictions)).encode())
        digest.update(one.pointer.tobytes())
        digest.update(one.accuracy.tobytes())
    return digest.hexdigest()[:16]
