"""The pages *Queries*, a grid of the queries of a view, and *One query*, with every candidate.

In go a survey of the view (classes, spreads, best rewards) and the store's relations; out come the
queries that meet a filter, and of one of them what was shown, answered and earned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lever_board.board import Survey
from lever_board.page import Content, PageRequest, working
from lever_board.picks import Picks, picks_of
from lever_board.prompts import PromptReader, Words
from lever_board.store_pages import short_name
from lever_data.catalog import reward_modes
from lever_data.errors import LeverError, UsageError
from lever_data.items.items import some_items
from lever_data.items.prompts import Item
from lever_data.relations.db import readable_errors
from lever_data.relations.reward_spec import RewardSpec
from lever_data.relations.rewards import needs, reward_sql, with_todays_columns

TILES = 24  # queries of a page of the grid
CANDIDATES = 200  # of a query that are shown
LONGEST = 400  # characters of an answer that are shown
FILTERS = {  # name → (words, condition over survey_queries)
    "all": ("all queries", "true"),
    "mixed": ("mixed: rewards differ", "class = 'mixed'"),
    "all_wrong": ("all wrong", "class = 'all_wrong'"),
    "all_right": ("all right", "class = 'all_right'"),
    "tied": ("tied in between", "class = 'tied'"),
    "reach": (
        "all wrong, the oracle of an evaluation right",
        "class = 'all_wrong' and oracle_accuracy > 0",
    ),
    "oracle": ("pick wrong, best right", "picked_accuracy = 0 and best_accuracy > 0"),
    "fallback": ("with fallback rows", "num_fallback > 0"),
    "failed": ("with failed answers", "num_failed > 0"),
}
SORTS = {  # name → (words, order)
    "id": ("query id", "dataset, split, query_id"),
    "spread": ("spread, widest first", "deviation desc nulls last, dataset, split, query_id"),
    "best": ("best reward", "max_reward desc nulls last, dataset, split, query_id"),
    "worst": ("worst best reward", "max_reward nulls last, dataset, split, query_id"),
    "gap": (
        "best above the pick",
        "max_reward - picked_reward desc nulls last, dataset, split, query_id",
    ),
}


@dataclass(frozen=True)
class Key:
    """Which query: its id is an index into the split."""

    dataset: str
    split: str
    query_id: int


def reward_of(asked: PageRequest) -> RewardSpec:
    """The reward mode the reader chose.

    Raises:
        UsageError: there is no such mode.
    """
    mode = asked.text("mode", "hard_plus_soft")
    if mode not in reward_modes():
        raise UsageError("unknown reward mode", value=mode, hint=f"modes: {list(reward_modes())}")
    return RewardSpec(mode=mode)


def queries_page(asked: PageRequest) -> Content:
    """A grid of a view's queries."""
    view, reward = asked.text("view", "all_candidates"), reward_of(asked)
    survey = asked.board.survey(asked.state, view, reward)
    if survey is None:
        return working(f"Queries of {view}")
    chosen, sort = _one_of(asked, "filter", FILTERS), _one_of(asked, "sort", SORTS)
    number = max(asked.number("page", 1), 1)
    with survey.tables() as con:
        counts = con.execute(
            "select " + ", ".join(f"count(*) filter ({sql})" for _, sql in FILTERS.values())
            + " from survey_queries"
        ).fetchall()[0]  # fmt: skip
        con.execute(
            f"select * from survey_queries where {FILTERS[chosen][1]} order by {SORTS[sort][1]} "
            "limit ? offset ?",
            [TILES, (number - 1) * TILES],
        )
        names = [column[0] for column in con.description or ()]
        rows = [dict(zip(names, row, strict=True)) for row in con.fetchall()]
    known = asked_items(asked, [Key(r["dataset"], r["split"], r["query_id"]) for r in rows])
    shares = dict(zip(FILTERS, counts, strict=True))
    parameters = {"view": view, "mode": reward.mode, "filter": chosen, "sort": sort}
    return Content(
        f"Queries of {view}",
        {"reward": f"`{reward.name}`", "queries": f"{shares['all']:,}"},
        template="queries.html",
        more={
            "tiles": [(row, known.get(_key(row))) for row in rows],
            "filters": [(k, f"{words} ({shares[k]:,})") for k, (words, _) in FILTERS.items()],
            "sorts": [(k, words) for k, (words, _) in SORTS.items()],
            "modes": [(mode, mode) for mode in reward_modes()],
            "views": training_views(asked),
            "parameters": parameters,
            "number": number,
            "last": -(-shares[chosen] // TILES),
            "shown": shares[chosen],
        },
    )


def training_views(asked: PageRequest) -> list[tuple[str, str]]:
    """The views that can be audited, as choices."""
    names = ["candidates", "evaluations", "queries", "examples", "runs", "sweeps", "embeddings"]
    hidden = {*names, "training_metrics", "evaluation_scores", "candidate_info", "own_pointers"}
    known = asked.state.session().relations.values()
    return [
        (r.name, r.name)
        for r in sorted(known, key=lambda r: r.name)
        if r.folder in ("views", "user") and r.name not in hidden and r.name != "beam_infoscore"
    ]


def query_page(asked: PageRequest) -> Content:
    """One query: what was asked, and every candidate with what it earned."""
    key = Key(asked.text("dataset"), asked.text("split"), asked.number("id", -1))
    reward = reward_of(asked)
    rows = _candidates(asked, key, reward)
    picks = _picks(asked, key)
    own, trouble = _checkpoints(asked, key)
    item = asked_items(asked, [key]).get(key)
    if item is None and not rows and not picks:
        raise UsageError(
            "the store knows no such query",
            value=f"{key.dataset}/{key.split}, query {key.query_id}",
            hint="the page Queries lists them",
        )
    pointers = [r["pointer"] for r in [*rows, *picks]] + [pick.pointer for pick in own.found]
    shown = _demonstrations(asked, key, pointers)
    ids = {number for row in rows for number in row["pointer"]}
    prompts = PromptReader(asked, (key.dataset, key.split), key.query_id, ids)
    before, after = _neighbours(asked, key, reward)
    context = {
        name: asked.text(name)
        for name in ("view", "filter", "sort", "training")
        if asked.text(name)
    }
    return Content(
        f"Query {key.query_id}",
        {
            "dataset/split": f"{key.dataset}/{key.split}",
            "question id": str(item.question_id) if item and item.question_id is not None else None,
            "image id": str(item.image_id) if item and item.image_id is not None else None,
        },
        template="query.html",
        more={
            "key": key,
            "item": item,
            "candidates": [
                _shown(row, _pickers(row, picks, own), shown, prompts.words(row))
                for row in rows[:CANDIDATES]
            ],
            "num_candidates": len(rows),
            "picks": picks,
            "own": own,
            "trouble": trouble,
            "places": _places(rows),
            "trainings": _trainings(asked, key),
            "training": asked.text("training"),
            "shown": shown,
            "modes": [(mode, mode) for mode in reward_modes()],
            "reward": reward,
            "context": context,
            "before": before,
            "after": after,
            "best": max((row["reward"] for row in rows if not row["eval_failed"]), default=None),
        },
    )


def _one_of(asked: PageRequest, name: str, choices: Mapping[str, object]) -> str:
    chosen = asked.text(name, next(iter(choices)))
    if chosen not in choices:
        raise UsageError(f"there is no such {name}", value=chosen, hint=", ".join(choices))
    return chosen


def _key(row: Mapping[str, Any]) -> Key:
    return Key(row["dataset"], row["split"], row["query_id"])


def asked_items(asked: PageRequest, keys: Sequence[Key]) -> dict[Key, Item]:
    """The questions of these queries: from the examples, else as the RL data tells them."""
    con = asked.state.session().con
    found: dict[Key, Item] = {}
    for dataset, split in dict.fromkeys((k.dataset, k.split) for k in keys):
        ids = [k.query_id for k in keys if (k.dataset, k.split) == (dataset, split)]
        items = some_items(con, asked.board.place(dataset, split), ids)
        found |= {Key(dataset, split, number): item for number, item in items.items()}
    return found


def _candidates(asked: PageRequest, key: Key, reward: RewardSpec) -> list[dict[str, Any]]:
    """Every candidate of the query, best reward first; what failed comes last.

    Raises:
        LeverError: the reward cannot be computed.
    """
    con = asked.state.session().con.cursor()
    reward = with_todays_columns(con, ["candidates"], reward)
    columns = [row[0] for row in con.execute("describe candidates").fetchall()]
    lacking = " or ".join(f"({need.lacking})" for need in needs("candidates", reward, columns))
    sql = f"""
        select
            v.*,
            coalesce({reward_sql(reward)}, 0) as reward,
            coalesce({lacking}, false) as is_lacking
        from candidates as v
        where v.dataset = ? and v.split = ? and v.query_id = ?
        order by coalesce(v.eval_failed, false), reward desc, v.run, v.candidate
    """
    with readable_errors():
        con.execute(sql, [key.dataset, key.split, key.query_id])
        names = [column[0] for column in con.description or ()]
        return [dict(zip(names, row, strict=True)) for row in con.fetchall()]


def _picks(asked: PageRequest, key: Key) -> list[dict[str, Any]]:
    """What every evaluated selector picked for the query."""
    con = asked.state.session().con.cursor()
    con.execute(_PICKS, [key.dataset, key.split, key.query_id])
    names = [column[0] for column in con.description or ()]
    return [dict(zip(names, row, strict=True)) for row in con.fetchall()]


_PICKS = """
    select evaluations.run, selector, shots, pointer, prediction, accuracy, error
    from evaluations
    where dataset = ? and split = ? and query_id = ?
    order by evaluations.run desc, selector, shots
"""


def _checkpoints(asked: PageRequest, key: Key) -> tuple[Picks, str | None]:
    """What the checkpoints of the store's trainings pick, or what kept them from it."""
    try:
        return picks_of(asked, (key.dataset, key.split), key.query_id), None
    except LeverError as error:  # the page has more than them to show
        return Picks(), error.message()
    except OSError as error:  # a checkpoint that may not be read
        return Picks(), f"{error.strerror}: {error.filename}"


def _trainings(asked: PageRequest, key: Key) -> list[tuple[str, str]]:
    """What picks may be shown of, as choices."""
    runs = [run for run in asked.state.kind("training") if run.dataset == key.dataset]
    every = [(run.run, f"every epoch of {short_name(run)}") for run in runs]
    return [("", "the best of each training"), *every] if runs else []


def _places(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, ...], tuple[int, Any]]:
    """Where a candidate stands in the list, from 1, and its row, by pointer; of several of the same
    the first."""
    found: dict[tuple[int, ...], tuple[int, Any]] = {}
    for number, row in enumerate(rows, 1):
        found.setdefault(tuple(row["pointer"]), (number, row))
    return found


def _pickers(row: Mapping[str, Any], picks: Sequence[Mapping[str, Any]], own: Picks) -> list[str]:
    """Who picks these demonstrations: selectors of evaluations and checkpoints, with the shots."""
    pointer = tuple(row["pointer"])
    named = {f"{p['selector']} ({p['shots']})" for p in picks if tuple(p["pointer"]) == pointer}
    found = [p for p in own.found if pointer and p.pointer[: len(pointer)] == pointer]
    return sorted(named | {f"{p.checkpoint} of {p.training} ({len(pointer)})" for p in found})


def _demonstrations(
    asked: PageRequest, key: Key, pointers: Iterable[Sequence[int]]
) -> dict[int, Item]:
    """The examples of the pointers: of the split `train` where there is one, else the query's."""
    ids = {example for pointer in pointers for example in pointer}
    con = asked.state.session().con
    for split in dict.fromkeys(("train", key.split)):
        found = some_items(con, asked.board.place(key.dataset, split), ids)
        if found:
            return found
    return {}


def _shown(
    row: Mapping[str, Any],
    pickers: Sequence[str],
    shown: Mapping[int, Item],
    words: Words,
) -> dict[str, Any]:
    """A candidate as its row shows it."""
    raw, kept = row["generation"], row["answer"]
    at = raw.find(kept) + len(kept) if raw is not None and kept and kept in raw else None
    return {
        **row,
        "demonstrations": [(number, shown.get(number)) for number in row["pointer"]],
        "picked_by": pickers,
        "answer": _clipped(kept),
        "raw_kept": _clipped(raw if at is None else raw[:at]),
        "raw_cut": "" if at is None else _clipped(raw[at:]),
        "prompt": words,
    }


def _clipped(text: str | None) -> str | None:
    """A text of a model as a page shows it; one that runs on is cut, and says how long it is."""
    if text is None or len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}… ({len(text):,} characters)"


def _neighbours(asked: PageRequest, key: Key, reward: RewardSpec) -> tuple[Key | None, Key | None]:
    """The query before and the one after: of the grid the reader came from, else by number."""
    if asked.text("filter") or asked.text("sort"):
        view = asked.text("view", "all_candidates")
        survey = asked.board.survey(asked.state, view, reward)
        return (None, None) if survey is None else _in_grid(asked, survey, key)
    con = asked.state.session().con.cursor()
    found = con.execute(_NEIGHBOURS, {"d": key.dataset, "s": key.split, "q": key.query_id})
    before, after = (
        None if number is None else Key(key.dataset, key.split, number)
        for number in found.fetchall()[0]
    )
    return before, after


_NEIGHBOURS = """
    with known as (
        select query_id from stg_queries where dataset = $d and split = $s
        union all
        select example_id as query_id from examples
        where dataset = $d and split = $s
            and not exists (select 1 from stg_queries where dataset = $d and split = $s)
    )

    select
        max(query_id) filter (query_id < $q),
        min(query_id) filter (query_id > $q)
    from known
"""


def _in_grid(asked: PageRequest, survey: Survey, key: Key) -> tuple[Key | None, Key | None]:
    chosen, sort = _one_of(asked, "filter", FILTERS), _one_of(asked, "sort", SORTS)
    sql = f"""
        with placed as (
            select
                dataset, split, query_id,
                row_number() over (order by {SORTS[sort][1]}) as place
            from survey_queries
            where {FILTERS[chosen][1]}
        ),
        own as (select place from placed where dataset = ? and split = ? and query_id = ?)
        select placed.place - own.place as side, dataset, split, query_id
        from placed, own
        where abs(placed.place - own.place) = 1
    """
    with survey.tables() as con:
        rows = con.execute(sql, [key.dataset, key.split, key.query_id]).fetchall()
    found = {side: Key(*rest) for side, *rest in rows}
    return found.get(-1), found.get(1)


def example_of(asked: PageRequest, dataset: str, split: str, example_id: int) -> Item:
    """One item of a split.

    Raises:
        LeverError: the store does not know it.
    """
    place = asked.board.place(dataset, split)
    found = some_items(asked.state.session().con, place, [example_id])
    if example_id not in found:
        raise LeverError("there is no such example", value=f"{dataset}/{split} {example_id}")
    return found[example_id]
