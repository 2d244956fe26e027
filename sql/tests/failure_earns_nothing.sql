-- A failed evaluation is no reward: it is never right.
select run, query_id, candidate, correct, score, error
from stg_candidates
where eval_failed and (correct = 1 or score > 0)
