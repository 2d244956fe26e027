-- The prefixes in shot_scores are scored as their row: official, or by string matching.
select run, query_id, candidate, eval_mode, shot_scores
from stg_candidates
where
    shot_scores is not null
    and list_contains([one.eval_mode is distinct from eval_mode for one in shot_scores], true)
