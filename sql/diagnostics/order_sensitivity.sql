-- Whether the order of the demonstrations matters: sets that a query holds in several orders, and
-- how much their mean rewards differ, in scored_sample.
-- grain: one row per number of demonstrations, from two on
-- columns:
--   shot_num tinyint: number of demonstrations
--   num_sets bigint: sets held in at least two orders
--   differing_share double: share of them whose orders have different mean rewards
--   mean_spread double: mean over sets of the largest minus the smallest mean reward
with source as (
    select dataset, split, query_id, shot_num, list_sort(pointer) as members, pointer, reward
    from scored_sample
    where shot_num > 1
),

orders as (
    select dataset, split, query_id, shot_num, members, pointer, avg(reward) as reward
    from source
    group by dataset, split, query_id, shot_num, members, pointer
),

sets as (
    select shot_num, max(reward) - min(reward) as spread
    from orders
    group by dataset, split, query_id, shot_num, members
    having count(*) > 1
),

final as (
    select
        shot_num,
        count(*) as num_sets,
        avg((spread > 1e-9)::integer) as differing_share,
        avg(spread) as mean_spread
    from sets
    group by shot_num
    order by shot_num
)

select * from final
