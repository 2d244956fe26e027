-- How much better the best stored candidate is than the one the policy picks, over the queries
-- that have a pick: what perfect training on these candidates could win.
-- grain: one row in all
-- columns:
--   num_queries bigint: queries with a pick
--   num_without_pick bigint: queries without beam rank 0 and without log-probabilities
--   best_reward double: mean over queries of the best candidate's reward
--   picked_reward double: mean over queries of the pick's reward
--   average_reward double: mean over queries of the average candidate's reward
--   gap double: best_reward - picked_reward
--   best_accuracy double: mean over queries of the best candidate's accuracy
--   picked_accuracy double: mean over queries of the pick's accuracy
with source as (select * from query_rewards),

final as (
    select
        count(picked_reward) as num_queries,
        count(*) filter (where picked_reward is null) as num_without_pick,
        avg(max_reward) filter (where picked_reward is not null) as best_reward,
        avg(picked_reward) as picked_reward,
        avg(mean_reward) filter (where picked_reward is not null) as average_reward,
        avg(max_reward - picked_reward) as gap,
        avg(coalesce(best_accuracy, 0)) filter (where picked_reward is not null) as best_accuracy,
        avg(coalesce(picked_accuracy, 0)) filter (where picked_reward is not null)
            as picked_accuracy
    from source
)

select * from final
