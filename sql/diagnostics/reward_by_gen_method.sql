-- What beam search, sampling, random choice and retrieval each contribute.
-- grain: one row per generation method
-- columns:
--   gen_method varchar: beam, sample, random, retrieval or empty; null: not known
--   num_candidates bigint: candidates of the source
--   right_share double: share of them with correct 1
--   mean_reward double: their mean reward
--   within_query_variance double: variance of their rewards around their mean in the query
--   num_queries_needing bigint: queries that are mixed only because of this source
with source as (select * from reward_by_source),

final as (
    select
        gen_method,
        num_candidates,
        right_share,
        mean_reward,
        within_query_variance,
        num_queries_needing
    from source
    where dimension = 'gen_method'
    order by gen_method nulls last
)

select * from final
