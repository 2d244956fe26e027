-- w_h * hard + w_s * probability of the ground truth. A missing score counts as 0.
-- reads:
--   vqa_correct weighed by hard_weight
--   vqa_gt_prob weighed by soft_weight
-- largest: greatest(hard_weight, 0) + greatest(soft_weight, 0)
create or replace macro reward_hard01_plus_gtprob(vqa_correct, vqa_gt_prob, hard_weight, soft_weight) as
    hard_weight * coalesce(vqa_correct, 0)::double + soft_weight * coalesce(vqa_gt_prob, 0)::double;
