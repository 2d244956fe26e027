"""The page *Demonstrations*: which examples are shown most, and how right candidates with them are.

In goes a survey of the view, whose ``demonstration_usage`` it lists; out come rows with the items.
"""

from __future__ import annotations

from lever_board.page import Content, PageRequest, working
from lever_board.query_pages import reward_of, training_views
from lever_data.catalog import reward_modes
from lever_data.errors import UsageError
from lever_data.items.items import some_items
from lever_data.items.prompts import Item

ROWS = 30
SORTS = {  # name → (words, order)
    "picks": ("shown most", "num_picks desc"),
    "best": ("helps most", "reward_lift desc nulls last"),
    "worst": ("harms most", "reward_lift nulls last"),
}


def demonstrations_page(asked: PageRequest) -> Content:
    """The examples that candidates show."""
    view, reward = asked.text("view", "all_candidates"), reward_of(asked)
    sort = asked.text("sort", "picks")
    if sort not in SORTS:
        raise UsageError("there is no such order", value=sort, hint=", ".join(SORTS))
    survey = asked.board.survey(asked.state, view, reward)
    if survey is None:
        return working("Demonstrations")
    number, hubs = max(asked.number("page", 1), 1), asked.text("hubs") == "1"
    condition = "is_hub" if hubs else "true"
    with survey.tables() as con:
        total = con.execute(
            f"select count(*), count(*) filter (is_hub) from survey_examples where {condition}"
        ).fetchall()[0]
        con.execute(
            f"select * from survey_examples where {condition} "
            f"order by {SORTS[sort][1]}, dataset, split, example_id limit ? offset ?",
            [ROWS, (number - 1) * ROWS],
        )
        names = [column[0] for column in con.description or ()]
        rows = [dict(zip(names, row, strict=True)) for row in con.fetchall()]
    items = _shown(asked, [(r["dataset"], r["split"], r["example_id"]) for r in rows])
    return Content(
        "Demonstrations",
        {
            "view": f"`{view}`",
            "examples shown": f"{total[0]:,}",
            "hubs": f"{total[1]:,}, shown at least ten times as often as the average",
        },
        template="demonstrations.html",
        more={
            "rows": [
                (row, items.get((row["dataset"], row["split"], row["example_id"]))) for row in rows
            ],
            "most": max((row["num_picks"] for row in rows), default=0),
            "views": training_views(asked),
            "modes": [(mode, mode) for mode in reward_modes()],
            "sorts": [(key, words) for key, (words, _) in SORTS.items()],
            "parameters": {
                "view": view,
                "mode": reward.mode,
                "sort": sort,
                "hubs": "1" if hubs else None,
            },
            "hubs": hubs,
            "number": number,
            "last": -(-total[0] // ROWS),
        },
    )


def _shown(
    asked: PageRequest, keys: list[tuple[str, str, int]]
) -> dict[tuple[str, str, int], Item]:
    """The items of (dataset, split of the queries, example id): examples are those of `train`
    where the store has them, as everywhere."""
    con = asked.state.session().con
    found: dict[tuple[str, str, int], Item] = {}
    for dataset, split in dict.fromkeys((d, s) for d, s, _ in keys):
        ids = [n for d, s, n in keys if (d, s) == (dataset, split)]
        for place in dict.fromkeys(("train", split)):
            items = some_items(con, asked.board.place(dataset, place), ids)
            if items:
                found |= {(dataset, split, n): item for n, item in items.items()}
                break
    return found
