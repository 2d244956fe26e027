-- alpha * quality + beta * correctness, as the first trainer had it.
-- quality: -logprob_score if use_logprob and present, else beam_score, else 0.
-- correctness: hard, else soft, else 0 ('01'), or 2x - 1 of the same, 0 where both miss ('pm1').
-- reads:
--   logprob_score if use_logprob else beam_score weighed by reward_alpha
--   correct else score weighed by reward_beta
-- largest: unbounded
create or replace macro reward_legacy(
    beam_score, logprob_score, correct, score,
    reward_alpha, reward_beta, correctness_mode, use_logprob
) as
    reward_alpha * case
        when use_logprob and logprob_score is not null then -logprob_score::double
        else coalesce(beam_score, 0)::double
    end
    + reward_beta * case
        when correctness_mode = 'pm1'
            then coalesce(2 * coalesce(correct::double, score::double) - 1, 0.0::double)
        else coalesce(correct::double, score::double, 0.0::double)
    end;
