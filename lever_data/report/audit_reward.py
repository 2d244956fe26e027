"""The largest reward a mode can give: what separates "all right" from merely tied."""

from __future__ import annotations

import duckdb

from lever_data.relations.reward_spec import RewardSpec
from lever_data.relations.rewards import reward_sql

# Every score a mode reads, at its worst and at its best; weights may be negative, so the largest
# reward can stand at any corner.
_CORNERS = """
    select
        vqa_correct::tinyint as vqa_correct,
        vqa_acc_score::double as vqa_acc_score,
        vqa_gt_prob::double as vqa_gt_prob,
        vqa_rel_score::double as vqa_rel_score,
        range($shots)::integer[] as pointer,
        [
            {
                'shot': k::tinyint,
                'vqa_correct': vqa_correct::tinyint,
                'vqa_acc_score': vqa_acc_score::double
            }
            for k in range(1, $shots + 1)
        ] as shot_scores
    from
        range(2) as hard(vqa_correct),
        range(2) as soft(vqa_acc_score),
        range(2) as gt(vqa_gt_prob),
        range(2) as rel(vqa_rel_score)
"""


def largest_reward(con: duckdb.DuckDBPyConnection, reward: RewardSpec) -> float | None:
    """The largest value of the mode at its weights, in [-5, 5].

    An expression of the user's, and the unbounded mode ``legacy``, have no maximum of their own:
    theirs is the largest reward in the relation ``scores``, and ``None`` where all are equal there:
    then nothing says whether that is right or just tied.
    """
    if reward.expression is not None or reward.mode == "legacy":
        varied = "select max(reward) from scores having min(reward) < max(reward)"
        rows = con.execute(varied).fetchall() or [(None,)]
    elif reward.mode == "hybrid":  # reads a view beside the candidates, so no corner has it
        rows = con.execute(
            "select max(reward_clip(reward_hybrid(info, hit, hit, ?::double))) "
            "from range(2) as a(info), range(2) as b(hit)",
            [reward.hybrid_alpha],
        ).fetchall()
    else:
        shots = max(1, len(reward.shot_weights))
        rows = con.execute(
            f"select max({reward_sql(reward)}) from ({_CORNERS}) as v", {"shots": shots}
        ).fetchall()
    return None if rows[0][0] is None else float(rows[0][0])
