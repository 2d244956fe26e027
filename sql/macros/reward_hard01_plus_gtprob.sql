-- w_h * hard + w_s * probability of the ground truth. A missing score counts as 0.
-- reads:
--   correct weighed by hard_weight
--   expected_score weighed by soft_weight
-- largest: greatest(hard_weight, 0) + greatest(soft_weight, 0)
create or replace macro reward_hard01_plus_gtprob(correct, expected_score, hard_weight, soft_weight) as
    hard_weight * coalesce(correct, 0)::double + soft_weight * coalesce(expected_score, 0)::double;
