-- w_h * hard. A missing score counts as 0.
-- reads:
--   correct weighed by hard_weight
-- largest: greatest(hard_weight, 0)
create or replace macro reward_hard_only(correct, hard_weight) as
    hard_weight * coalesce(correct, 0)::double;
