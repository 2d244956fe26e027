"""What a plan can know: everything of a config that would fail later, found before any step runs.

In goes a :class:`PipelineConfig`; out comes nothing, or the error a step would have ended with.
What the config says by itself is checked always (:func:`require_sense`); models, images and
checkpoints where a step is to run that opens them, as its guard.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb

from lever_data.catalog import quote_identifier
from lever_data.errors import LeverError, UsageError
from lever_data.items.task import Task, stored_task
from lever_data.readers.rows import data_files
from lever_data.relations.db import open_session, readable_errors
from lever_data.relations.rewards import reward_sql
from lever_data.report.gate import parse_gate, require_known
from lever_data.sources.dataset import guessed_task, meaning_of
from lever_data.store.store import Store
from lever_train.flow.legacy_files import sees_images
from lever_train.flow.work import Work
from lever_train.inputs.embeddings import load_embeddings
from lever_train.options.embed import EmbedRequest
from lever_train.options.pipeline import DataTable, PipelineConfig
from lever_train.rollout.answerers import images_of, needs_images
from lever_train.rollout.answerers.base import asked_task

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
        session = open_session(empty, sql_dir=data.sql_dir)
        with session.con as con:
            for view in config.train.data.view:
                if view not in session.relations:
                    raise session.explain_missing(view)
                reward = reward_sql(config.train.reward)
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
    _require_model(config.embed.encoder, "encoder")


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


def require_vectors(work: Work) -> None:
    """Refuse given embeddings that cannot be read, differ in width or are too few for the pools.

    Raises:
        UsageError, LeverError: it names the file.
    """
    data, size = work.config.data, work.config.pool.size
    given = (data.query_embeddings, data.candidate_embeddings, data.eval_embeddings)
    with duckdb.connect() as con:
        tables = {path: load_embeddings(str(path), con) for path in given if path is not None}
    for path, table in tables.items():
        first = next(iter(tables.values()))
        if table.shape[1] != first.shape[1]:
            raise LeverError(
                f"embeddings of {table.shape[1]} numbers beside others of {first.shape[1]}",
                where=str(path),
            )
    named = data.candidate_embeddings or data.query_embeddings
    if size is None or data.pool is not None or named is None:
        return
    shown = tables[named]
    if size >= len(shown):
        raise UsageError(
            "a pool cannot be larger than the items that may be shown",
            value=f"{size} of {len(shown)}",
        )


def _may_bring_images(data: DataTable) -> bool:
    """Whether the step ingest may find pictures inside the data, as in Parquet files."""
    return data.image_root is None and data.items is not None


def _require_model(name: str, what: str) -> None:
    """Refuse a path where no model is; what may be a name on the hub is fetched when it is used."""
    if not _HUB_NAME.fullmatch(name) and sees_images(name) is None:
        raise UsageError(f"there is no model for the {what} here", value=name)
