-- What each query can teach: how its rewards spread, and how its best candidate compares with the
-- one the policy would pick (beam rank 0, else the highest log-probability; the mean of several).
-- grain: one row per query
-- columns:
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   num_candidates bigint: candidates
--   num_pointers bigint: distinct ordered pointers, told apart by a 64-bit hash
--   num_right bigint: candidates with correct 1
--   num_wrong bigint: candidates with correct 0
--   num_unscored bigint: candidates whose correct is null
--   num_fallback bigint: candidates scored by string match
--   num_unknown bigint: candidates of which is not known how they were scored
--   mean_reward double: mean reward
--   reward_variance double: population variance of the rewards; 0 for one candidate
--   min_reward double: smallest reward
--   max_reward double: largest reward
--   best_accuracy double: largest score
--   picked_reward double: reward of the policy's pick; null without rank and log-probability
--   picked_accuracy double: score of the policy's pick
--   class varchar: mixed (rewards differ), all_wrong (all 0), all_right (all the mode's maximum) or tied
with source as (select * from query_sums),

settings as (select max_reward from audit_settings),

final as (
    select
        source.dataset,
        source.split,
        source.query_id,
        source.num_candidates,
        source.num_pointers,
        source.num_right,
        source.num_wrong,
        source.num_unscored,
        source.num_fallback,
        source.num_unknown,
        source.mean_reward,
        source.reward_variance,
        source.min_reward,
        source.max_reward,
        source.best_accuracy,
        source.picked_reward,
        source.picked_accuracy,
        case
            when source.min_reward < source.max_reward then 'mixed'
            when source.max_reward = 0 then 'all_wrong'
            when source.max_reward = settings.max_reward then 'all_right'
            else 'tied'
        end as class
    from source
    cross join settings
)

select * from final
