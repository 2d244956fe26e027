-- The candidates of at most 10,000 queries, chosen by a hash of the query: for diagnostics that
-- compare pairs or texts, where more queries would cost time
-- and move a share by half a percent at most.
-- grain: one row per candidate
-- columns: as scored
with source as (select * from scored),

chosen as (
    select dataset, split, query_id
    from query_rewards
    order by hash(query_id), dataset, split, query_id
    limit 10000
),

-- by number first: most rows go before their texts are looked at
near as not materialized (
    select source.*
    from source
    where query_id in (select query_id from chosen)
),

final as (
    select near.*
    from near
    semi join chosen using (dataset, split, query_id)
)

select * from final
