"""A request resolved against the store: everything a worker needs, and the run it will make.

In go a :class:`Request`; out comes a :class:`Job`. Resolving the same request on another machine
gives the same job, so nothing but the request and shard numbers travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import duckdb
import numpy as np
import numpy.typing as npt
from torch import Tensor

from lever_data.errors import LeverError, UsageError
from lever_data.items.items import Place, load_items, load_truth
from lever_data.items.official import Official, load_official
from lever_data.items.prompts import Item
from lever_data.relations.db import open_session
from lever_data.store.store import Run, RunSpec, Store
from lever_train.inputs.devices import open_device
from lever_train.inputs.embeddings import load_embeddings
from lever_train.inputs.pools import PoolSource, SharedPool, open_pools
from lever_train.options.rollout import Request, Which
from lever_train.rollout import views
from lever_train.rollout.answerers import Answerer, Surroundings, make_answerer, needs_images
from lever_train.rollout.identity import run_spec
from lever_train.rollout.job import Job
from lever_train.rollout.policy import Policy, load_policy
from lever_train.rollout.proposals import Proposals
from lever_train.rollout.table import Label

Ids = npt.NDArray[np.int64]
EXAMPLE_KINDS = ("examples", "embeddings")
_RELATIONS = ("candidates", "queries", "examples", "embeddings")


def resolve(request: Request, kind: str = "rollout") -> Job:
    """Read what the request names and check that it fits together.

    Args:
        kind: of the run it will make, ``rollout`` or ``beam``.

    Raises:
        LeverError: it says what does not.
    """
    request.check()
    open_device(request.inputs.device)
    open_device(request.answerer.device)
    store = Store.create(request.which.store)
    runs = store.select(list(request.which.runs))
    which = request.which
    view = which.from_view or which.target_view or which.queries
    # only what is read is defined: a fraction of the time of all views
    con = open_session(
        store,
        runs=[r.run for r in runs],
        sql_dir=which.sql_dir,
        only=[*_RELATIONS, *([] if view is None else [view])],
    ).con
    wide = _with_examples(store, runs, con)
    which = _placed(con, which, runs)
    return _Resolver(replace(request, which=which), store, runs, con, wide).job(kind)


@dataclass
class _Resolver:
    """The steps of :func:`resolve`; ``wide`` also sees all runs of examples and embeddings."""

    request: Request
    store: Store
    runs: list[Run]
    con: duckdb.DuckDBPyConnection
    wide: duckdb.DuckDBPyConnection

    def job(self, kind: str) -> Job:
        which = self.request.which
        official = _official(self.request)
        queries, examples, own = self._items(official)
        query_ids, given = self._queries(queries)
        items = {q: queries[q] for q in query_ids.tolist()}
        truths = load_truth(items, official, allow_fallback=self.request.allow_fallback)
        left, right = self._vectors(query_ids)
        answerer = self._answerer(left, right, examples)
        policy = self._policy()
        job = Job(
            request=self.request,
            store=self.store,
            spec=RunSpec(kind, *self._place),
            label=Label(
                *self._place,
                scorer=answerer.name,
                policy=f"view {which.from_view}" if policy is None else policy.name,
                generation=answerer.generation(),
            ),
            recipe=replace(self.request.recipe, shot_num=self.request.proposed_shots),
            query_ids=query_ids,
            items=items,
            truths=truths,
            examples=examples,
            own=own,
            answerer=answerer,
            policy=policy,
            query_vectors=left,
            example_vectors=right,
            pool=None if policy is None else self._pool(right),
            given=given,
            known=(
                None
                if which.target_view is None
                else views.known(self.con, *self._place, query_ids)
            ),
        )
        return replace(job, spec=run_spec(job, self._parents()))

    @property
    def _place(self) -> tuple[str, str]:
        which = self.request.which
        assert which.dataset is not None and which.split is not None
        return which.dataset, which.split

    def _answerer(
        self, queries: Tensor | None, examples: Tensor | None, items: Mapping[int, Item]
    ) -> Answerer:
        around = Surroundings(
            None if queries is None else queries.numpy(),
            None if examples is None else examples.numpy(),
            [item.answers for item in items.values()],
        )
        return make_answerer(self.request.answerer, around)

    def _policy(self) -> Policy | None:
        """Who proposes; nobody where the pointers come from a view."""
        inputs = self.request.inputs
        if self.request.which.from_view is not None:
            return None
        return load_policy(inputs.checkpoint, inputs.device)

    def _items(self, official: Official | None) -> tuple[dict[int, Item], dict[int, Item], bool]:
        """Queries, examples, and whether they are the same items."""
        which, inputs = self.request.which, self.request.inputs
        dataset, split = self._place
        images = inputs.image_root
        if needs_images(self.request.answerer) and (images is None or not images.is_dir()):
            raise UsageError(
                "this answerer looks at images",
                value=None if images is None else str(images),
                hint="--image-root DIR names the folder they lie in",
            )
        queries = load_items(self.wide, Place(dataset, split, images), official)
        default = split if inputs.candidate_embeddings is None else "train"
        source = which.candidate_split or default
        if source == split:
            return queries, queries, True
        return queries, load_items(self.wide, Place(dataset, source, images), None), False

    def _queries(self, items: Mapping[int, Item]) -> tuple[Ids, Proposals | None]:
        """The query ids meant, ascending, and the pointers of ``--from-view``."""
        which, given = self.request.which, None
        if which.from_view is not None:
            shots = self.request.shot_num or max(self.request.shots, default=None)
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

    def _vectors(self, query_ids: Ids) -> tuple[Tensor | None, Tensor | None]:
        inputs = self.request.inputs
        if inputs.query_embeddings is None:
            if self.request.which.from_view is None:
                raise UsageError("proposals need embeddings", hint="--query-embeddings F")
            return None, None
        left = load_embeddings(inputs.query_embeddings, self.wide)
        right = left
        if inputs.candidate_embeddings is not None:
            right = load_embeddings(inputs.candidate_embeddings, self.wide)
        if left.shape[1] != right.shape[1]:
            raise LeverError(
                "query and candidate embeddings differ in width",
                value=f"{left.shape[1]} and {right.shape[1]}",
            )
        if int(query_ids[-1]) >= len(left):
            raise LeverError(
                f"the query embeddings have {len(left):,} rows, none for a query",
                where=f"query {query_ids[-1]}",
                hint="row = query id; give the embeddings of this split",
            )
        return left, right

    def _pool(self, vectors: Tensor | None) -> PoolSource:
        assert vectors is not None
        path = self.request.inputs.pool
        source = open_pools(self.con, None if path is None else str(path), "candidates")
        if isinstance(source, SharedPool) and not len(source.ids):
            return SharedPool(np.arange(len(vectors), dtype=np.int64))
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
    further = [r.run for r in store.runs() if r.kind in EXAMPLE_KINDS and r.run not in names]
    return open_session(store, runs=[*names, *further], only=_RELATIONS).con if further else con


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
    return replace(which, dataset=fitting[0][0], split=fitting[0][1])


def _official(request: Request) -> Official | None:
    """The official files; without them only string matching is left, if it is allowed."""
    inputs = request.inputs
    if inputs.questions is None or inputs.annotations is None:
        if request.allow_fallback:
            return None
        raise LeverError(
            "the official metric needs --questions and --annotations",
            hint="--allow-fallback scores by string matching instead, and says so in every row",
        )
    return load_official(inputs.questions, inputs.annotations)
