-- Every right candidate, and of the wrong ones the four most similar: at a temperature below 0.5 the
-- others have no weight in RCE, and stay in the pool as what the right ones compete with.
-- grain: one row per candidate
select *
from all_candidates
where vqa_correct = 1 or candidate < 4
