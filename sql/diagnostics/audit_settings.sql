-- How the candidates in scored are rewarded: hard_plus_soft with weights 1. `lever audit` puts
-- the chosen mode and weights in its place.
-- grain: one row in all
-- columns:
--   reward_name varchar: the reward mode, or the user's expression
--   is_expression boolean: whether it is the user's expression
--   max_reward double: the largest reward the mode can give; null: not known
--   hard_weight double: weight of correct
--   soft_weight double: weight of score or expected_score
--   rel_weight double: weight of similarity
--   hybrid_alpha double: share of the information term in hybrid
--   reward_alpha double: weight of the quality in legacy
--   reward_beta double: weight of the correctness in legacy
--   correctness_mode varchar: 01 or pm1, in legacy
--   use_logprob boolean: whether the quality in legacy is the log-probability
--   shot_weights double[]: weights of the prefixes in multi_shot; empty for equal ones
select
    'hard_plus_soft' as reward_name,
    false as is_expression,
    2.0::double as max_reward,
    1.0::double as hard_weight,
    1.0::double as soft_weight,
    0.1::double as rel_weight,
    0.5::double as hybrid_alpha,
    0.0::double as reward_alpha,
    0.0::double as reward_beta,
    '01' as correctness_mode,
    false as use_logprob,
    []::double[] as shot_weights
