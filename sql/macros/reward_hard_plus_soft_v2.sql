-- 2 * w_h * hard + w_s * soft. A missing score counts as 0.
-- reads:
--   correct weighed by hard_weight
--   score weighed by soft_weight
-- largest: greatest(2 * hard_weight, 0) + greatest(soft_weight, 0)
create or replace macro reward_hard_plus_soft_v2(correct, score, hard_weight, soft_weight) as
    2 * hard_weight * coalesce(correct, 0)::double
    + soft_weight * coalesce(score, 0)::double;
