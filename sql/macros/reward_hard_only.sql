-- w_h * hard. A missing score counts as 0.
create or replace macro reward_hard_only(vqa_correct, hard_weight) as
    hard_weight * coalesce(vqa_correct, 0)::double;
