"""A store and its views from Python.

In goes a store's folder; out come views of it, each as Arrow, polars, pandas, a DuckDB relation or
batches for torch. What a view holds is defined in ``sql/`` and in the user's own ``.sql`` files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from lever_data.errors import UsageError
from lever_data.relations.db import Session, open_session, quote_identifier
from lever_data.store.store import Store

if TYPE_CHECKING:
    import polars as pl

    from lever.batches import Batches
    from lever_train.options.train import TrainConfig


def open_store(path: str | Path) -> OpenStore:
    """Open an existing store.

    Raises:
        LeverError: there is no store at ``path``, or a newer lever wrote it.
    """
    return OpenStore(Store.open(path).path)


@dataclass(frozen=True)
class OpenStore:
    """A store to read from; ``path`` is its folder."""

    path: Path

    def view(
        self,
        name: str,
        *,
        runs: Sequence[str] = (),
        scorer: str | None = None,
        sql_dir: Path | None = None,
    ) -> View:
        """A view of the store, or any other relation of it: ``lever views`` lists them.

        Args:
            name: of the relation; the user's own views included.
            runs: ids (or unambiguous prefixes) of the runs to read; all where empty.
            scorer: only candidates this model answered, or whose model is not known.
            sql_dir: a folder of the user's own views, besides ``<store>/views``.

        Raises:
            UsageError: there is no such view, or ``runs`` is a text.
            LeverError: no such run, or a run that is not what was committed.
        """
        session = open_session(self.path, runs=runs, scorer=scorer, sql_dir=sql_dir)
        if name not in session.relations:
            raise session.explain_missing(name)
        return View(self.path, name, tuple(runs), scorer, sql_dir, session)


@dataclass(frozen=True)
class View:
    """One relation over the runs that were there when it was opened."""

    store: Path
    name: str
    runs: tuple[str, ...]
    scorer: str | None
    sql_dir: Path | None
    session: Session

    def relation(self, **frames: Any) -> duckdb.DuckDBPyRelation:
        """The view as a lazy DuckDB relation, with its columns and types.

        Args:
            frames: polars, pandas or Arrow tables of the caller's, by the names under which
                ``relation.query`` may join them. Nothing outside the store is read but these.

        Raises:
            UsageError: a frame has the name of a relation of the store, or is not a table.
        """
        # of a cursor's own, so that another call may use the same names for other frames
        cursor = self.session.con.cursor()
        for name, frame in frames.items():
            if name in self.session.relations:
                raise UsageError(
                    "the store has a relation of this name: give the frame another", value=name
                )
            try:
                cursor.register(name, frame)
            except duckdb.InvalidInputException:
                raise UsageError(
                    "a frame is a polars, pandas or Arrow table",
                    where=name,
                    value=type(frame).__name__,
                ) from None
        return cursor.sql(f"from {quote_identifier(self.name)}")

    def arrow(self) -> pa.Table:
        """The whole view in memory, as Arrow."""
        table: pa.Table = self.relation().to_arrow_reader().read_all()
        return table

    def polars(self) -> pl.DataFrame:
        """The whole view in memory, as polars."""
        import polars as pl

        frame = pl.from_arrow(self.arrow())
        assert isinstance(frame, pl.DataFrame)
        return frame

    def pandas(self) -> Any:
        """The whole view in memory, as a pandas DataFrame.

        Raises:
            UsageError: pandas is not installed.
        """
        if find_spec("pandas") is None:
            raise UsageError(
                "pandas is not installed", hint="pip install pandas, or take .polars() or .arrow()"
            )
        return self.arrow().to_pandas()

    def batches(self, config: TrainConfig) -> Batches:
        """Padded tensors of whole groups, as ``lever train`` reads them from this view.

        Args:
            config: the options of a training: vectors, pool, filters, reward, batch size, seed.
                Its view and scorer are this view's.

        Raises:
            LeverError: as for a training: no rows, several scorers, vectors that do not fit.
            UsageError: the config names another view or scorer.
        """
        from lever.batches import open_batches

        return open_batches(self, config)
