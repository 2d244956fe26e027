-- w_h * hard + w_s * gt + w_r * (1 - hard) * rel: wrong answers near the truth earn a little.
-- reads:
--   vqa_correct weighed by hard_weight
--   vqa_gt_prob weighed by soft_weight
--   vqa_rel_score unless vqa_correct weighed by rel_weight
-- largest: greatest(hard_weight, rel_weight, 0) + greatest(soft_weight, 0)
create or replace macro reward_hard_plus_gtprob_plus_rel(
    vqa_correct, vqa_gt_prob, vqa_rel_score, hard_weight, soft_weight, rel_weight
) as
    hard_weight * coalesce(vqa_correct, 0)::double
    + soft_weight * coalesce(vqa_gt_prob, 0)::double
    + rel_weight * (1 - coalesce(vqa_correct, 0)::double) * coalesce(vqa_rel_score, 0)::double;
