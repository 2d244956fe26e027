-- How far rewards spread within queries: a histogram of the standard deviation. A query in the
-- first bar teaches nothing.
-- grain: one row per bin of width 0.1, empty bins left out
-- columns:
--   low double: lower end of the bin, included; 0 is a bin of its own
--   high double: upper end of the bin, not included
--   num_queries bigint: queries whose rewards have this population standard deviation
with source as (select sqrt(reward_variance) as deviation from query_rewards),

bins as (
    select case when deviation < 1e-9 then -1 else floor(deviation * 10 + 1e-9) end as bin
    from source
),

final as (
    select
        greatest(bin, 0) / 10 as low,
        case when bin < 0 then 0.0::double else (bin + 1) / 10 end as high,
        count(*) as num_queries
    from bins
    group by bin
    order by low, high
)

select * from final
