-- All candidates of the queries with at least one right and one wrong candidate.
-- grain: one row per candidate
-- columns: as candidates
with source as (select * from all_candidates),

kept_queries as (
    select dataset, split, query_id
    from source
    group by dataset, split, query_id
    having max(coalesce(correct, 0)) = 1 and min(coalesce(correct, 0)) = 0
),

final as (
    select source.*
    from source
    semi join kept_queries using (dataset, split, query_id)
)

select * from final
