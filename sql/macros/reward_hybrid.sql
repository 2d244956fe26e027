-- alpha * info + (1 - alpha) * (hard + soft); info in [0, 1] comes from the view candidate_info.
-- reads:
--   info weighed by hybrid_alpha
--   vqa_correct weighed by 1 - hybrid_alpha
--   vqa_acc_score weighed by 1 - hybrid_alpha
-- largest: hybrid_alpha + (1 - hybrid_alpha) * 2
create or replace macro reward_hybrid(info, vqa_correct, vqa_acc_score, hybrid_alpha) as
    hybrid_alpha * coalesce(info, 0)::double
    + (1 - hybrid_alpha)
    * (coalesce(vqa_correct, 0)::double + coalesce(vqa_acc_score, 0)::double);
