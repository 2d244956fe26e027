-- Right answers start at 2 * w_h, wrong ones at 0, both plus w_s * ground-truth probability.
create or replace macro reward_hard01_plus_gtprob_separated(vqa_correct, vqa_gt_prob, hard_weight, soft_weight) as
    case when coalesce(vqa_correct, 0) = 1 then 2 * hard_weight else 0.0::double end
    + soft_weight * coalesce(vqa_gt_prob, 0)::double;
