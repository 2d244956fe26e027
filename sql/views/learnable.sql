-- All candidates of the queries whose hard_plus_soft rewards (weights 1) are not all equal.
-- grain: one row per candidate
-- columns: as candidates
with source as (select * from all_candidates),

kept_queries as (
    select dataset, split, query_id
    from source
    group by dataset, split, query_id
    having min(reward_hard_plus_soft(correct, score, 1.0::double, 1.0::double))
        < max(reward_hard_plus_soft(correct, score, 1.0::double, 1.0::double))
),

final as (
    select source.*
    from source
    semi join kept_queries using (dataset, split, query_id)
)

select * from final
