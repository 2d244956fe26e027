-- Whether the policy's log-probability orders candidates as the reward does: Kendall's tau-b over
-- the pairs within a query and source, in scored_sample. 1: the same order, -1: the reverse.
-- grain: one row per generation method and temperature
-- columns:
--   gen_method varchar: beam, sample, random, retrieval or empty; null: not known
--   temperature double: sampling temperature; null: not sampled
--   num_pairs bigint: pairs of candidates compared
--   num_reward_ties bigint: pairs with equal rewards, which say nothing
--   rank_correlation double: tau-b; null where all rewards or all log-probabilities tie
with source as (select * from scored_sample where logprob_score is not null),

pairs as (
    select
        first.gen_method,
        first.temperature,
        sign(first.reward - second.reward) as by_reward,
        sign(first.logprob_score - second.logprob_score) as by_logprob
    from source as first
    inner join source as second
        on
            first.dataset = second.dataset
            and first.split = second.split
            and first.query_id = second.query_id
            and first.gen_method is not distinct from second.gen_method
            and first.temperature is not distinct from second.temperature
    where (first.run, first.candidate) < (second.run, second.candidate)
),

final as (
    select
        gen_method,
        temperature,
        count(*) as num_pairs,
        count(*) filter (where by_reward = 0) as num_reward_ties,
        sum(by_reward * by_logprob)
        / nullif(sqrt(sum(abs(by_reward)) * sum(abs(by_logprob))), 0) as rank_correlation
    from pairs
    group by gen_method, temperature
    order by gen_method, temperature nulls first
)

select * from final
