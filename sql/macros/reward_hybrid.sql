-- alpha * info + (1 - alpha) * (hard + soft); info in [0, 1] comes from the view candidate_info.
-- reads:
--   info weighed by hybrid_alpha
--   correct weighed by 1 - hybrid_alpha
--   score weighed by 1 - hybrid_alpha
-- largest: hybrid_alpha + (1 - hybrid_alpha) * 2
create or replace macro reward_hybrid(info, correct, score, hybrid_alpha) as
    hybrid_alpha * coalesce(info, 0)::double
    + (1 - hybrid_alpha)
    * (coalesce(correct, 0)::double + coalesce(score, 0)::double);
