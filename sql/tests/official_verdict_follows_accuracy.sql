-- Where the VQA accuracy scored a row, it is right exactly if that is above 0.
select run, query_id, candidate, vqa_correct, vqa_acc_score
from stg_candidates
where
    eval_mode = 'file'
    and coalesce(metric_version, 'vqa') like 'vqa%'
    and eval_failed is not true
    and (vqa_correct = 1) <> (vqa_acc_score > 0)
