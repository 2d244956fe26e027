-- What each sampling temperature contributes.
-- grain: one row per temperature
-- columns:
--   temperature double: sampling temperature; null: not sampled
--   num_candidates bigint: candidates of the source
--   right_share double: share of them with correct 1
--   mean_reward double: their mean reward
--   within_query_variance double: variance of their rewards around their mean in the query
--   num_queries_needing bigint: queries that are mixed only because of this source
with source as (select * from reward_by_source),

final as (
    select
        temperature,
        num_candidates,
        right_share,
        mean_reward,
        within_query_variance,
        num_queries_needing
    from source
    where dimension = 'temperature'
    order by temperature nulls last
)

select * from final
