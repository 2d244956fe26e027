-- w_s * soft. A missing score counts as 0.
-- reads:
--   vqa_acc_score weighed by soft_weight
-- largest: greatest(soft_weight, 0)
create or replace macro reward_soft_only(vqa_acc_score, soft_weight) as
    soft_weight * coalesce(vqa_acc_score, 0)::double;
