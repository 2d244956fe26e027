-- w_h * hard. A missing score counts as 0.
-- reads:
--   vqa_correct weighed by hard_weight
-- largest: greatest(hard_weight, 0)
create or replace macro reward_hard_only(vqa_correct, hard_weight) as
    hard_weight * coalesce(vqa_correct, 0)::double;
