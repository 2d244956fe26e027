"""What a plan can know: everything of a config that would fail later, found before any step runs.

In goes a :class:`PipelineConfig`; out comes nothing, or the error a step would have ended with.
What the config says by itself is checked always (:func:`require_sense`); models, images and
checkpoints where a step is to run that opens them, as its guard.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb

from lever_data.catalog import quote_identifier
from lever_data.errors import UsageError
from lever_data.items.task import Task, stored_task
from lever_data.readers.rows import data_files
from lever_data.readers.source import Source as DataFile
from lever_data.relations.db import open_session, readable_errors
from lever_data.relations.rewards import reward_sql, with_todays_columns
from lever_data.report.gate import parse_gate, require_known
from lever_data.sources.dataset import guessed_task, meaning_of
from lever_data.sources.questions import read_questions
from lever_data.store.store import Store
from lever_train.flow.legacy_files import sees_images
from lever_train.flow.work import Work
from lever_train.inputs.check import Vectors, check_inputs, split_size
from lever_train.inputs.embeddings import load_embeddings
from lever_train.inputs.model_folder import model_folder
from lever_train.inputs.pools import open_pools
from lever_train.learn.data import READ
from lever_train.options.embed import EmbedRequest
from lever_train.options.pipeline import DataTable, PipelineConfig
from lever_train.rollout.answerers import images_of, needs_images
from lever_train.rollout.answerers.base import asked_task
from lever_train.selector.checkpoint import read_checkpoint

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # what may be fetched; anything else is a path


def require_sense(config: PipelineConfig) -> None:
    """Refuse gates, views, rewards, an answerer and a store that cannot be.

    Raises:
        UsageError: a name or an expression means nothing.
        LeverError: the store is none, or a view of the user's is broken.
    """
    require_known([parse_gate(text) for text in config.audit.fail_on])
    needs_images(config.answerer.answerer, Task())
    data = config.data
    if Store.exists(data.store):
        Store.open(data.store)
    with TemporaryDirectory() as folder:  # the same relations without a row: nothing is read
        empty = Store.create(Path(folder) / "store")
        if (data.store / "views").is_dir():
            shutil.copytree(data.store / "views", empty.path / "views", dirs_exist_ok=True)
        session = open_session(empty, sql_dir=data.sql_dir, only=(*config.train.data.view, *READ))
        with session.con as con:
            for view in config.train.data.view:
                if view not in session.relations:
                    raise session.explain_missing(view)
                spec = with_todays_columns(con, [view], config.train.reward)
                reward = reward_sql(spec)
                with readable_errors():
                    con.execute(f"select {reward} from {quote_identifier(view)} as v limit 0")


def require_encoder(work: Work) -> None:
    """Refuse an encoder or images that are not there.

    Raises:
        UsageError: it names what is missing.
    """
    config = work.config
    if not _may_bring_images(config.data):
        images = {"image_root": config.data.image_root, "store": config.data.store}
        EmbedRequest(**config.embed.encoding, **images).require_images()
    _require_model(model_folder(config.embed.encoder), "encoder")


def require_answerer(work: Work) -> None:
    """Refuse an answerer whose model, or whose images, are not there.

    Raises:
        UsageError: it names what is missing.
    """
    spec = work.config.answerer.answerer
    data = work.config.data
    task = work.config.given_task
    if task is None and data.items is not None:
        files = data_files(data.items, data.train_split)
        task = guessed_task(meaning_of(files, work.config.columns), None)
    elif task is None:
        runs = Store.open(data.store).runs() if Store.exists(data.store) else []
        task = stored_task(runs, data.dataset, data.train_split)
    if not _may_bring_images(data):
        images_of(spec, asked_task(task, spec), data.image_root, data.store)
    kind, _, name = spec.spec.partition(":")
    if kind == "transformers":
        _require_model(name, "answerer")


def require_inputs(work: Work, split: str) -> None:
    """Refuse given vectors, pools and checkpoints that are not those of a split, or cannot be read.
    What steps make themselves fits.

    Raises:
        UsageError, LeverError: it names the file.
    """
    config, data, answerer = work.config, work.config.data, work.config.answerer
    sizes = _size(data, split), _size(data, data.train_split)
    shown = data.candidate_embeddings or data.query_embeddings
    if split == data.train_split:
        _require_fit(split, sizes, data.query_embeddings, shown, data.pool, config.sft.checkpoint)
    else:
        queries = data.eval_embeddings
        _require_fit(split, sizes, queries, shown, data.eval_pool, config.eval.checkpoint)
        if answerer.query_embeddings or answerer.candidate_embeddings:
            given = answerer.query_embeddings or queries, answerer.candidate_embeddings or shown
            _require_fit(split, sizes, *given)
    if config.pool.size is not None and sizes[1] is not None and config.pool.size >= sizes[1]:
        raise UsageError(
            "a pool cannot be larger than the items that may be shown",
            value=f"{config.pool.size} of {sizes[1]}",
        )


def _require_fit(
    split: str,
    sizes: tuple[int | None, int | None],
    query_embeddings: Path | None,
    candidate_embeddings: Path | None,
    pool_file: Path | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Check what is given of these against the sizes of the split and of the demonstrations'."""
    with duckdb.connect() as con:
        found = [
            None if path is None else Vectors.of(str(path), load_embeddings(str(path), con))
            for path in (query_embeddings, candidate_embeddings)
        ]
        pool = None if pool_file is None else open_pools(con, pool_file, "candidates")
    width = next((given.width for given in found if given is not None), 0)
    queries, candidates = (
        given or Vectors("the vectors that are made", size or sys.maxsize, width)
        for given, size in zip(found, sizes, strict=True)
    )
    takes = {}
    if checkpoint is not None and checkpoint.is_file() and width:
        takes[str(checkpoint)] = read_checkpoint(checkpoint).dim
    check_inputs(
        queries,
        candidates,
        split=split,
        size=sizes[0],
        last_query=-1,
        candidate_size=sizes[1],
        pool=pool,
        checkpoints=takes,
    )


def _size(data: DataTable, split: str) -> int | None:
    """Questions of a split: in the file given, else in the store; ``None``: nobody knows yet."""
    path = data.questions if split == data.train_split else data.eval_questions
    if path is not None:
        return len(read_questions(DataFile.open(path)).question_ids)
    if not data.store.exists():
        return None
    with open_session(data.store, only=("examples",)).con as con:
        return split_size(con, data.dataset, split)


def _may_bring_images(data: DataTable) -> bool:
    """Whether the step ingest may find pictures inside the data, as in Parquet files."""
    return data.image_root is None and data.items is not None


def _require_model(name: str, what: str) -> None:
    """Refuse a path where no model is; what may be a name on the hub is fetched when it is used."""
    if not _HUB_NAME.fullmatch(name) and sees_images(name) is None:
        raise UsageError(f"there is no model for the {what} here", value=name)
