"""The SQL files as relations: read, parse the header, order by dependency, write for a shell.

In go the ``.sql`` files of the package ``lever_sql`` and of the user's folders; out come
:class:`Relation` records. Nothing is executed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lever_data import older
from lever_data.errors import LeverError, UsageError
from lever_data.reward_modes import RewardMode, comparison_sql, parse_mode

if TYPE_CHECKING:
    import duckdb

RL_KINDS = ("rl_data", "rollout", "rescore")
# relation over Parquet files → (kinds of runs it reads, their table, staging file with its types)
RAW_TABLES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "raw_candidates": (RL_KINDS, "candidates", "stg_candidates"),
    "raw_beams": (("beam",), "candidates", "stg_beams"),
    "raw_queries": (RL_KINDS, "queries", "stg_queries"),
    "raw_examples": (("examples",), "examples", "stg_examples"),
    "raw_embeddings": (("embeddings",), "embeddings", "stg_embeddings"),
    "raw_features": (("features",), "features", "stg_features"),
    "raw_texts": (("texts",), "texts", "stg_texts"),
    "raw_evaluations": (("evaluation",), "evaluations", "stg_evaluations"),
    "raw_sweeps": (("sweep",), "sweeps", "stg_sweeps"),
    "raw_training_metrics": (("training",), "training_metrics", "stg_training_metrics"),
}
# what a view that is trained on or audited has
TRAINING_COLUMNS = (
    "run",
    "dataset",
    "split",
    "query_id",
    "candidate",
    "pointer",
    "gen_method",
    "eval_mode",
    "eval_failed",
)
_RENAMED = ("stg_candidates", "stg_beams", "stg_evaluations")
_FIELD = re.compile(r"[(,] ?(\w+) ")  # the names of a struct type's fields
_WIDER = ("stg_examples",)  # staging files that document more than every run holds
_FOLDERS = ("staging", "views", "diagnostics")
_COLUMN = re.compile(r"^--   (\w+) (.+?): (.+)$")
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_COMMENT = re.compile(r"--.*")
_READ = re.compile(r"\b(?:from|join)\s+([a-z_0-9]+)")
_OWN = re.compile(r"\b([a-z_0-9]+) as (?:materialized |not materialized )?\(")


@dataclass(frozen=True)
class Column:
    """A documented column: name, DuckDB type in lower case, meaning with its unit."""

    name: str
    type: str
    meaning: str


@dataclass(frozen=True)
class Relation:
    """One ``.sql`` file: a single SELECT whose file stem is the relation's name.

    ``columns_as`` names the relation whose columns this one shares (``columns: as NAME``).
    """

    name: str
    folder: str  # staging | views | diagnostics | features | user
    sql: str
    purpose: str
    grain: str
    columns: tuple[Column, ...]
    columns_as: str | None


@cache
def builtin() -> dict[str, Relation]:
    """Every relation that comes with lever, by name."""
    root = resources.files("lever_sql")
    found = [
        parse(entry.name.removesuffix(".sql"), folder, entry.read_text("utf-8"))
        for folder in _FOLDERS
        for entry in (root / folder).iterdir()
        if entry.name.endswith(".sql")
    ]
    settings = next(r for r in found if r.name == "audit_settings")
    rewards = comparison_sql(reward_modes(), [column.name for column in settings.columns])
    found.append(parse("mode_rewards", "diagnostics", rewards))
    return {relation.name: relation for relation in sorted(found, key=lambda r: r.name)}


@cache
def features() -> dict[str, Relation]:
    """Every feature of pairs that comes with lever, by name; see ``relations.features``."""
    root = resources.files("lever_sql") / "features"
    files = sorted((e for e in root.iterdir() if e.name.endswith(".sql")), key=lambda e: e.name)
    named = {e.name.removesuffix(".sql"): e.read_text("utf-8") for e in files}
    return {name: parse(name, "features", text) for name, text in named.items()}


@cache
def macros() -> dict[str, str]:
    """The ``create macro`` statements by macro name; each may use those of earlier names."""
    root = resources.files("lever_sql") / "macros"
    files = sorted((e for e in root.iterdir() if e.name.endswith(".sql")), key=lambda e: e.name)
    return {e.name.removesuffix(".sql"): e.read_text("utf-8") for e in files}


@cache
def reward_modes() -> dict[str, RewardMode]:
    """Every reward mode by name: the macros ``reward_<mode>``, but the one that clips them all."""
    named = {
        m.removeprefix("reward_"): text for m, text in macros().items() if m.startswith("reward_")
    }
    return {name: parse_mode(name, text) for name, text in named.items() if name != "clip"}


def user_relations(folders: Iterable[Path]) -> tuple[dict[str, Relation], dict[str, str]]:
    """The user's ``.sql`` files: the readable ones by name, and what is wrong with the others."""
    good: dict[str, Relation] = {}
    broken: dict[str, str] = {}
    for path in (p for folder in folders for p in sorted(folder.glob("*.sql"))):
        name = path.name.removesuffix(".sql")
        try:
            if not _NAME.fullmatch(name):
                broken[name] = "the file name is not a relation name (a-z, 0-9, _)"
            elif name in builtin() or name in RAW_TABLES:
                broken[name] = "lever has a relation of this name; rename the file"
            elif name in good:
                broken[name] = "two folders hold a file of this name"
            else:
                good[name] = parse(name, "user", path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            broken[name] = f"the file cannot be read: {error}"
    return good, broken


def parse(name: str, folder: str, text: str) -> Relation:
    """Read the header comment of a SQL file; a user's file may have none."""
    purpose: list[str] = []
    grain, columns_as = "", None
    columns: list[Column] = []
    for line in text.splitlines():
        if not line.startswith("--"):
            break
        if match := _COLUMN.match(line):
            columns.append(Column(*match.groups()))
        elif line.startswith("-- grain:"):
            grain = line.removeprefix("-- grain:").strip()
        elif line.startswith("-- columns: as "):
            columns_as = line.removeprefix("-- columns: as ").strip()
        elif line.strip() != "-- columns:" and not grain:
            purpose.append(line.removeprefix("--").strip())
    return Relation(name, folder, text, " ".join(purpose), grain, tuple(columns), columns_as)


def documented_columns(relation: Relation) -> tuple[Column, ...]:
    """The columns a built-in relation's header documents, ``as NAME`` followed."""
    return builtin()[relation.columns_as].columns if relation.columns_as else relation.columns


def in_order(relations: dict[str, Relation]) -> list[Relation]:
    """Built-in relations so that each comes after those it reads."""
    ordered: dict[str, Relation] = {}

    def visit(name: str) -> None:
        if name in relations and name not in ordered:
            for other in sorted(builtin_reads(name)):
                visit(other)
            ordered[name] = relations[name]

    for name in relations:
        visit(name)
    return list(ordered.values())


@cache
def builtin_reads(name: str) -> frozenset[str]:
    """The tables and relations a built-in relation reads.

    By its words: to parse all of lever's own files takes 90 ms of every command. A test compares
    this with :func:`tables_read`, which is what anybody else's SQL goes through.
    """
    text = without_comments(builtin()[name].sql)
    known = builtin().keys() | RAW_TABLES.keys()
    return frozenset(known & {*_READ.findall(text)} - {*_OWN.findall(text), name})


def without_comments(sql: str) -> str:
    """SQL without its ``--`` comments."""
    return _COMMENT.sub("", sql)


def tables_read(con: duckdb.DuckDBPyConnection, sql: str) -> set[str]:
    """Names of the tables a SELECT reads, its own common table expressions left out.

    ``con.get_table_names`` would do, but it binds, and fails on `join … using` over tables that
    do not exist yet.
    """
    row = con.execute("select json_serialize_sql(?)", [sql]).fetchall()[0]
    tree = json.loads(row[0])
    if tree["error"]:
        raise LeverError(f"the SQL does not parse as a SELECT: {tree['error_message']}")
    read: set[str] = set()
    own: set[str] = set()
    waiting: list[Any] = [tree["statements"]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting.extend(node)
        elif isinstance(node, dict):
            if node.get("type") == "BASE_TABLE":
                read.add(node["table_name"].lower())
            if isinstance(node.get("cte_map"), dict):
                own |= {entry["key"].lower() for entry in node["cte_map"]["map"]}
            waiting.extend(node.values())
    return read - own


def read_parquet_sql(files: Sequence[str], like: str, has_older_names: bool = False) -> str:
    """SELECT over Parquet files with their run; typed and empty where there are no files.

    ``has_older_names``: columns of some of them may have the names of before.
    """
    if not files:
        columns = ", ".join(f"null::{c.type} as {c.name}" for c in builtin()[like].columns)
        return f"select {columns} where false"
    listed = ", ".join(quote_literal(f) for f in files)
    read = (
        f"select * from read_parquet([{listed}], hive_partitioning = true, "
        "hive_types = {'run': varchar}, union_by_name = true)"
    )
    # only examples with further fields have a column for them
    if has_older_names and like in _RENAMED:
        return _renamed_sql(read, builtin()[like].columns)
    return f"{read} union all by name {read_parquet_sql([], like)}" if like in _WIDER else read


def _renamed_sql(read: str, columns: Sequence[Column]) -> str:
    """``read``, which may hold a column under its older name, its newer or both, under the newer.

    Where all files have the same, DuckDB plans it as if there were no other.
    """
    before = {name: older_name for older_name, name in older.NAMES.items()}
    columns = [c for c in columns if c.name in before or c.type.startswith("struct(")]
    wide, now = [], []
    for column in columns:
        wide.append(f"null::{_with_older_fields(column.type)} as {column.name}")
        if column.name in before:
            wide.append(f"null::{column.type} as {before[column.name]}")
            now.append(f"coalesce({column.name}, {before[column.name]}) as {column.name}")
        else:
            fields = ", ".join(
                f"'{f}': coalesce(x.{f}, x.{before[f]})" if f in before else f"'{f}': x.{f}"
                for f in _FIELD.findall(column.type)
            )
            now.append(f"[{{{fields}}} for x in {column.name}] as {column.name}")
    gone = ", ".join(before[c.name] for c in columns if c.name in before)
    return (
        f"select * exclude ({gone}) replace ({', '.join(now)}) "
        f"from ({read} union all by name select {', '.join(wide)} where false)"
    )


def _with_older_fields(kind: str) -> str:
    """A struct type that has its fields under their older names too; another type as it is."""
    for older_name, name in older.NAMES.items():
        kind = re.sub(rf"\b{name} (\w+)", rf"{name} \1, {older_name} \1", kind)
    return kind


# Where the script lies: the shell's own command line says it (DuckDB 2 reads it, on Linux), else
# the shell stands in the store. No path is written down, or a copy would read the original.
_PLACE = """\
set variable lever_store = (
  with words as (
    select unnest(string_split(content, chr(0))) as word from read_text('/proc/self/cmdlin[e]')
  ),
  folders as (
    select regexp_extract(word, '^(.*)/views[.]sql$', 1) as folder from words
    where regexp_matches(word, '^[^\n]+/views[.]sql$') and not starts_with(word, '.read ')
  )
  select coalesce(
    (select min(folder) from folders having count(distinct folder) = 1),
    case
      when exists (from glob('lever.json')) then '.'
      else error('start duckdb in the folder of the store, or with -init STORE/views.sql')
    end
  )
);
set file_search_path = getvariable('lever_store');"""


def shell_script(store: Path) -> str:
    """``views.sql``: the relations of lever for any DuckDB shell, new runs seen by themselves.

    It finds its store when it is read: on the command line of the shell, else where that stands.
    """
    lines = [
        "-- Written by lever at every commit: duckdb -init views.sql",
        _PLACE,
        scorer_macro(None) + ";",
        f"create or replace view raw_runs as {_raw_runs_sql(store)};",
    ]
    for name, (kinds, table, like) in RAW_TABLES.items():
        globs = [f"runs/run={kind}-*/{table}/*.parquet" for kind in kinds]
        present = [g for g in globs if any(store.glob(g))]
        rows = read_parquet_sql(present, like, True)
        if present and kinds == RL_KINDS:
            rows += f" where run not in ({_MEMBERS_SQL})"
        lines.append(f"create or replace view {name} as {rows};")
    lines += [text.strip() for text in macros().values()]
    return "\n\n".join([*lines, *_view_statements()]) + "\n"


def _view_statements() -> Iterator[str]:
    """Every built-in view as a statement, and what ``candidates`` asks about runs."""
    for relation in in_order(builtin()):
        yield f'create or replace view "{relation.name}" as\n{body(relation)};'
        if relation.name == "runs":
            among = "select runs.run from runs where runs.may_overlap"
            yield contested_macro(f"candidate_run in ({among})") + ";"
            yield beams_macro("exists (from runs where runs.kind = 'beam')") + ";"


def scorer_macro(scorer: str | None) -> str:
    """``chosen_scorer()``, the model whose answers count; null for any."""
    value = "null::varchar" if scorer is None else quote_literal(scorer)
    return f"create or replace macro chosen_scorer() as {value}"


def contested_macro(condition: str) -> str:
    """``is_contested(run)``: whether another selected run may hold the same candidates.

    A session knows these runs: with constants DuckDB leaves out files and branches of the plan.
    """
    return f"create or replace macro is_contested(candidate_run) as {condition}"


def beams_macro(condition: str) -> str:
    """``has_beams()``: whether a selected run holds InfoScore beams, a constant in a session."""
    return f"create or replace macro has_beams() as {condition}"


def body(relation: Relation) -> str:
    """The SELECT of a file without the semicolon it may end with."""
    return relation.sql.strip().removesuffix(";")


def quote_literal(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def enum_sql(names: Sequence[str]) -> str:
    """The type of a column that holds one of these names, as a number of one or two bytes."""
    return f"enum({', '.join(map(quote_literal, names))})"


def quote_identifier(name: str) -> str:
    """A SQL identifier, quoted: the only way a name from outside gets into SQL.

    Raises:
        UsageError: the name holds a NUL, at which DuckDB 1 would end it.
    """
    if "\0" in name:
        raise UsageError("a name may not hold a NUL", value=name)
    return '"' + name.replace('"', '""') + '"'


def _raw_runs_sql(root: Path) -> str:
    if not any(root.glob("runs/*/manifest.json")):
        return read_parquet_sql([], "stg_runs")
    return (
        "select run, kind, dataset, split, "
        "coalesce(details.stands_at, committed_at) as committed_at, "
        "rows.candidates as num_candidates, rows.queries as num_queries, "
        "query_range[1] as query_low, query_range[2] as query_high, "
        "parents from read_json('runs/*/manifest.json', columns = {run: 'varchar', "
        "kind: 'varchar', dataset: 'varchar', split: 'varchar', committed_at: 'varchar', "
        "rows: 'struct(candidates bigint, queries bigint)', query_range: 'bigint[]', "
        "parents: 'varchar[]', details: 'struct(stands_at varchar)'}) "
        f"where run not in ({_MEMBERS_SQL})"
    )


_MEMBERS_SQL = (  # runs whose rows a compacted run holds
    "select unnest(parameters.compacts) from read_json('runs/*/manifest.json', "
    "columns = {parameters: 'struct(compacts varchar[])'})"
)
