-- w_s * soft. A missing score counts as 0.
-- reads:
--   score weighed by soft_weight
-- largest: greatest(soft_weight, 0)
create or replace macro reward_soft_only(score, soft_weight) as
    soft_weight * coalesce(score, 0)::double;
