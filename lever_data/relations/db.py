"""Connections: an in-memory DuckDB with every relation of a store, closed to the outside.

In go a store and a choice of runs, out comes a DuckDB connection on which ``all_candidates`` and
its kin are views over the Parquet files of just those runs. The connection reads inside the store
and nowhere else. The files are hashed first: an altered one is an error, never other figures. Take
``con.cursor()`` for every reader.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import duckdb

from lever_data import catalog, older
from lever_data.catalog import Relation, body, quote_identifier, quote_literal
from lever_data.errors import LeverError, UsageError
from lever_data.store.integrity import require_intact
from lever_data.store.spill import new_spill_folder
from lever_data.store.store import Run, Store, require_plain_path

__all__ = [
    "Session",
    "connect",
    "open_session",
    "quote_identifier",
    "quote_literal",
    "readable_errors",
]

# One row a run. `candidates` reads it four times, and DuckDB plans a view anew each time: 0.25 s of
# every query.
_TABLES = ("runs",)


@dataclass(frozen=True)
class Session:
    """A connection and what was found while making it."""

    con: duckdb.DuckDBPyConnection
    relations: dict[str, Relation]  # defined on the connection
    broken: dict[str, str] = field(default_factory=dict)  # user's views left out → why

    def explain_missing(self, name: str) -> LeverError:
        """The error for a relation that is not there: broken, or unknown with the nearest name."""
        if name in self.broken:
            return LeverError(
                f"the view {name} is broken: {self.broken[name]}",
                hint=f"mend {name}.sql in your views folder; `lever views` lists all",
            )
        if name in older.VIEWS:
            hint = f"{older.VIEWS[name]} has its columns"
            return UsageError("there is no such view any more", value=name, hint=hint)
        near = get_close_matches(name, [*catalog.builtin(), *self.relations], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return UsageError(
            "there is no such view", value=name, hint=hint + "`lever views` lists them"
        )


def connect(
    store: Store | str | Path,
    *,
    runs: Sequence[str] = (),
    scorer: str | None = None,
    sql_dir: Path | None = None,
    only: Sequence[str] | None = None,
    memory_limit: str | None = None,
    threads: int | None = None,
) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with every relation of the store.

    Args:
        store: the store or its path.
        runs: ids (or unambiguous prefixes) of the runs to read; all where empty.
        scorer: only candidates this model answered, or whose model is not known.
        sql_dir: a folder of the user's own views, besides ``<store>/views``.
        only: define just these relations and what they read (a quarter of the time).
        memory_limit: DuckDB's, such as ``"2GB"``; beyond it DuckDB spills to disk.
        threads: DuckDB's.

    Raises:
        UsageError: ``runs`` is a text.
        LeverError: no such store or run, or a run that is not what was committed.
    """
    session = open_session(store, runs=runs, scorer=scorer, sql_dir=sql_dir, only=only)
    if memory_limit is not None:
        session.con.execute("set memory_limit = ?", [memory_limit])
    if threads is not None:
        session.con.execute("set threads = ?", [threads])
    return session.con


def open_session(
    store: Store | str | Path,
    *,
    runs: Sequence[str] = (),
    scorer: str | None = None,
    sql_dir: Path | None = None,
    only: Sequence[str] | None = None,
    spill: Path | None = None,
    con: duckdb.DuckDBPyConnection | None = None,
) -> Session:
    """Like :func:`connect`, and says which views exist and which of the user's are broken.

    Args:
        only: define just these relations and what they read (a fraction of the time).
        spill: the folder DuckDB makes where it spills, in one of this process's own if not given.
        con: an empty database of the caller's to use; another takes 25 ms.

    Raises:
        LeverError: as :func:`connect`; or the user has a view of the name of one of ``only``.
    """
    if isinstance(runs, str):  # which is a sequence of its letters
        raise UsageError("runs are a list, not a text", value=runs, hint="[run] for one")
    store = store if isinstance(store, Store) else Store.open(store)
    folders = [store.path / "views"]
    if sql_dir is not None:
        if not sql_dir.is_dir():
            raise UsageError("--sql-dir is not a folder", value=str(sql_dir))
        folders.append(sql_dir)
    user, broken = catalog.user_relations(folders)
    for name in only or ():
        if name in broken and name in catalog.builtin():
            raise LeverError(f"which {name}? {broken[name]}", where=f"{name}.sql among your views")
    con = con or duckdb.connect()
    # a query is bound three times before it runs, and each time reads the footer of every file:
    # at 100 million candidates half of the processor time of a count
    con.execute("set parquet_metadata_cache = true")
    known, raw = catalog.builtin(), set(catalog.RAW_TABLES)
    if only is not None:
        known, raw = _closure(con, catalog.builtin() | user, only)
    chosen = store.select(list(runs))
    require_intact(chosen, None if only is None else {catalog.RAW_TABLES[name][1] for name in raw})
    _define_sources(con, store, chosen, scorer, raw, spill or new_spill_folder())
    _close_to_outside(con, store)
    _define_builtin(con, {n: r for n, r in known.items() if r.folder != "user"})
    wanted = user if only is None else {n: r for n, r in known.items() if r.folder == "user"}
    defined, failed = _define_user(con, wanted)
    relations = {n: r for n, r in known.items() if r.folder != "user"} | defined
    return Session(con, relations, broken | failed)


def _define_sources(
    con: duckdb.DuckDBPyConnection,
    store: Store,
    runs: list[Run],
    scorer: str | None,
    raw: Set[str],
    spill: Path,
) -> None:
    require_plain_path(store.path)
    con.execute("set temp_directory = ?", [str(spill)])
    con.execute(catalog.scorer_macro(scorer))
    con.execute(catalog.beams_macro(str(any(r.kind == "beam" for r in runs)).lower()))
    con.execute(f"create table raw_runs as {catalog.read_parquet_sql([], 'stg_runs')}")
    if runs:
        con.executemany("insert into raw_runs values (?,?,?,?,?,?,?,?,?,?)", _run_rows(runs))
    for name in sorted(raw):  # files that nothing asked for reads are not there in a mirror
        kinds, table, like = catalog.RAW_TABLES[name]
        holders = [r for r in runs if r.kind in kinds]
        files = [str(f) for r in holders for f in r.table_files(table)]
        read = catalog.read_parquet_sql(files, like, any(r.has_older_names for r in holders))
        try:
            con.execute(f"create view {name} as {read}")
        except duckdb.Error as error:
            raise LeverError(
                f"a Parquet file of the store cannot be read ({error})",
                where=str(store.path),
                hint="was a run removed meanwhile? Start again; else `lever check` says more",
            ) from error
    for text in catalog.macros().values():
        con.execute(text)


def run_sql(run: Run, table: str, like: str) -> str:
    """SELECT over the files of one run's table, as the staging file ``like`` names its columns."""
    files = [str(file) for file in run.table_files(table)]
    return catalog.read_parquet_sql(files, like, run.has_older_names)


def _run_rows(runs: list[Run]) -> list[list[object]]:
    # stg_runs: run, kind, dataset, split, committed_at, counts, query range, parents
    return [
        [
            r.run,
            r.kind,
            r.dataset,
            r.split,
            r.place[0],
            r.rows.get("candidates"),
            r.rows.get("queries"),
            *(r.query_range or (None, None)),
            list(r.parents),
        ]
        for r in runs
    ]


def _define_builtin(con: duckdb.DuckDBPyConnection, relations: dict[str, Relation]) -> None:
    """Define lever's own relations.

    DuckDB binds a view's whole tree when it is defined: 0.37 s for all of them. A relation that
    several others read is an empty table of its columns until those are defined: 0.13 s.
    """
    reads = Counter(read for name in relations for read in catalog.builtin_reads(name))
    shared = []
    for relation in catalog.in_order(relations):
        name, later = quote_identifier(relation.name), quote_identifier(f"{relation.name}__")
        if relation.name in _TABLES:
            con.execute(f"create table {name} as {body(relation)}")
            _put_contested(con)
        elif reads[relation.name] > 1:
            con.execute(f"create view {later} as {body(relation)}")
            con.execute(f"create table {name} as from {later} limit 0")
            shared.append((name, later))
        else:
            con.execute(f"create view {name} as {body(relation)}")
    for name, later in shared:
        con.execute(f"drop table {name}")
        con.execute(f"alter view {later} rename to {name}")


def _put_contested(con: duckdb.DuckDBPyConnection) -> None:
    """Tell ``candidates`` which runs are contested: with constants it takes half the time."""
    found = con.execute("select run from runs where may_overlap order by run").fetchall()
    listed = ", ".join(quote_literal(run) for (run,) in found)
    condition = f"candidate_run in ({listed})" if listed else "false"
    con.execute(catalog.contested_macro(condition))


def _close_to_outside(con: duckdb.DuckDBPyConnection, store: Store) -> None:
    allowed = quote_literal(str(store.path.resolve()) + "/")
    con.execute(f"set allowed_directories = [{allowed}]")
    con.execute("set enable_external_access = false")


def _closure(
    con: duckdb.DuckDBPyConnection, relations: dict[str, Relation], names: Sequence[str]
) -> tuple[dict[str, Relation], set[str]]:
    """The named relations and all they read, as far as they are ours; of them those over files."""
    found: dict[str, Relation] = {}
    raw: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in catalog.RAW_TABLES:
            raw.add(name)
        if name in found or name not in relations:
            continue
        found[name] = relations[name]
        if relations[name].folder != "user":
            waiting.extend(catalog.builtin_reads(name))
        else:
            with suppress(LeverError):  # a broken view is named when it is defined
                waiting.extend(catalog.tables_read(con, relations[name].sql))
    return found, raw


def _define_user(
    con: duckdb.DuckDBPyConnection, relations: dict[str, Relation]
) -> tuple[dict[str, Relation], dict[str, str]]:
    """Define the user's views, each after those it reads; a broken one is named and left out."""
    defined: dict[str, Relation] = {}
    failed: dict[str, str] = {}
    waiting = dict(relations)
    while waiting:
        progressed = False
        failed.clear()
        for name, relation in list(waiting.items()):
            try:
                sql = require_select(con, body(relation))
                con.execute(f"create view {quote_identifier(name)} as {sql}")
            except (duckdb.Error, LeverError) as error:
                failed[name] = _why_broken(con, relation, waiting.keys() - {name}, error)
                continue
            defined[name] = waiting.pop(name)
            progressed = True
        if not progressed:
            break
    return defined, failed


def _why_broken(
    con: duckdb.DuckDBPyConnection, relation: Relation, others: Set[str], error: Exception
) -> str:
    """One line; where it reads views that are broken too, or that read it, that is the reason."""
    with suppress(LeverError):
        if read := sorted(catalog.tables_read(con, relation.sql) & others):
            return f"it reads {', '.join(read)}: broken too, or the views read each other"
    return str(error).splitlines()[0]


def empty_view(con: duckdb.DuckDBPyConnection, where: str, what: str, hint: str) -> LeverError:
    """The error of a view without a row to use; says so where pointers that hold their own query
    are the reason. ``own_pointers`` is among the relations of the connection."""
    own = con.cursor().execute("select count(*) from own_pointers").fetchall()[0][0]
    if own:
        hint = (
            "candidates that show the query itself, its answer in the prompt, are left out: "
            f"{own:,} (view own_pointers). Where queries and demonstrations are of different "
            "splits, ingest the queries under their own --split"
        )
    return LeverError(what, where=where, hint=hint)


def require_select(con: duckdb.DuckDBPyConnection, sql: str) -> str:
    """Refuse anything but one reading SELECT; returns it, with today's names of columns where it
    does not bind with older ones.

    ``extract_statements`` alone is not enough: on DuckDB 2 ``with x as (copy …) select 1`` counts
    as a SELECT and writes. The table function ``query`` takes a reading SELECT only, and
    ``explain`` binds it without running it.

    Raises:
        UsageError: the text is not a single SELECT, or would write.
        LeverError: what it names has neither the older column nor today's.
        duckdb.Error: the text does not parse or bind.
    """
    statements = con.extract_statements(sql)
    if len(statements) != 1:
        raise UsageError("exactly one statement is allowed", value=len(statements))
    if statements[0].type != duckdb.StatementType.SELECT:
        raise UsageError("only SELECT is allowed", value=statements[0].type.name)
    try:
        con.execute("explain select * from query(?)", [sql]).fetchall()
    except duckdb.BinderException as error:
        now, renamed = older.with_todays_names(sql)
        if not renamed:
            raise
        try:
            con.execute("explain select * from query(?)", [now]).fetchall()
        except duckdb.BinderException:
            raise LeverError(plain_message(error), hint=older.told(renamed)) from error
        older.tell(renamed)
        return now
    return sql


def plain_message(error: Exception) -> str:
    """DuckDB's message without the line it points at, where that line is ours."""
    return str(error).partition("\n\nLINE 1: explain select * from query(?)")[0].strip()[:2000]


_USERS_SQL = (
    duckdb.BinderException,
    duckdb.CatalogException,  # a function or table there is not
    duckdb.ConversionException,
    duckdb.ParserException,
    duckdb.PermissionException,  # a file outside the store
)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn DuckDB's complaints about the user's views and rewards into LeverErrors."""
    try:
        yield
    except _USERS_SQL as error:
        raise LeverError(
            f"the reward or the view cannot be computed ({error})",
            hint="`lever query` runs the same expression by itself",
        ) from error
    except duckdb.InvalidInputException as error:
        raise LeverError(f"the view refuses its rows ({error})") from error


def identity(con: duckdb.DuckDBPyConnection) -> str:
    """A digest of all that a SELECT on the connection can read: DuckDB's version, views, macros,
    and what tables hold. Files stand in the views by the names of their runs, which never change.
    """
    cursor = con.cursor()
    views = "select view_name, sql from duckdb_views() where not internal order by all"
    macros = (
        "select function_name, parameters, macro_definition from duckdb_functions() "
        "where not internal and macro_definition is not null order by all"
    )
    parts: list[object] = [duckdb.__version__]
    parts += cursor.execute(views).fetchall()
    parts += cursor.execute(macros).fetchall()
    tables = "select table_name from duckdb_tables() where not internal order by all"
    for (name,) in cursor.execute(tables).fetchall():
        held = f"select count(*), sum(hash(t)), bit_xor(hash(t)) from {quote_identifier(name)} as t"
        parts.append((name, cursor.execute(held).fetchall()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()
