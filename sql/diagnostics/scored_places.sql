-- The datasets and splits of the candidates in scored.
-- grain: one row per dataset and split
-- columns:
--   dataset varchar: dataset of the queries
--   split varchar: split of the queries
with source as (select * from scored),

final as (
    select distinct dataset, split
    from source
    order by dataset, split
)

select * from final
