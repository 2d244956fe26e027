-- Scores are fractions, correct is 0 or 1, temperatures and beam ranks not
-- negative, log-probabilities not positive (but for rounding).
select
    run,
    query_id,
    candidate,
    correct,
    score,
    expected_score,
    token_f1,
    edit_sim,
    similarity,
    temperature,
    beam_rank,
    logprob_score
from stg_candidates
where
    correct not in (0, 1)
    or score not between 0 and 1
    or expected_score not between 0 and 1
    or token_f1 not between 0 and 1
    or edit_sim not between 0 and 1
    or similarity not between 0 and 1
    or temperature < 0
    or beam_rank < 0
    or logprob_score > 1e-4
