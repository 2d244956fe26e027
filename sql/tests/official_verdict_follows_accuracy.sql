-- Where the official metric scored a row, it is right exactly if its accuracy is above 0.
select run, query_id, candidate, vqa_correct, vqa_acc_score
from stg_candidates
where
    eval_mode = 'file'
    and eval_failed is not true
    and (vqa_correct = 1) <> (vqa_acc_score > 0)
