-- Right answers start at 2 * w_h, wrong ones at 0, both plus w_s * ground-truth probability.
-- reads:
--   correct weighed by hard_weight
--   expected_score weighed by soft_weight
-- largest: greatest(2 * hard_weight, 0) + greatest(soft_weight, 0)
create or replace macro reward_hard01_plus_gtprob_separated(correct, expected_score, hard_weight, soft_weight) as
    case when coalesce(correct, 0) = 1 then 2 * hard_weight else 0.0::double end
    + soft_weight * coalesce(expected_score, 0)::double;
