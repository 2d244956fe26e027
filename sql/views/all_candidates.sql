-- Every candidate that can be trained on: all sources, failed evaluations left out.
-- grain: one row per candidate
-- columns: as candidates
with source as (select * from candidates),

final as (
    select *
    from source
    where eval_failed is not true
)

select * from final
