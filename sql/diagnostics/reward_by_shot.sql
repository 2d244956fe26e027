-- What candidates with one, two, three and four demonstrations contribute.
-- grain: one row per number of demonstrations
-- columns:
--   shot_num tinyint: number of demonstrations
--   num_candidates bigint: candidates of the source
--   right_share double: share of them with correct 1
--   mean_reward double: their mean reward
--   within_query_variance double: variance of their rewards around their mean in the query
--   num_queries_needing bigint: queries that are mixed only because of this source
with source as (select * from reward_by_source),

final as (
    select
        shot_num,
        num_candidates,
        right_share,
        mean_reward,
        within_query_variance,
        num_queries_needing
    from source
    where dimension = 'shot_num'
    order by shot_num nulls last
)

select * from final
