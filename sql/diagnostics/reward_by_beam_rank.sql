-- What each rank of the beam contributes.
-- grain: one row per beam rank
-- columns:
--   beam_rank integer: 0 for the best beam; null: not from beam search
--   num_candidates bigint: candidates of the source
--   right_share double: share of them with correct 1
--   mean_reward double: their mean reward
--   within_query_variance double: variance of their rewards around their mean in the query
--   num_queries_needing bigint: queries that are mixed only because of this source
with source as (select * from reward_by_source),

final as (
    select
        beam_rank,
        num_candidates,
        right_share,
        mean_reward,
        within_query_variance,
        num_queries_needing
    from source
    where dimension = 'beam_rank'
    order by beam_rank nulls last
)

select * from final
