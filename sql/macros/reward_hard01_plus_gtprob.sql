-- w_h * hard + w_s * probability of the ground truth. A missing score counts as 0.
create or replace macro reward_hard01_plus_gtprob(vqa_correct, vqa_gt_prob, hard_weight, soft_weight) as
    hard_weight * coalesce(vqa_correct, 0)::double + soft_weight * coalesce(vqa_gt_prob, 0)::double;
