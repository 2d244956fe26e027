-- A failed evaluation is no reward: it is never right.
select run, query_id, candidate, vqa_correct, vqa_acc_score, error
from stg_candidates
where eval_failed and (vqa_correct = 1 or vqa_acc_score > 0)
