-- Every candidate that can be trained on: all sources; failed evaluations and pointers that hold
-- the query itself (see own_pointers) are left out.
-- grain: one row per candidate
-- columns: as candidates
with source as (select * from candidates),

final as (
    select *
    from source
    where eval_failed is not true and not (split = 'train' and list_contains(pointer, query_id))
)

select * from final
