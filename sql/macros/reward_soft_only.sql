-- w_s * soft. A missing score counts as 0.
create or replace macro reward_soft_only(vqa_acc_score, soft_weight) as
    soft_weight * coalesce(vqa_acc_score, 0)::double;
