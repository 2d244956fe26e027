-- The same demonstrations in the same order, more than once for one query.
-- grain: one row per query and ordered pointer held more than once
-- columns:
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   pointer integer[]: ordered example ids of the demonstrations
--   num_candidates bigint: candidates with this pointer
--   min_reward double: their smallest reward
--   max_reward double: their largest reward
with repeating as (
    select dataset, split, query_id
    from query_rewards
    where num_pointers < num_candidates
),

source as (
    select scores.*
    from scores
    semi join repeating using (dataset, split, query_id)
),

final as (
    select
        dataset,
        split,
        query_id,
        pointer,
        count(*) as num_candidates,
        min(reward) as min_reward,
        max(reward) as max_reward
    from source
    group by dataset, split, query_id, pointer
    having count(*) > 1
)

select * from final
