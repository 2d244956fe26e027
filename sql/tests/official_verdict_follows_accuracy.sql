-- Where the VQA accuracy scored a row, it is right exactly if that is above 0.
select run, query_id, candidate, correct, score
from stg_candidates
where
    eval_mode = 'file'
    and coalesce(metric, 'vqa') like 'vqa%'
    and eval_failed is not true
    and (correct = 1) <> (score > 0)
