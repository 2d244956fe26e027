-- How often each example is picked as a demonstration, and whether candidates with it do better
-- than the average candidate of their query.
-- grain: one row per dataset, split of the queries and example
-- columns:
--   dataset varchar: dataset of the queries
--   split varchar: split of the queries
--   example_id bigint: the demonstration, an index into the candidate list
--   num_picks bigint: candidates that hold it
--   pick_share double: share of all picks
--   mean_reward double: mean reward of those candidates
--   reward_lift double: mean of reward minus the mean reward of the query
--   is_hub boolean: picked at least ten times as often as the average example
with picks as (
    select
        scores.dataset,
        scores.split,
        unnest(scores.pointer) as example_id,
        scores.reward,
        scores.reward - query_rewards.mean_reward as lift
    from scores
    inner join query_rewards using (dataset, split, query_id)
),

counts as (
    select
        dataset,
        split,
        example_id,
        count(*) as num_picks,
        avg(reward) as mean_reward,
        avg(lift) as reward_lift
    from picks
    group by dataset, split, example_id
),

final as (
    select
        dataset,
        split,
        example_id::bigint as example_id,
        num_picks,
        num_picks / sum(num_picks) over (partition by dataset, split) as pick_share,
        mean_reward,
        reward_lift,
        num_picks >= 10 * avg(num_picks) over (partition by dataset, split) as is_hub
    from counts
    order by num_picks desc, dataset, split, example_id
)

select * from final
