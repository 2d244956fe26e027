"""Resolve a request against the store: read what it names, check that it fits together.

In go a :class:`Request`, out comes a :class:`Job`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import duckdb
import numpy as np
import numpy.typing as npt
from torch import Tensor

from lever_data.errors import LeverError, UsageError
from lever_data.items.items import (
    ITEM_RELATIONS,
    Official,
    Place,
    load_items,
    load_truth,
    require_images,
)
from lever_data.items.prompts import Item
from lever_data.items.scoring import Scoring
from lever_data.items.task import Task, require_shown, stored_task
from lever_data.relations.db import open_session
from lever_data.sources.official import load_official
from lever_data.store.store import Run, RunSpec, Store
from lever_train.inputs.check import Vectors, check_inputs, split_size
from lever_train.inputs.devices import open_device
from lever_train.inputs.embeddings import load_embeddings
from lever_train.inputs.pair_features import PairFeatures, Pairs
from lever_train.inputs.pools import PoolSource, SharedPool, open_pools
from lever_train.options.rollout import Request, Which
from lever_train.rollout import views
from lever_train.rollout.answerers import (
    Answerer,
    Surroundings,
    images_of,
    make_answerer,
    needs_images,
)
from lever_train.rollout.answerers.base import asked_task
from lever_train.rollout.job import Job, run_spec
from lever_train.rollout.policy import Policy, load_policy, policy_features, widths
from lever_train.rollout.propose import Proposals
from lever_train.rollout.score import Label

Ids = npt.NDArray[np.int64]


def resolve(request: Request, kind: str = "rollout", *, computes: bool = True) -> Job:
    """Read what the request names and check that it fits together.

    Args:
        kind: of the run it will make, ``rollout`` or ``beam``.
        computes: whether this process proposes and answers; one that leaves it to workers needs no
            device.

    Raises:
        LeverError: it says what does not.
    """
    request = request.but(answerer=request.answerer.but(device=request.inputs.device))
    if computes:
        open_device(request.inputs.device)
    store = Store.create(request.which.store)
    runs = store.select(list(request.which.runs))
    which = request.which
    view = which.from_view or which.target_view or which.queries
    # only what is read is defined: a fraction of the time of all views
    con = open_session(
        store,
        runs=[r.run for r in runs],
        sql_dir=which.sql_dir,
        only=[*ITEM_RELATIONS, *([] if view is None else [view])],
    ).con
    wide = _with_examples(store, runs, con)
    which = _placed(con, which, runs)
    return _Resolver(request.but(which=which), store, runs, con, wide, computes).job(kind)


@dataclass
class _Resolver:
    """The steps of :func:`resolve`; ``wide`` also sees all runs of examples and embeddings."""

    request: Request
    store: Store
    runs: list[Run]
    con: duckdb.DuckDBPyConnection
    wide: duckdb.DuckDBPyConnection
    computes: bool

    def job(self, kind: str) -> Job:
        which = self.request.which
        inputs = self.request.inputs
        official = load_official(inputs.questions, inputs.annotations)
        queries, examples, own = self._items(official)
        query_ids, given = self._queries(queries)
        items = {q: queries[q] for q in query_ids.tolist()}
        scoring = Scoring(self._task, [item.answers for item in queries.values()])
        if self.request.answerer.spec != "nearest":  # which reads vectors, no words
            require_shown(self._task, [*items.values(), *examples.values()])
        if needs_images(self.request.answerer, self._task):
            require_images([*items.values(), *examples.values()])
        truths = load_truth(items, official, allow_fallback=self.request.allow_fallback)
        left, right = self._vectors()
        answerer = self._answerer(left, right, examples)
        policy = self._policy()
        pool = None if policy is None else self._pool(examples)
        if left is not None and right is not None:
            self._check(left, right, int(query_ids[-1]), official, own, policy, pool)
        job = Job(
            request=self.request,
            store=self.store,
            spec=RunSpec(kind, *self._place),
            label=Label(
                *self._place,
                scorer=scoring.scorer(answerer.name),
                metric=scoring.name,
                policy=f"view {which.from_view}" if policy is None else policy.name,
                generation=answerer.generation(),
            ),
            recipe=self.request.recipe.but(shot_num=self.request.proposed_shots),
            query_ids=query_ids,
            items=items,
            truths=truths,
            scoring=scoring,
            examples=examples,
            own=own,
            answerer=answerer,
            policy=policy,
            query_vectors=left,
            example_vectors=right,
            pool=pool,
            given=given,
            stock=(
                None
                if which.target_view is None
                else views.stock(self.con, *self._place, query_ids)
            ),
        )
        job = replace(job, features=self._features(job))
        return _after_failures(replace(job, spec=run_spec(job, self._parents())))

    def _features(self, job: Job) -> PairFeatures | None:
        """What the policy reads of the queries and their pools."""
        queries, table, ids = job.query_vectors, job.example_vectors, job.query_ids
        if job.policy is None or job.pool is None or queries is None or table is None:
            return None
        shown = job.pool.ids if isinstance(job.pool, SharedPool) else job.pool.of(ids)
        pool = np.broadcast_to(shown, (len(ids), shown.shape[-1]))
        asked = [job.items[number].question for number in ids.tolist()]
        place = (*self._place, self._source)
        pairs = Pairs(self.wide, place, ids, pool, queries[ids], table, asked, job.examples)
        return policy_features(job.policy, self.store, pairs)

    @property
    def _place(self) -> tuple[str, str]:
        which = self.request.which
        assert which.dataset is not None and which.split is not None
        return which.dataset, which.split

    @property
    def _source(self) -> str:
        """The split of the demonstrations."""
        which, split = self.request.which, self._place[1]
        own = self.request.inputs.candidate_embeddings is None
        return which.candidate_split or (split if own else "train")

    @cached_property
    def _task(self) -> Task:
        """The task named, else that of the queries' examples, as the answerer's options ask it."""
        task = self.request.which.task or stored_task(self.store.runs(), *self._place)
        return asked_task(task, self.request.answerer)

    def _answerer(
        self, queries: Tensor | None, examples: Tensor | None, items: Mapping[int, Item]
    ) -> Answerer:
        around = Surroundings(
            None if queries is None else queries.numpy(),
            None if examples is None else examples.numpy(),
            [item.answers for item in items.values()],
            self._task,
        )
        return make_answerer(self.request.answerer, around)

    def _policy(self) -> Policy | None:
        """Who proposes; nobody where the pointers come from a view."""
        inputs = self.request.inputs
        if self.request.which.from_view is not None:
            return None
        return load_policy(inputs.checkpoint, inputs.device if self.computes else "cpu")

    def _items(self, official: Official | None) -> tuple[dict[int, Item], dict[int, Item], bool]:
        """Queries, examples, and whether they are the same items."""
        inputs = self.request.inputs
        dataset, split = self._place
        images = images_of(self.request.answerer, self._task, inputs.image_root, self.store.path)
        queries = load_items(self.wide, Place(dataset, split, images, inputs.image_name), official)
        source = self._source
        if source == split:
            return queries, queries, True
        place = Place(dataset, source, images, inputs.image_name)
        return queries, load_items(self.wide, place, None), False

    def _queries(self, items: Mapping[int, Item]) -> tuple[Ids, Proposals | None]:
        """The query ids meant, ascending, and the pointers of ``--from-view``."""
        which, given = self.request.which, None
        if which.from_view is not None:
            shots = self.request.shot_num
            if shots is None:
                shots = max(self.request.shots, default=None)
            ids, given = views.pointers(self.con, which.from_view, *self._place, shots)
        elif view := which.queries or which.target_view:
            ids = views.query_ids(self.con, view, *self._place)
        else:
            ids = np.array(sorted(items), dtype=np.int64)
        if not len(ids):
            raise LeverError("there are no queries to generate for", where="/".join(self._place))
        if unknown := [q for q in ids.tolist() if q not in items]:
            raise LeverError(
                f"{len(unknown):,} queries have no item in the split",
                where=f"query {unknown[0]}",
                hint="ingest the questions of the whole split",
            )
        if which.limit is not None and which.limit < len(ids):
            ids = ids[: which.limit]
            given = None if given is None else given.select(given.row < which.limit)
        return ids, given

    def _vectors(self) -> tuple[Tensor | None, Tensor | None]:
        inputs = self.request.inputs
        if inputs.query_embeddings is None:
            if self.request.which.from_view is None:
                raise UsageError("proposals need embeddings", hint="--query-embeddings F")
            return None, None
        left = load_embeddings(inputs.query_embeddings, self.wide, self._place)
        right = left
        if inputs.candidate_embeddings is not None:
            source = (self._place[0], self.request.which.candidate_split or "train")
            right = load_embeddings(inputs.candidate_embeddings, self.wide, source)
        return left, right

    def _check(
        self,
        left: Tensor,
        right: Tensor,
        last: int,
        official: Official | None,
        own: bool,
        policy: Policy | None,
        pool: PoolSource | None,
    ) -> None:
        """Refuse vectors, pools and checkpoints of another place than the queries'."""
        inputs, size = self.request.inputs, split_size(self.wide, *self._place)
        check_inputs(
            Vectors.of(inputs.query_embeddings, left),
            Vectors.of(inputs.candidate_embeddings or inputs.query_embeddings, right),
            split=self._place[1],
            size=max(official.questions) + 1 if size is None and official else size,
            last_query=last,
            candidate_size=size if own else None,
            pool=pool,
            checkpoints={} if policy is None else widths([policy]),
        )

    def _pool(self, examples: Mapping[int, Item]) -> PoolSource:
        """The pools of the queries' own place, else all examples of the candidate split."""
        path = self.request.inputs.pool
        source = open_pools(self.con, path, "candidates", self._place)
        if isinstance(source, SharedPool):  # of the ids in stored pointers, which are but a part
            return SharedPool(np.array(sorted(examples), dtype=np.int64))
        return source

    def _parents(self) -> tuple[str, ...]:
        which = self.request.which
        if which.from_view is None and which.target_view is None and which.queries is None:
            return ()
        return tuple(r.run for r in self.runs if r.kind in ("rl_data", "rollout", "rescore"))


def _with_examples(
    store: Store, runs: list[Run], con: duckdb.DuckDBPyConnection
) -> duckdb.DuckDBPyConnection:
    """A connection that also sees examples and embeddings where ``--run`` left them out."""
    names = [r.run for r in runs]
    further = [
        r.run for r in store.runs() if r.kind in ("examples", "embeddings") and r.run not in names
    ]
    return open_session(store, runs=[*names, *further], only=ITEM_RELATIONS).con if further else con


def _placed(con: duckdb.DuckDBPyConnection, which: Which, runs: Sequence[Run]) -> Which:
    """``which`` with dataset and split filled in where only one is possible."""
    if which.dataset is not None and which.split is not None:
        return which
    view = which.from_view or which.target_view or which.queries
    found = (
        set(views.places(con, view))
        if view is not None
        else {(r.dataset, r.split) for r in runs if r.dataset and r.split}
    )
    fitting = sorted(
        (d, s) for d, s in found if which.dataset in (None, d) and which.split in (None, s)
    )
    if len(fitting) != 1:
        raise UsageError(
            "name the queries' dataset and split",
            value=", ".join(f"{d}/{s}" for d, s in fitting) or "none in the store",
            hint="--dataset D --split S",
        )
    return which.but(dataset=fitting[0][0], split=fitting[0][1])


def _after_failures(job: Job) -> Job:
    """The job itself, or where its run holds failed answers the one that asks them anew: a run
    whose parent is the old one, all else of it in the answer cache."""
    while (run := job.store.find(job.spec)) is not None and run.details["report"]["failed"]:
        spec = replace(job.spec, parents=(*job.spec.parents, run.run))
        job = replace(job, spec=spec, before=run)
    return job
