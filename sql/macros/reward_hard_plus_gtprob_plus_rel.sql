-- w_h * hard + w_s * gt + w_r * (1 - hard) * rel: wrong answers near the truth earn a little.
-- reads:
--   correct weighed by hard_weight
--   expected_score weighed by soft_weight
--   similarity unless correct weighed by rel_weight
-- largest: greatest(hard_weight, rel_weight, 0) + greatest(soft_weight, 0)
create or replace macro reward_hard_plus_gtprob_plus_rel(
    correct, expected_score, similarity, hard_weight, soft_weight, rel_weight
) as
    hard_weight * coalesce(correct, 0)::double
    + soft_weight * coalesce(expected_score, 0)::double
    + rel_weight * (1 - coalesce(correct, 0)::double) * coalesce(similarity, 0)::double;
